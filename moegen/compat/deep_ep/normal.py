# SPDX-License-Identifier: Apache-2.0
"""DeepEP's normal mode: `get_dispatch_layout`, `dispatch`, `combine`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch

from moegen import admission, checks
from moegen.compat.deep_ep.config import Config
from moegen.compat.deep_ep.normal_handle import NormalHandle
from moegen.compat.deep_ep.streams import Streams
from moegen.compat.deep_ep.utils import EventOverlap
from moegen.compat.low_latency import Layers
from moegen.compat.rows import RowLayers, Shape, rounded_up
from moegen.errors import HandleError, InputError
from moegen.rows import DispatchedRows, Given, Layout
from moegen.runtime.ownership import Exclusive, exclusive

Tensor = torch.Tensor
Tokens = Tensor | Given
NODE_RANKS = 8
"""Ranks of one of DeepEP's nodes."""


class NormalMode(Exclusive):
    """The part of `Buffer` that sends many tokens.

    Results are those of DeepEP: rows by source rank and then by the source's token, plain sums. Where ranks do not
    divide into nodes of 8 these calls work all the same: all ranks are taken to map each other's memory.

    Attributes:
        max_tokens_per_rank: moegen's own; DeepEP has no such limit. 0: room for as many tokens as any rank has in the
            first call of a shape, rounded up to a power of two; a later call that needs more makes room, on all ranks,
            if it waits for the host (that is, without num_worst_tokens). Set it to the same number on all ranks to
            have that much room from the next call on, and with num_worst_tokens.
    """

    group: Any
    group_size: int
    num_sms: int
    timeout: float
    max_tokens_per_rank: int = 0
    _layers: Layers

    @cached_property
    def _row_layers(self) -> dict[torch.device, RowLayers]:
        return {}

    def _rows(self, device: torch.device) -> RowLayers:
        """The objects for tensors that are there."""
        if device not in self._row_layers:
            self._row_layers[device] = RowLayers(self.group, device)
        self._row_layers[device].timeout = self.timeout
        return self._row_layers[device]

    def _destroy_rows(self) -> None:
        for rows in self._row_layers.values():
            rows.destroy()
        self._row_layers.clear()

    def get_comm_stream(self) -> Any:
        """The stream of asynchronous calls; None on a CPU, where a call is over when it returns."""
        return self._rows(self._layers.device).comm.stream

    @exclusive
    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Counts where this rank's tokens go. Only this rank calls it.

        Args:
            topk_idx: int64 (or int32) [T, topk], -1 for no selection.
            previous_event, async_finish, allocate_on_comm_stream: as in `dispatch`.

        Returns:
            num_tokens_per_rank: int32 [ranks];
            num_tokens_per_rdma_rank: int32 [ranks / 8] where DeepEP would cross nodes, else None;
            num_tokens_per_expert: int32 [experts];
            is_token_in_rank: bool [T, ranks];
            event.

        Raises:
            InputError: arguments that do not fit.
        """
        if topk_idx.dim() != 2:
            raise InputError(f"topk_idx is [tokens, topk]; got {list(topk_idx.shape)}")
        num_experts = self._check_experts(num_experts)
        rows = self._rows(topk_idx.device)
        call = partial(rows.counts(topk_idx.shape[1], num_experts), topk_idx)
        streams = _streams(previous_event, async_finish, allocate_on_comm_stream)
        layout, event = streams.call(rows.comm, (topk_idx,), call, _tensors_of_layout)
        per_node = None
        if self.group_size > NODE_RANKS and self.group_size % NODE_RANKS == 0:
            nodes = layout.token_in_rank.view(-1, self.group_size // NODE_RANKS, NODE_RANKS).any(dim=2)
            per_node = nodes.sum(dim=0, dtype=torch.int32)
        return layout.tokens_per_rank, per_node, layout.tokens_per_expert, layout.token_in_rank, event

    @exclusive
    def dispatch(
        self,
        x: Tokens,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tokens, Tensor | None, Tensor | None, list[int] | None, tuple[Any, ...] | None, EventOverlap]:
        """Sends tokens to the ranks that hold their experts.

        Args:
            x: bfloat16 [T, hidden], or (float8_e4m3fn [T, hidden], scales [T, hidden / 128] float32 or [T, hidden /
                512] int32, of any strides).
            handle: of an earlier dispatch, in place of all routing: the same rows come. Tokens may be of another dtype
                or length then.
            num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: of `get_dispatch_layout`. With topk_idx only
                their shapes matter: moegen counts again. Without, is_token_in_rank is the routing.
            num_tokens_per_rdma_rank: not looked at.
            topk_idx, topk_weights: int64 (or int32) and float32 [T, topk]; both or neither.
            expert_alignment: the numbers of the list are rounded up to multiples of it; rows are not.
            num_worst_tokens: rows of the result, so that nothing waits for the host; needs topk_idx. If more come, the
                next call raises CapacityError.
            config: its num_sms counts: thread blocks at most; None: `Buffer.num_sms`.
            previous_event: what the call waits for, in place of what is on the current stream.
            async_finish: run on the communication stream, for whose end the event stands.
            allocate_on_comm_stream: needs the two before it, as in DeepEP. Results of asynchronous calls are made on
                that stream in any case, and the event makes them safe on the stream that waits.

        Returns:
            recv_x: [n, hidden], or with its scales, contiguous;
            recv_topk_idx: int64 [n, topk] local expert or -1, or None;
            recv_topk_weights: float32 [n, topk], 0 where that is -1, or None;
            num_recv_tokens_per_expert_list: [] with num_worst_tokens;
            handle; event. With a handle given, all but the first and the last are None.

        Raises:
            InputError, HandleError: arguments that do not fit; nothing was launched.
            CapacityError: see max_tokens_per_rank.
        """
        streams = _streams(previous_event, async_finish, allocate_on_comm_stream)
        num_sms = self.num_sms if config is None else config.num_sms
        parts = x if isinstance(x, tuple) else (x,)
        rows = self._rows(parts[0].device)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise InputError("dispatch takes a handle or topk_idx and topk_weights: the handle has its routing")
            given = own(handle)
            call = partial(self._again, rows, x, given, num_sms)
            received, event = streams.call(rows.comm, parts, call, _tensors_of_rows)
            return _tokens(received), None, None, None, None, event
        if num_tokens_per_rank is None or is_token_in_rank is None or num_tokens_per_expert is None:
            raise InputError(
                "dispatch takes what get_dispatch_layout returned (num_tokens_per_rank, is_token_in_rank, "
                "num_tokens_per_expert), or the handle of an earlier dispatch"
            )
        if (topk_idx is None) != (topk_weights is None):
            raise InputError("topk_idx and topk_weights are given together, or neither is")
        num_experts = self._check_experts(num_tokens_per_expert.numel())
        expert_alignment = checks.in_range("expert_alignment", expert_alignment, 1, 2**31 - 1)
        num_worst_tokens = checks.in_range("num_worst_tokens", num_worst_tokens, 0, 2**31 - 1)
        if num_worst_tokens > 0 and topk_idx is None:
            raise InputError("num_worst_tokens needs topk_idx: rows that nothing came for are marked there")
        if is_token_in_rank.shape != (len(parts[0]), self.group_size):
            got = list(is_token_in_rank.shape)
            raise InputError(f"is_token_in_rank is [{len(parts[0])}, {self.group_size}]; got {got}")
        if is_token_in_rank.dtype != torch.bool:
            raise InputError(f"is_token_in_rank is torch.bool; got {is_token_in_rank.dtype}")
        is_token_in_rank = admission.read("is_token_in_rank", is_token_in_rank)
        num_tokens_per_expert = admission.read("num_tokens_per_expert", num_tokens_per_expert)
        topk = self.group_size if topk_idx is None else topk_idx.shape[-1]
        shape = Shape(0, topk, num_experts).of(x)
        routing = (is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights)
        fresh = partial(self._fresh, rows, x, shape, *routing, num_worst_tokens, num_sms)
        (received, counts), event = streams.call(rows.comm, (*parts, *routing), fresh, _tensors_of_fresh)
        made = NormalHandle.of(shape, received.handle, num_sms, is_token_in_rank)
        selections = (None, None) if topk_idx is None else (received.topk_idx, received.topk_weights)
        return _tokens(received), *selections, rounded_up(counts, expert_alignment), made, event

    def _fresh(
        self,
        rows: RowLayers,
        x: Tokens,
        shape: Shape,
        is_token_in_rank: Tensor,
        per_expert: Tensor,
        ids: Tensor | None,
        weights: Tensor | None,
        num_worst_tokens: int,
        num_sms: int,
    ) -> tuple[DispatchedRows, list[int]]:
        """What came, and how many rows select each of this rank's experts, if the host knows."""
        options: dict[str, Any] = {"num_sms": num_sms, "timeout": self.timeout, "mode": "exact"}
        tokens = len(x[0] if isinstance(x, tuple) else x)
        if num_worst_tokens > 0:
            options |= {"mode": "capacity", "max_rows": num_worst_tokens}
            tokens = max(tokens, num_worst_tokens // self.group_size)
        selected = self._an_expert_of_each_rank(is_token_in_rank, shape) if ids is None else ids
        received = rows.dispatch(shape, tokens, self.max_tokens_per_rank, x, selected, weights, **options)
        if ids is None:  # who selects which expert is in no message
            share = shape.num_experts // self.group_size
            first = rows.world.rank * share
            everywhere = rows.world.exchange(per_expert.tolist())
            return received, [sum(of[first + local] for of in everywhere) for local in range(share)]
        return received, received.host_counts or []

    def _an_expert_of_each_rank(self, is_token_in_rank: Tensor, shape: Shape) -> Tensor:
        """Ids that route as is_token_in_rank says: int64 [T, ranks]."""
        share = shape.num_experts // self.group_size
        first = torch.arange(0, shape.num_experts, share, dtype=torch.int64, device=is_token_in_rank.device)
        return torch.where(is_token_in_rank, first, -1)

    def _again(self, rows: RowLayers, x: Tokens, handle: NormalHandle, num_sms: int) -> DispatchedRows:
        layer, received = rows.for_handle(handle.shape.of(x), handle.received)
        return layer.dispatch(x, handle=received, num_sms=num_sms, timeout=self.timeout)

    @exclusive
    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Brings rows back: each token's plain sum over the ranks, in fp32 and in their order.

        Args:
            x: bfloat16 [n, hidden], rows where dispatch put them.
            handle: that dispatch returned, itself.
            topk_weights: float32 [n, topk], added up likewise. Not after a dispatch without topk_idx.
            bias: one or two tensors bfloat16 [T, hidden] that are added.
            config, previous_event, async_finish, allocate_on_comm_stream: as in `dispatch`.

        Returns:
            combined_x: bfloat16 [T, hidden]; combined_topk_weights: float32 [T, topk], or None; event.

        Raises:
            InputError, HandleError: arguments that do not fit; nothing was launched.
        """
        streams = _streams(previous_event, async_finish, allocate_on_comm_stream)
        given = own(handle)
        num_sms = self.num_sms if config is None else config.num_sms
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        rows = self._rows(x.device)
        call = partial(self._sum, rows, x, given, topk_weights, biases, num_sms)
        (combined, weights), event = streams.call(rows.comm, (x, topk_weights, *biases), call, lambda sums: sums)
        return combined, weights, event

    def _sum(
        self,
        rows: RowLayers,
        x: Tensor,
        handle: NormalHandle,
        weights: Tensor | None,
        biases: tuple[Tensor, ...],
        num_sms: int,
    ) -> tuple[Tensor, Tensor | None]:
        layer, received = rows.for_sums(handle.shape.of(x), handle.received)
        return layer.combine(x, received, weights, bias=biases, num_sms=num_sms, timeout=self.timeout)

    def internode_dispatch(
        self,
        x: Tokens,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        raise NotImplementedError(_ONE_MACHINE.format("internode_dispatch", "dispatch"))

    def internode_combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        raise NotImplementedError(_ONE_MACHINE.format("internode_combine", "combine"))

    def _check_experts(self, num_experts: int) -> int:
        number = checks.integer("num_experts", num_experts)
        if number % self.group_size != 0:
            raise InputError(f"num_experts is a multiple of the {self.group_size} ranks; got {number}")
        return number


_ONE_MACHINE = "moegen.compat.deep_ep has no Buffer.{}: ranks map each other's memory; call {}"


def _streams(previous: EventOverlap | None, asynchronous: bool, allocate_on_comm_stream: bool) -> Streams:
    if allocate_on_comm_stream and (previous is None or not asynchronous):
        raise InputError("allocate_on_comm_stream needs previous_event and async_finish=True")
    return Streams(asynchronous, previous)


def own(handle: tuple[Any, ...]) -> NormalHandle:
    if not isinstance(handle, NormalHandle):
        raise HandleError("the handle is the tuple that dispatch returned, itself: a copy cannot be used")
    return handle


def _tokens(received: DispatchedRows) -> Tokens:
    return received.tokens if received.scales is None else (received.tokens, received.scales)


def _tensors_of_layout(layout: Layout) -> Sequence[Tensor | None]:
    return (layout.tokens_per_rank, layout.token_in_rank)


def _tensors_of_rows(received: DispatchedRows) -> Sequence[Tensor | None]:
    return received.allocations


def _tensors_of_fresh(result: tuple[DispatchedRows, list[int]]) -> Sequence[Tensor | None]:
    return result[0].allocations
