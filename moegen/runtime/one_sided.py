# SPDX-License-Identifier: Apache-2.0
"""Family `a2a` at run time: its symmetric buffer and its launches, for one rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import torch

from moegen.kernels.a2a import PHASES, OneSidedCombine, OneSidedDispatch
from moegen.kernels.a2a_layout import planes, regions, roles
from moegen.kernels.call_words import ROW_DTYPES, of_payloads, of_ranks, pack
from moegen.kernels.problem import Problem
from moegen.payloads import PayloadsHandle
from moegen.runtime.bound import BoundKernel, BoundKernels, address, signed
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.low_latency import FIRST_EPOCH
from moegen.runtime.memory import SymmetricMemory
from moegen.runtime.ownership import lasting
from moegen.runtime.streams import StreamOrder
from moegen.runtime.watchdog import Watchdog
from moegen.runtime.worlds import RankWorld

log = logging.getLogger(__name__)

_CONTROL_WORDS = 32
"""32-bit words per op: struct Control, on a 128-byte line of its own; the last line holds the abort word."""

_DISPATCH, _COMBINE, _ABORTED = range(3)

_KEPT_WORDS = 1024
"""Call words in each cache."""

OF_HANDLE = ("token_ranks", "token_slots", "tokens_sent", "counts")

_DISPATCH_VARYING = (
    "payloads",
    "planes",
    "topk_idx",
    "num_tokens",
    *OF_HANDLE,
    "stats",
    "gathered",
    "unused_ids",
    "active",
    "call",
    "timeout_ns",
    "tokens",
    "slots",
    "stats_words",
    "id_words",
    "unused_id",
    "wide_ids",
)


@lru_cache(_KEPT_WORDS)
def dispatch_word(
    widths: tuple[int, ...], dtypes: tuple[torch.dtype, ...], slots: int, stats_words: int, active: int
) -> int:
    """Call word of a dispatch."""
    return pack("a2a_dispatch", 0, of_ranks(active), of_payloads(widths, dtypes), slots - 1, stats_words)


@lru_cache(_KEPT_WORDS)
def combine_word(dtype: str, pulls: bool, slots: int, active: int) -> int:
    """Call word of a combine."""
    return pack("a2a_combine", ROW_DTYPES.index(dtype), pulls, of_ranks(active), slots - 1)


def _combine_varying(spec: OneSidedCombine) -> tuple[str, ...]:
    rows = () if spec.pulls else ("y",)  # what is pulled lies where it always does
    results = (param.name for param in spec.result.params)
    return (*rows, "out", *results, *OF_HANDLE, "active", "call", "timeout_ns", "tokens", "slots")


class OneSidedOps(BoundKernels):
    """One rank's dispatch and combine. Collective to make; kernels are bound when they are first used."""

    def __init__(
        self,
        world: RankWorld,
        problem: Problem,
        *,
        payload_bytes: int,
        combine_bytes: int,
        expert_rows: bool,
        timeout: float,
        num_sms: int | None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        super().__init__()
        self.problem = problem
        self.at = regions(problem.num_ranks, problem.max_tokens, payload_bytes, combine_bytes, expert_rows)
        self.buffer_bytes = self.at.end
        log.info("rank %d allocates %s bytes of symmetric memory", world.rank, f"{self.buffer_bytes:,}")
        self.memory: SymmetricMemory = world.allocate(self.buffer_bytes)
        self._control = torch.zeros(3, _CONTROL_WORDS, dtype=torch.int32, device=world.device)
        self._control[:_ABORTED, 0] = signed(first_epoch)
        before = 0xFFFFFFFF if first_epoch == FIRST_EPOCH else first_epoch - 1
        words = self.memory.local.view(torch.int32)
        words[self.at.presence // 4 :][: 2 * problem.num_ranks] = signed(before)
        self._timeout, self._num_sms, self._world = timeout, num_sms, world
        self._order = StreamOrder(world.device)
        base = self.memory.local.data_ptr()
        self.shown = range(base + self.at.planes, base + self.at.tags)
        """Addresses of what dispatch returns."""
        self._views: dict[tuple[tuple[tuple[torch.dtype, int], ...], int], tuple[torch.Tensor, ...]] = {}

    def bind(self, kernel: LoadedKernel) -> None:
        """Makes a loaded kernel ready for launches."""
        spec, world, at = kernel.spec, self._world, self.at
        assert isinstance(spec, (OneSidedDispatch, OneSidedCombine))
        watchdog = Watchdog([spec.stem], PHASES, self._timeout, pinned=world.device.type == "cuda")
        who = roles(spec, self.problem.max_tokens, kernel.blocks(world.ranks_per_device, self._num_sms))
        dispatch = isinstance(spec, OneSidedDispatch)
        fixed: dict[str, int | Sequence[int]] = {
            "peers": self.memory.peers,
            "control": self._control[_DISPATCH if dispatch else _COMBINE].data_ptr(),
            "aborted": self._control[_ABORTED].data_ptr(),
            "failure": watchdog.address(0),
            "presence_offset": at.presence,
            "senders": who.senders,
            "receivers": who.receivers,
            "rank": world.rank,
            "max_tokens": self.problem.max_tokens,
        }
        if isinstance(spec, OneSidedDispatch):
            fixed |= {"counts_offset": at.counts, "stats_offset": at.stats, "flags_offset": at.flags}
        else:
            fixed["other_control"] = self._control[_DISPATCH].data_ptr()
            fixed |= {"calls": self.memory.local.data_ptr() + at.calls, "calls_offset": at.calls}
            watchdog.compare_calls(0, self.memory, at.calls)
        if isinstance(spec, OneSidedCombine) and spec.pulls:
            fixed |= {"rows_offset": at.expert_rows}
        elif isinstance(spec, OneSidedCombine):
            fixed |= {"rows_offset": at.rows, "half_bytes": at.half, "tags_offset": at.tags}
        varying = _DISPATCH_VARYING if isinstance(spec, OneSidedDispatch) else _combine_varying(spec)
        self._bound[spec] = BoundKernel(kernel, spec.params, who.blocks, fixed, varying), watchdog

    def views(
        self, parts: Sequence[torch.Tensor], widths: tuple[int, ...], slots: int, words: int
    ) -> tuple[torch.Tensor, ...]:
        """The planes, as what they hold: [ranks, slots, columns] of each payload. Statistics, of so many `words`, lie
        elsewhere. Made once for each kind of call: a view costs the host as much as a small torch op.
        """
        kind = (tuple((part.dtype, part.shape[1]) for part in parts), slots)
        views = self._views.get(kind)
        if views is None:
            ranks = self.problem.num_ranks
            planes = (self.memory.local[place:] for place in self.planes(widths, slots))
            with lasting():
                views = self._views[kind] = tuple(
                    plane[: ranks * slots * width].view(part.dtype).view(ranks, slots, part.shape[1])
                    for part, width, plane in zip(parts, widths, planes, strict=True)
                )
        return views

    @lasting()
    def expert_rows(self, slots: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """The region of experts' rows: [ranks, slots, hidden]."""
        ranks = self.problem.num_ranks
        size = ranks * slots * hidden * dtype.itemsize
        return self.memory.local[self.at.expert_rows :][:size].view(dtype).view(ranks, slots, hidden)

    def holds(self, y: torch.Tensor) -> bool:
        """Whether these rows are that region."""
        return self.at.expert_rows < self.at.end and y.data_ptr() == self.memory.local.data_ptr() + self.at.expert_rows

    def receives_in(self, y: torch.Tensor) -> bool:
        """Whether these rows lie where dispatch receives."""
        return y.data_ptr() in self.shown

    def planes(self, widths: tuple[int, ...], slots: int) -> list[int]:
        """Byte offsets of the payloads' planes in the buffer."""
        return planes(widths, self.problem.num_ranks, slots, self.at.planes)

    def dispatch(
        self,
        spec: OneSidedDispatch,
        payloads: Sequence[torch.Tensor],
        topk_idx: torch.Tensor,
        num_tokens: torch.Tensor | None,
        addresses: tuple[int, ...],
        slots: int,
        stats: torch.Tensor | None,
        gathered: torch.Tensor | None,
        unused_ids: tuple[int, int] | None,
        active: int,
        timeout: float | None,
        exact: bool,
    ) -> None:
        """Launches dispatch; arguments are checked already. `exact`: no; rows go where they are read."""
        self._order.follow("a2a")
        kernel, watchdog = self._bound[spec]
        places = self.planes(spec.payloads.widths, slots)
        words = 0 if stats is None else stats.numel()
        ids, id_words, unused_id = 0, 0, 0
        if unused_ids is not None:
            index, unused_id = unused_ids
            ids = self.memory.local.data_ptr() + places[index]
            id_words = spec.payloads.widths[index] // 4
        kernel(
            *(payload.data_ptr() for payload in payloads),
            *places,
            topk_idx.data_ptr(),
            address(num_tokens),
            *addresses,
            address(stats),
            address(gathered),
            ids,
            active,
            dispatch_word(spec.payloads.widths, tuple([part.dtype for part in payloads]), slots, words, active),
            self._nanoseconds(watchdog, timeout),
            topk_idx.shape[0],
            slots,
            words,
            id_words,
            unused_id,
            topk_idx.dtype == torch.int64,
        )

    def combine(
        self,
        spec: OneSidedCombine,
        y: torch.Tensor,
        results: tuple[int, ...],
        handle: PayloadsHandle,
        active: int,
        timeout: float | None,
    ) -> None:
        """Launches combine; arguments are checked already. `results`: the address of `out`, and of what else the
        kernel's results have.
        """
        self._order.follow("a2a")
        kernel, watchdog = self._bound[spec]
        nanoseconds = self._nanoseconds(watchdog, timeout)
        rows = () if spec.pulls else (y.data_ptr(),)
        call = combine_word(spec.dtype, spec.pulls, handle.max_tokens, active)
        kernel(*rows, *results, *handle.addresses, active, call, nanoseconds, handle.num_tokens, handle.max_tokens)

    def _nanoseconds(self, watchdog: Watchdog, timeout: float | None) -> int:
        """Of this call's timeout; a report of an expired wait names the last call's."""
        watchdog.timeout = seconds = self._timeout if timeout is None else timeout
        return int(seconds * 1e9)
