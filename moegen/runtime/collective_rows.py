# SPDX-License-Identifier: Apache-2.0
"""Family `coll` of layouts `token` and `packed` at run time: what `HighThroughputOps` does, by all-to-alls of
torch.distributed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moegen.kernels.call_words import pack
from moegen.kernels.ht import PHASE_WORDS
from moegen.kernels.ht_layout import HighThroughputLayout
from moegen.kernels.problem import Problem
from moegen.rows import RowsHandle
from moegen.runtime.bound import address
from moegen.runtime.chunk_exchange import ChunkExchange, of_combine, of_dispatch
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.layout import LayoutOp
from moegen.runtime.low_latency import FIRST_EPOCH
from moegen.runtime.row_memory import OF_HANDLE, Numbers, RowMemory, Rows
from moegen.runtime.streams import current_stream, record
from moegen.runtime.worlds import RankWorld
from moegen.select import CollectiveRowSelection

_SENT = ("token_ranks", "tokens_sent", "own_rows")
_CAME = ("first_rows", "row_tokens", "row_slots", "row_weights")


def _split(addresses: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a handle: what the owner of tokens keeps of them, and what is kept of the rows that came."""
    at = dict(zip(OF_HANDLE, addresses, strict=True))
    return tuple(at[name] for name in _SENT), tuple(at[name] for name in _CAME)


class CollectiveRows:
    """One rank's dispatch and combine. Collective to make; the kernels are loaded already."""

    def __init__(
        self,
        world: RankWorld,
        problem: Problem,
        selection: CollectiveRowSelection,
        kernels: Sequence[LoadedKernel],
        *,
        alignment: int,
        num_sms: int | None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        self.problem, self._selection = problem, selection
        self._of_phase = {
            phase: (selection.dispatch.in_phase(phase), selection.place.in_phase(phase)) for phase in PHASE_WORDS
        }
        self.row_memory = RowMemory(
            problem, selection.dispatch, len(problem.local_experts(world.rank)), alignment, world.device
        )
        exchanging = [kernel for kernel in kernels if not isinstance(kernel.spec, HighThroughputLayout)]
        self._exchange = ChunkExchange(
            world, problem, exchanging, alignment=alignment, num_sms=num_sms, first_epoch=first_epoch
        )
        counting = next(kernel for kernel in kernels if isinstance(kernel.spec, HighThroughputLayout))
        self.layout = LayoutOp(counting, world.device, world.ranks_per_device)
        self.memory, self.buffer_bytes = self._exchange.memory, self._exchange.buffer_bytes
        self.stages = self._exchange.stages

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
        """One exchange; arguments are checked already. `rows`: None when only planning; `tokens_wanted`: too many, so
        that none is sent and every rank is told. Rows of a plan that the host knows have the size that they need.
        """
        fill, place = self._of_phase[phase]
        sent, came = _split(numbers.addresses)
        given = (
            x.data_ptr(),
            *map(address, (x_scales, topk_idx, topk_weights)),
            *sent,
            address(num_tokens),
            x.stride(0) * x.element_size(),
            x.shape[0],
            tokens_wanted,
            topk_idx is not None and topk_idx.dtype == torch.int64,
        )
        results = (
            *((0, 0) if rows is None else (rows.tokens.data_ptr(), address(rows.scales))),
            *self._of_layout(numbers, rows),
            numbers.address("counts"),
            address(total_counts),
            numbers.address("source_counts"),
            *came,
            *((0, 0) if rows is None or rows.scales is None else rows.scales.stride()),
            0 if rows is None else rows.number,
        )
        known = of_dispatch(numbers.sources, self._exchange.rank) if phase == "rows" else None
        self._exchange.call("plan" if phase == "plan" else "dispatch", (fill, given), (place, results), known, num_sms)

    def _of_layout(self, numbers: Numbers, rows: Rows | None) -> tuple[int, int]:
        """What only one of the layouts has."""
        weights = 0 if rows is None else address(rows.topk_weights)
        if self.problem.layout == "packed":
            return weights, numbers.address("first_slots")
        return 0 if rows is None else address(rows.topk_idx), weights

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
        """One exchange; arguments are checked already."""
        addresses = list(handle.addresses)
        if not weighted:
            addresses[OF_HANDLE.index("row_weights")] = 0
        if handle.stream != current_stream(y.device):  # the handle may be dropped before this stream has read it
            record(y.device, (handle.memory,))
        sent, came = _split(addresses)
        given = (y.data_ptr(), address(y_weights))
        word = pack("ht_combine", weighted and self.problem.layout == "packed", y_weights is not None)
        results = (*map(address, (*bias, None, None)[:2]), out.data_ptr(), address(out_weights))
        self._exchange.call(
            "combine",
            (self._selection.combine, (*given, *came, handle.rows, word)),
            (self._selection.reduce, (*given, *results, *sent, *came, handle.num_tokens, handle.rows, word)),
            of_combine(handle.numbers.sources, self._exchange.rank),
            num_sms,
        )

    def raise_unplanned(self) -> None:
        """Ranks whose plans belong to different calls cannot exchange rows; each of them knows."""
        self._exchange.raise_expired()
        self._exchange.raise_mismatched()

    def raise_expired(self) -> None:
        """Nothing here waits for a rank; torch.distributed does, and raises for itself. Headers are compared."""
        self._exchange.raise_expired()

    def raise_what_happened(self) -> None:
        self._exchange.raise_what_happened()
        self.layout.raise_what_happened()
