# SPDX-License-Identifier: Apache-2.0
"""What kernels report to the host (struct Failure in `templates/device/signal.cuh`), as exceptions."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from moegen.errors import InvalidRoutingError, PeerTimeoutError
from moegen.runtime.memory import HostWords

_FIELDS = ("valid", "phase", "rank", "peer", "index", "epoch", "expected", "seen", "invalid_token")


class Watchdog:
    """The Failure words of one op of one rank."""

    def __init__(self, op: str, phases: Mapping[str, str], timeout: float, *, pinned: bool) -> None:
        self._op = op
        self._phases = tuple(phases.values())
        self._timeout = timeout
        self._words = HostWords(len(_FIELDS), pinned=pinned)

    @property
    def address(self) -> int:
        return self._words.address

    def raise_what_happened(self) -> None:
        """Raises what the kernels have reported so far; costs two reads of host memory.

        Raises:
            PeerTimeoutError: on this and every later call.
            InvalidRoutingError: once; the words are then cleared.
        """
        words = self._words.words
        if words[0]:
            raise self._expired()
        if words[8]:
            token = words[8] - 1
            words[8] = 0
            raise InvalidRoutingError(
                f"{self._op}: token {token} selected an expert that does not exist; ids are 0..num_experts-1, or -1 "
                f"for no selection. That selection was left out of this and possibly other calls."
            )

    def _expired(self) -> PeerTimeoutError:
        seen = dict(zip(_FIELDS, self._words.words, strict=True))
        return PeerTimeoutError(
            op=self._op,
            phase=self._phases[seen["phase"]],
            rank=seen["rank"],
            peer=seen["peer"],
            index=ctypes.c_int32(seen["index"]).value,
            epoch=seen["epoch"],
            expected=seen["expected"],
            seen=seen["seen"],
            timeout=self._timeout,
        )
