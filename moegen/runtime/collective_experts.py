# SPDX-License-Identifier: Apache-2.0
"""Family `coll` of layout `expert` at run time: what `LowLatency` does, by all-to-alls of torch.distributed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch

from moegen.admission import Span
from moegen.handle import Dispatched, Handle
from moegen.kernels.call_words import pack
from moegen.kernels.problem import Problem
from moegen.runtime.bound import address
from moegen.runtime.chunk_exchange import ChunkExchange
from moegen.runtime.halves import OpenHalf, OpenHalves
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.low_latency import FIRST_EPOCH
from moegen.runtime.received import Received
from moegen.runtime.streams import current_stream, record
from moegen.runtime.worlds import RankWorld
from moegen.select import WEIGHTS_OF_VECTOR, CollectiveSelection

_SENT, _CAME = slice(0, 3), slice(3, 7)
"""Of a handle's addresses (FOR_COLLECTIVE): what the owner of tokens keeps, and what is kept of the rows that came."""

_ROW_WEIGHTS = 3
"""Of the latter."""

_WORD = pack("ht_combine", 0, 0)
"""Call word of every combine: weights given to it are exchanged before."""


class CollectiveExperts:
    """One rank's dispatch and combine. Collective to make; the kernels are loaded already.

    A call is made at once; its hook only says so.
    """

    def __init__(
        self,
        world: RankWorld,
        problem: Problem,
        selection: CollectiveSelection,
        kernels: Sequence[LoadedKernel],
        *,
        slots: int,
        num_sms: int | None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        self._selection, self._world = selection, world
        self._size_for(problem)
        self._exchange = ChunkExchange(world, problem, kernels, num_sms=num_sms, first_epoch=first_epoch)
        self.memory, self.buffer_bytes = self._exchange.memory, self._exchange.buffer_bytes
        self.stages = self._exchange.stages
        self._halves = OpenHalves(slots)

    def _size_for(self, problem: Problem) -> None:
        self.problem = problem
        experts = len(problem.local_experts(self._world.rank))
        self.received = Received(problem, experts, self._world.device)
        self._arrivals = problem.num_ranks * problem.max_tokens
        self._expert_rows = experts * self._arrivals

    def for_fewer(self, max_tokens: int) -> CollectiveExperts:
        """The same memory for calls of at most so many tokens per rank; see `LowLatency.for_fewer`."""
        fewer = copy.copy(self)
        fewer._size_for(replace(self.problem, max_tokens=max_tokens))
        fewer._exchange = self._exchange.for_fewer(fewer.problem)
        return fewer

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        num_tokens: torch.Tensor | None,
        out: Dispatched,
        total_counts: torch.Tensor | None,
        hook: bool,
        timeout: float | None = None,
        waited: torch.Tensor | None = None,
    ) -> OpenHalf | None:
        """One exchange; arguments are checked already."""
        slot = self._halves.free_slot("dispatch")
        if out.handle.stream != current_stream(x.device):
            given = out.given
            record(x.device, (out.tokens, out.scales, out.handle.memory, given.counts, given.ranges, given.row_tokens))
        addresses = out.handle.addresses
        counts, ranges, row_tokens = self.received.user_addresses(out)
        inputs = (
            x.data_ptr(),
            0,
            topk_idx.data_ptr(),
            address(topk_weights),
            *addresses[_SENT],
            address(num_tokens),
            x.stride(0) * x.element_size(),
            x.shape[0],
            0,
            topk_idx.dtype == torch.int64,
        )
        results = (
            out.tokens.data_ptr(),
            address(out.scales),
            row_tokens,
            ranges,
            counts,
            address(total_counts),
            addresses[-1],
            *addresses[_CAME],
            self._expert_rows,
        )
        self._exchange.call("dispatch", (self._selection.dispatch, inputs), (self._selection.place, results))
        return self._halves.open(OpenHalf("dispatch", slot, addresses, ())) if hook else None

    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        weights: torch.Tensor | None,
        out: torch.Tensor,
        hook: bool,
        timeout: float | None = None,
        waited: torch.Tensor | None = None,
        renormalize: bool = False,
    ) -> OpenHalf | None:
        """One exchange, or two if weights come with it; arguments are checked already."""
        slot = self._halves.free_slot("combine")
        if handle.stream != current_stream(y.device):  # the handle may be dropped before this stream has read it
            record(y.device, (handle.memory,))
        sent, came = handle.addresses[_SENT], list(handle.addresses[_CAME])
        if weights is not None:
            of_rows = self._send_weights(weights, handle)
            came[_ROW_WEIGHTS] = of_rows.data_ptr()
        given = (y.data_ptr(), 0)
        results = (0, 0, out.data_ptr(), 0)
        self._exchange.call(
            "combine",
            (self._selection.combine, (*given, *came, self._expert_rows, _WORD)),
            (self._selection.reduce, (*given, *results, *sent, *came, handle.num_tokens, self._expert_rows, _WORD)),
        )
        return self._halves.open(OpenHalf("combine", slot, handle.addresses, ())) if hook else None

    def _send_weights(self, weights: torch.Tensor, handle: Handle) -> torch.Tensor:
        """The weights of every row that came, [rows, topk]: dispatched by the handle, like a token."""
        topk = self.problem.num_topk
        padded = torch.nn.functional.pad(weights, (0, -topk % WEIGHTS_OF_VECTOR))
        came = torch.empty(self._arrivals, padded.shape[1], dtype=torch.float32, device=weights.device)
        inputs = (padded.data_ptr(), 0, 0, 0, *handle.addresses[_SENT], 0, 4 * padded.shape[1], padded.shape[0], 0, 0)
        results = (came.data_ptr(), 0, 0, 0, 0, 0, 0, *handle.addresses[_CAME], 0, 0, self._arrivals)
        fill, place = self._selection.send_weights, self._selection.place_weights
        self._exchange.call("weights", (fill, inputs), (place, results))
        return came[:, :topk].contiguous()

    def receive(self, half: OpenHalf) -> None:
        """Everything was received with the first half."""
        self._halves.take(half)
        self._halves.close(half)

    @property
    def held(self) -> Sequence[Span]:
        """Memory that calls need whose hooks are open."""
        return self._halves.held

    def is_unfinished(self, handle: Handle) -> bool:
        """Whether the hook of the handle's dispatch is still open."""
        return self._halves.is_unfinished(handle.addresses[0])

    def raise_expired(self) -> None:
        """Nothing here waits for a rank; torch.distributed does, and raises for itself. Headers are compared."""
        self._exchange.raise_expired()

    def raise_what_happened(self) -> None:
        self._exchange.raise_what_happened()
