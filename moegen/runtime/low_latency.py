# SPDX-License-Identifier: Apache-2.0
"""Family `ll` at run time: its symmetric buffer, its control words and its launches, for one rank."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegen.handle import Dispatched, Handle
from moegen.kernels.ll import PHASES, LowLatencySpec, num_blocks, regions
from moegen.kernels.problem import Problem
from moegen.runtime.bound import BoundKernel
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.memory import SymmetricMemory
from moegen.runtime.watchdog import Watchdog
from moegen.runtime.worlds import RankWorld
from moegen.select import Selection

log = logging.getLogger(__name__)

FIRST_EPOCH = 2
"""See `epoch_after` in `templates/device/signal.cuh`."""
_CONTROL_WORDS = 32
"""32-bit words per op: struct Control, on a 128-byte line of its own; a third line holds the abort word."""

_DISPATCH_VARYING = (
    "x",
    "topk_idx",
    "topk_weights",
    "num_tokens",
    "out",
    "counts",
    "ranges",
    "token_ranks",
    "rows_received",
    "row_origin",
    "row_slots",
    "row_weights",
    "tokens_sent",
    "x_stride",
    "tokens",
    "wide_ids",
)
_COMBINE_VARYING = (
    "y",
    "out",
    "topk_weights",
    "rows_received",
    "row_origin",
    "row_slots",
    "row_weights",
    "token_ranks",
    "num_tokens",
    "tokens",
)


@dataclass(frozen=True)
class MetadataLayout:
    """Where the int32 results of a dispatch lie in their one allocation, in 32-bit words."""

    token_ranks: int
    counts: int
    ranges: int
    rows_received: int
    row_origin: int
    row_slots: int
    row_weights: int
    tokens_sent: int
    words: int

    @staticmethod
    def of(problem: Problem, local_experts: int) -> MetadataLayout:
        rows = problem.num_ranks * problem.max_tokens
        sizes = (
            2 * problem.max_tokens,  # first: 64-bit masks
            local_experts,
            local_experts * problem.num_ranks * 2,
            1,
            rows,
            rows * problem.num_topk,
            rows * problem.num_topk,
            1,
        )
        offsets = [sum(sizes[:index]) for index in range(len(sizes) + 1)]
        return MetadataLayout(*offsets)


class LowLatency:
    """One rank's dispatch and combine. Collective to make; the kernels are loaded already."""

    def __init__(
        self,
        world: RankWorld,
        problem: Problem,
        selection: Selection,
        kernels: Sequence[LoadedKernel],
        *,
        timeout: float,
        num_sms: int | None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        self.problem = problem
        self.local_experts = len(problem.local_experts(world.rank))
        self.expert_rows = problem.num_ranks * problem.max_tokens
        self._metadata = MetadataLayout.of(problem, self.local_experts)
        dispatch_at = regions(selection.dispatch, problem.max_tokens, 0)
        combine_at = regions(selection.combine, problem.max_tokens, dispatch_at.end)
        self.buffer_bytes = combine_at.end
        log.info("rank %d allocates %s bytes of symmetric memory", world.rank, f"{self.buffer_bytes:,}")
        self.memory: SymmetricMemory = world.allocate(self.buffer_bytes)
        pinned = world.device.type == "cuda"
        self.control = torch.zeros(3, _CONTROL_WORDS, dtype=torch.int32, device=world.device)
        self.watchdogs = tuple(Watchdog(spec.stem, PHASES, timeout, pinned=pinned) for spec in selection.specs)
        self._set_epoch(first_epoch, (dispatch_at.consumed, combine_at.consumed))
        blocks = [self._num_blocks(world, kernel, num_sms) for kernel in kernels]
        shared: dict[str, int | Sequence[int]] = {
            "peers": self.memory.peers,
            "rank": world.rank,
            "aborted": self.control[2].data_ptr(),
            "max_tokens": problem.max_tokens,
            "timeout_ns": int(timeout * 1e9),
        }
        dispatch_fixed: dict[str, int | Sequence[int]] = {
            **shared,
            "control": self.control[0].data_ptr(),
            "failure": self.watchdogs[0].address,
            "consumed_offset": dispatch_at.consumed,
            "counts_offset": dispatch_at.counts,
            "rows_offset": dispatch_at.rows,
            "tags_offset": dispatch_at.tags,
        }
        combine_fixed: dict[str, int | Sequence[int]] = {
            **shared,
            "control": self.control[1].data_ptr(),
            "consumed_offset": combine_at.consumed,
            "rows_offset": combine_at.rows,
            "tags_offset": combine_at.tags,
            "weights_offset": combine_at.weights,
        }
        specs = selection.specs
        self._dispatch = BoundKernel(kernels[0], specs[0].params, blocks[0], dispatch_fixed, _DISPATCH_VARYING)
        self._combine, self._combine_weighted = (
            BoundKernel(
                kernels[index],
                specs[index].params,
                blocks[index],
                {**combine_fixed, "failure": self.watchdogs[index].address},
                _COMBINE_VARYING,
            )
            for index in (1, 2)
        )

    def _set_epoch(self, epoch: int, consumed_at: tuple[int, int]) -> None:
        """As if everybody had read all epochs before; before any rank may launch."""
        before = 0xFFFFFFFF if epoch == FIRST_EPOCH else epoch - 1
        self.control[:2, 0] = _signed(epoch)
        words = self.memory.local.view(torch.int32)
        for offset in consumed_at:
            words[offset // 4 : offset // 4 + self.problem.num_ranks] = _signed(before)

    def _num_blocks(self, world: RankWorld, kernel: LoadedKernel, num_sms: int | None) -> int:
        assert isinstance(kernel.spec, LowLatencySpec)
        return num_blocks(kernel.spec, self.problem.max_tokens, kernel.blocks(world.ranks_per_device, num_sms))

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        num_tokens: torch.Tensor | None,
        out: torch.Tensor | None,
        owner: object,
    ) -> Dispatched:
        """Launches dispatch; arguments are checked already."""
        at = self._metadata
        if out is None:
            out = x.new_empty(self.local_experts, self.expert_rows, self.problem.hidden)
        memory = torch.empty(at.words, dtype=torch.int32, device=x.device)
        base = memory.data_ptr()
        addresses = (
            base + 4 * at.rows_received,
            base + 4 * at.row_origin,
            base + 4 * at.row_slots,
            base + 4 * at.row_weights,
            base + 4 * at.token_ranks,
            base + 4 * at.tokens_sent,
        )
        rows_received, row_origin, row_slots, row_weights, token_ranks, tokens_sent = addresses
        self._dispatch(
            x.data_ptr(),
            topk_idx.data_ptr(),
            0 if topk_weights is None else topk_weights.data_ptr(),
            0 if num_tokens is None else num_tokens.data_ptr(),
            out.data_ptr(),
            base + 4 * at.counts,
            base + 4 * at.ranges,
            token_ranks,
            rows_received,
            row_origin,
            row_slots,
            row_weights,
            tokens_sent,
            x.stride(0) * x.element_size(),
            x.shape[0],
            topk_idx.dtype == torch.int64,
        )
        stream = torch.cuda.current_stream(x.device) if x.device.type == "cuda" else None
        ranks = self.problem.num_ranks
        counts = memory.as_strided((self.local_experts,), (1,), at.counts)
        ranges = memory.as_strided((self.local_experts, ranks, 2), (2 * ranks, 2, 1), at.ranges)
        return Dispatched(out, None, counts, ranges, Handle(owner, x.shape[0], memory, addresses, stream))

    def combine(self, y: torch.Tensor, handle: Handle, weights: torch.Tensor | None, out: torch.Tensor) -> None:
        """Launches combine; arguments are checked already."""
        if handle.stream is not None:
            current = torch.cuda.current_stream(y.device)
            if current != handle.stream:  # the handle may be dropped before this stream has read it
                handle.memory.record_stream(current)
        rows_received, row_origin, row_slots, row_weights, token_ranks, tokens_sent = handle.addresses
        kernel = self._combine if weights is None else self._combine_weighted
        kernel(
            y.data_ptr(),
            out.data_ptr(),
            0 if weights is None else weights.data_ptr(),
            rows_received,
            row_origin,
            row_slots,
            row_weights,
            token_ranks,
            tokens_sent,
            handle.num_tokens,
        )

    def raise_what_happened(self) -> None:
        for watchdog in self.watchdogs:
            watchdog.raise_what_happened()


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
