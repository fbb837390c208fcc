# SPDX-License-Identifier: Apache-2.0
"""Family `ht` at run time: its symmetric buffer and its launches, for one rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from moegen.kernels.call_words import pack
from moegen.kernels.ht import (
    CHUNK,
    PHASES,
    HighThroughputCombine,
    HighThroughputDispatch,
    Regions,
    regions,
)
from moegen.kernels.ht_layout import HighThroughputLayout
from moegen.kernels.ht_roles import roles
from moegen.kernels.ll import ceil_div
from moegen.kernels.problem import Problem
from moegen.rows import RowsHandle
from moegen.runtime.bound import BoundKernel, address, signed
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.layout import LayoutOp
from moegen.runtime.low_latency import FIRST_EPOCH
from moegen.runtime.memory import SymmetricMemory
from moegen.runtime.row_memory import OF_HANDLE, Numbers, RowMemory, Rows
from moegen.runtime.streams import StreamOrder, current_stream, record
from moegen.runtime.watchdog import Watchdog
from moegen.runtime.worlds import RankWorld
from moegen.select import RowSelection

log = logging.getLogger(__name__)

_CONTROL_WORDS = 32
"""32-bit words per op: struct Control, on a 128-byte line of its own; the last line holds the abort word."""

_DISPATCH_VARYING = (
    "x",
    "x_scales",
    "topk_idx",
    "topk_weights",
    "out",
    "out_scales",
    "out_topk_idx",
    "out_weights",
    "counts",
    "total_counts",
    "first_slots",
    "source_counts",
    *OF_HANDLE,
    "num_tokens",
    "x_stride",
    "scale_row_stride",
    "scale_word_stride",
    "tokens",
    "capacity",
    "wide_ids",
    "tokens_wanted",
    "timeout_ns",
)
_COMBINE_VARYING = (
    "y",
    "y_weights",
    "bias",
    "second_bias",
    "out",
    "out_weights",
    *OF_HANDLE,
    "tokens",
    "rows",
    "timeout_ns",
    "call",
)


class HighThroughputOps:
    """One rank's dispatch and combine. Collective to make; the kernels are loaded already."""

    def __init__(
        self,
        world: RankWorld,
        problem: Problem,
        selection: RowSelection,
        kernels: Sequence[LoadedKernel],
        *,
        alignment: int,
        timeout: float,
        num_sms: int | None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        self.problem = problem
        self._timeout = timeout
        self.row_memory = RowMemory(
            problem, selection.dispatch, len(problem.local_experts(world.rank)), alignment, world.device
        )
        dispatch = regions(selection.dispatch, problem.max_tokens, 0)
        combine = regions(selection.combine, problem.max_tokens, dispatch.end)
        self.buffer_bytes = combine.end
        log.info("rank %d allocates %s bytes of symmetric memory", world.rank, f"{self.buffer_bytes:,}")
        self.memory: SymmetricMemory = world.allocate(self.buffer_bytes)
        if selection.dispatch.borrowed:
            self.row_memory.lend(self.memory.local[dispatch.rows : dispatch.tags])
        self._control = torch.zeros(3, _CONTROL_WORDS, dtype=torch.int32, device=world.device)
        chunks = ceil_div(problem.max_tokens, CHUNK)
        counters = selection.dispatch.num_counters
        self._chunk_counts = torch.zeros(chunks, counters, dtype=torch.int32, device=world.device)
        self._chunk_epochs = torch.zeros(chunks, dtype=torch.int32, device=world.device)
        pinned = world.device.type == "cuda"
        self._watchdog = Watchdog([kernel.spec.stem for kernel in kernels], PHASES, timeout, pinned=pinned)
        self._order = StreamOrder(world.device)
        self._world = world
        self._alignment = alignment
        self._to_bind: dict[str, tuple[LoadedKernel, Regions, int]] = {}
        self._bound: dict[tuple[str, int | None], BoundKernel] = {}
        for number, kernel in enumerate(kernels):
            spec = kernel.spec
            if isinstance(spec, HighThroughputLayout):
                self.layout = LayoutOp(kernel, world.device, world.ranks_per_device)
                continue
            at = combine if isinstance(spec, HighThroughputCombine) else dispatch
            name = spec.phase if isinstance(spec, HighThroughputDispatch) else "combine"
            failure = self._watchdog.address(number)
            self._watchdog.compare_calls(number, self.memory, at.calls)
            self._to_bind[name] = kernel, at, failure
            self._bound[name, None] = self._bind(kernel, at, failure, num_sms)
        before = 0xFFFFFFFF if first_epoch == FIRST_EPOCH else first_epoch - 1
        self._control[:2, 0] = signed(first_epoch)
        words = self.memory.local.view(torch.int32)
        for at in (dispatch, combine):
            words[at.consumed // 4 : at.consumed // 4 + problem.num_ranks] = signed(before)

    def _bind(self, kernel: LoadedKernel, at: Regions, failure: int, num_sms: int | None) -> BoundKernel:
        spec, world = kernel.spec, self._world
        assert isinstance(spec, (HighThroughputDispatch, HighThroughputCombine))
        who = roles(spec, kernel.blocks(world.ranks_per_device, num_sms))
        dispatch = isinstance(spec, HighThroughputDispatch)
        fixed: dict[str, int | Sequence[int]] = {
            "peers": self.memory.peers,
            "rank": world.rank,
            "max_tokens": self.problem.max_tokens,
            "control": self._control[0 if dispatch else 1].data_ptr(),
            "aborted": self._control[2].data_ptr(),
            "failure": failure,
            "consumed_offset": at.consumed,
            "calls_offset": at.calls,
            "rows_offset": at.rows,
            "tags_offset": at.tags,
            "senders": who.senders,
            "receivers": who.receivers,
        }
        if isinstance(spec, HighThroughputDispatch):
            fixed |= {
                "counts_offset": at.counts,
                "entries_offset": at.entries,
                "chunk_counts": self._chunk_counts.data_ptr(),
                "chunk_epochs": self._chunk_epochs.data_ptr(),
                "alignment": self._alignment,
            }
        varying = _DISPATCH_VARYING if dispatch else _COMBINE_VARYING
        return BoundKernel(kernel, spec.params, who.blocks, fixed, varying)

    def _kernel(self, name: str, num_sms: int | None) -> BoundKernel:
        """With that many blocks at most; None: with the object's number."""
        kernel = self._bound.get((name, num_sms))
        if kernel is None:
            kernel = self._bound[name, num_sms] = self._bind(*self._to_bind[name], num_sms)
        return kernel

    def dispatch(
        self,
        phase: str,
        x: torch.Tensor,
        x_scales: torch.Tensor | None,
        topk_idx: torch.Tensor | None,
        topk_weights: torch.Tensor | None,
        num_tokens: torch.Tensor | None,
        numbers: Numbers,
        rows: Rows | None,
        total_counts: torch.Tensor | None,
        timeout: float | None,
        num_sms: int | None,
        tokens_wanted: int = 0,
    ) -> None:
        """Launches one phase; arguments are checked already. `numbers`: of an earlier plan when only moving rows, else
        to be filled; `rows`: None when only planning; `tokens_wanted`: too many, so that none is sent and every rank is
        told.
        """
        self._order.follow("dispatch")
        scales = None if rows is None else rows.scales
        self._kernel(phase, num_sms)(
            x.data_ptr(),
            address(x_scales),
            address(topk_idx),
            address(topk_weights),
            *((0,) * 4 if rows is None else map(address, (rows.tokens, scales, rows.topk_idx, rows.topk_weights))),
            numbers.address("counts"),
            address(total_counts),
            numbers.address("first_slots"),
            numbers.address("source_counts"),
            *numbers.addresses,
            address(num_tokens),
            x.stride(0) * x.element_size(),
            *((0, 0) if scales is None or scales.dim() != 2 else scales.stride()),
            x.shape[0],
            0 if rows is None else rows.number,
            topk_idx is not None and topk_idx.dtype == torch.int64,
            tokens_wanted,
            self._nanoseconds(timeout),
        )

    def combine(
        self,
        y: torch.Tensor,
        handle: RowsHandle,
        y_weights: torch.Tensor | None,
        bias: Sequence[torch.Tensor],
        out: torch.Tensor,
        out_weights: torch.Tensor | None,
        weighted: bool,
        timeout: float | None,
        num_sms: int | None,
    ) -> None:
        """Launches combine; arguments are checked already."""
        addresses = list(handle.addresses)
        if not weighted:
            addresses[OF_HANDLE.index("row_weights")] = 0
        if handle.stream != current_stream(y.device):  # the handle may be dropped before this stream has read it
            record(y.device, (handle.memory,))
        self._order.follow("combine")
        first, second = (*bias, None, None)[:2]
        self._kernel("combine", num_sms)(
            y.data_ptr(),
            address(y_weights),
            address(first),
            address(second),
            out.data_ptr(),
            address(out_weights),
            *addresses,
            handle.num_tokens,
            handle.rows,
            self._nanoseconds(timeout),
            # Layout `token` adds rows up without weights, whatever is said.
            pack("ht_combine", weighted and self.problem.layout == "packed", y_weights is not None),
        )

    def _nanoseconds(self, timeout: float | None) -> int:
        """Of this call's timeout; a report of an expired wait names the last call's."""
        self._watchdog.timeout = seconds = self._timeout if timeout is None else timeout
        return int(seconds * 1e9)

    def raise_unplanned(self) -> None:
        """What keeps the ranks from moving rows by the plan that they have just made."""
        self.raise_expired()

    def raise_expired(self) -> None:
        self._watchdog.raise_expired()

    def raise_what_happened(self) -> None:
        self._watchdog.raise_what_happened()
        self.layout.raise_what_happened()
