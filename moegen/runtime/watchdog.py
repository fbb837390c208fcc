# SPDX-License-Identifier: Apache-2.0
"""What kernels report to the host (struct Failure in `templates/device/launch.cuh`), as exceptions."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from moegen.errors import (
    CapacityError,
    DifferentCallError,
    InvalidRoutingError,
    LeftOutError,
    PeerTimeoutError,
    WorldError,
)
from moegen.kernels.call_words import REGION_BYTES, differences
from moegen.kernels.spec import MAX_RANKS
from moegen.runtime.memory import HostWords, SymmetricMemory

_FIELDS = (
    "valid",
    "phase",
    "rank",
    "peer",
    "index",
    "epoch",
    "expected",
    "seen",
    "invalid_token",
    "mismatched",
    "rows_needed",
    "call_here",
    "call_here_high",
    "call_there",
    "call_there_high",
    "other_caller",
    "left_out_by",
)
_FAILURE_BYTES = 4 * len(_FIELDS)


class Watchdog:
    """The Failure words of one rank's kernels, side by side.

    Attributes:
        timeout: seconds that an expired wait is reported to have taken.
    """

    def __init__(self, stems: Sequence[str], phases: Mapping[str, str], timeout: float, *, pinned: bool) -> None:
        self._stems = tuple(stems)
        self._phases = tuple(phases.values())
        self.timeout = timeout
        self._words = HostWords(len(stems) * len(_FIELDS), pinned=pinned)
        self._all = memoryview(self._words.words).cast("B")
        self._nothing = bytes(len(self._all))
        self._calls: dict[int, tuple[SymmetricMemory, int]] = {}

    def address(self, kernel: int) -> int:
        """Of the kernel's struct Failure."""
        return self._words.address + kernel * _FAILURE_BYTES

    def compare_calls(self, kernel: int, memory: SymmetricMemory, offset: int) -> None:
        """Call words of that kernel's launches are published at this offset of the memory: a wait that expires may have
        expired because a rank made a different call.
        """
        self._calls[kernel] = memory, offset

    def raise_expired(self) -> None:
        """Raises PeerTimeoutError or DifferentCallError, on this and every later call, if a wait failed; all else is
        left for later.
        """
        if self._all == self._nothing:
            return
        for kernel, stem in enumerate(self._stems):
            words = self._failure(kernel)
            if words["other_caller"]:
                raise self._other_call(stem, words)
            if words["valid"]:
                raise self._by_different_call(kernel, stem, words) or self._expired(stem, words)

    def raise_mismatched(self) -> None:
        """Raises WorldError, once, if a rank's part belongs to another call; all else is left for later."""
        for kernel, stem in enumerate(self._stems):
            self._raise_mismatched(kernel, stem)

    def raise_what_happened(self) -> None:
        """Raises what the kernels have reported so far; costs one look at host memory.

        Raises:
            PeerTimeoutError, DifferentCallError: on this and every later call.
            InvalidRoutingError, WorldError, CapacityError, LeftOutError: once; the words are then cleared.
        """
        if self._all == self._nothing:
            return
        self.raise_expired()
        for kernel, stem in enumerate(self._stems):
            self._raise_invalid(kernel, stem)
            self._raise_mismatched(kernel, stem)
            self._raise_overfull(kernel, stem)
            self._raise_left_out(kernel, stem)

    def _raise_mismatched(self, kernel: int, stem: str) -> None:
        rank = self._taken(kernel, "mismatched") - 1
        if rank >= 0:
            raise WorldError(
                f"{stem}: what rank {rank} has sent belongs to another call: all ranks make the same calls of the same "
                "objects, with the same max_tokens, in the same order. Its rows were left out"
            )

    def _taken(self, kernel: int, word: str) -> int:
        """A word, which is cleared."""
        at = kernel * len(_FIELDS) + _FIELDS.index(word)
        value = int(self._words.words[at])
        if value:
            self._words.words[at] = 0
        return value

    def _raise_overfull(self, kernel: int, stem: str) -> None:
        rows = self._taken(kernel, "rows_needed")
        if rows:
            raise CapacityError(
                f"{stem}: {rows} or more rows came to a call that had room for fewer, and were left out; give it "
                f"max_rows={rows} or more, or none"
            )

    def _raise_left_out(self, kernel: int, stem: str) -> None:
        rank = self._taken(kernel, "left_out_by") - 1
        if rank >= 0:
            raise LeftOutError(
                f"{stem}: rank {rank} has left this rank out, because it gave no sign of life for twice the timeout, "
                "and so will all other ranks: results hold only this rank's own part. To return, make every call that "
                "the others make, then have all ranks write 1 into active_ranks between a combine and the next dispatch"
            )

    def _raise_invalid(self, kernel: int, stem: str) -> None:
        token = self._taken(kernel, "invalid_token") - 1
        if token < 0:
            return
        raise InvalidRoutingError(
            f"{stem}: token {token} selected an expert that does not exist; ids are 0..num_experts-1, or -1 "
            f"for no selection. That selection was left out of this and possibly other calls."
        )

    def _failure(self, kernel: int) -> dict[str, int]:
        first = kernel * len(_FIELDS)
        return dict(zip(_FIELDS, self._words.words[first : first + len(_FIELDS)], strict=True))

    @staticmethod
    def _other_call(stem: str, seen: Mapping[str, int]) -> DifferentCallError:
        here, there = (seen[f"{side}_high"] << 32 | seen[side] for side in ("call_here", "call_there"))
        return _different_call(stem, here, there, seen["rank"], seen["other_caller"] - 1)

    def _by_different_call(self, kernel: int, stem: str, seen: Mapping[str, int]) -> DifferentCallError | None:
        """Of ranks that have published another call word for this launch, the one that was waited for, or any."""
        if kernel not in self._calls:
            return None
        memory, offset = self._calls[kernel]
        published = memory.local[offset : offset + REGION_BYTES].cpu().numpy().view("<u8")
        words = published.reshape(2, MAX_RANKS)[seen["epoch"] % 2].tolist()
        calls = {rank: word >> 32 for rank, word in enumerate(words) if word & 0xFFFFFFFF == seen["epoch"]}
        here = calls.get(seen["rank"])
        others = [rank for rank, call in calls.items() if call != here]
        if here is None or not others:
            return None
        peer = seen["peer"] if seen["peer"] in others else others[0]
        return _different_call(stem, here, calls[peer], seen["rank"], peer)

    def _expired(self, stem: str, seen: Mapping[str, int]) -> PeerTimeoutError:
        return PeerTimeoutError(
            op=stem,
            phase=self._phases[seen["phase"]],
            rank=seen["rank"],
            peer=seen["peer"],
            index=ctypes.c_int32(seen["index"]).value,
            epoch=seen["epoch"],
            expected=seen["expected"],
            seen=seen["seen"],
            timeout=self.timeout,
        )


def _different_call(stem: str, here: int, there: int, rank: int, peer: int) -> DifferentCallError:
    op = "_".join(stem.split("_")[:2])
    return DifferentCallError(stem, rank, peer, tuple(differences(op, here, there, rank, peer)))
