# SPDX-License-Identifier: Apache-2.0
"""MSCCL++ EP's intranode calls: DeepEP's normal mode, with the parts of the handle as results and arguments."""

from __future__ import annotations

import weakref
from functools import cached_property
from typing import Any

import torch

from moegen.compat.deep_ep.config import Config
from moegen.compat.deep_ep.normal import NormalMode
from moegen.compat.deep_ep.normal_handle import NormalHandle
from moegen.errors import HandleError, InputError
from moegen.runtime.ownership import Exclusive, exclusive

Tensor = torch.Tensor


class _Sender(NormalMode):
    """DeepEP's calls for one of MSCCL++'s buffers."""

    num_sms = 20
    timeout = 30.0

    def __init__(self, layers: Any, group: Any) -> None:
        self._layers, self.group, self.group_size = layers, group, layers.size


class Intranode(Exclusive):
    """The part of `Buffer` that sends many tokens within a machine.

    Handles are known by the address of their rank_prefix_matrix, as long as that tensor lives.
    """

    group: Any
    _layers: Any

    @cached_property
    def _sender(self) -> _Sender:
        return _Sender(self._layers, self.group)

    @cached_property
    def _routings(self) -> dict[int, tuple[weakref.ref[Tensor], NormalHandle]]:
        return {}

    @exclusive
    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Any]:
        """Counts where this rank's tokens go: int32 [ranks], None (or per node), int32 [experts], bool [T, ranks], and
        the event (None unless async_finish).
        """
        per_rank, per_node, per_expert, in_rank, event = self._sender.get_dispatch_layout(
            topk_idx, num_experts, previous_event, async_finish, allocate_on_comm_stream
        )
        return per_rank, per_node, per_expert, in_rank, _event(event)

    @exclusive
    def intranode_dispatch(
        self,
        x: Tensor,
        x_scales: Tensor | None,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_tokens_per_rank: Tensor | None,
        is_token_in_rank: Tensor,
        num_tokens_per_expert: Tensor | None,
        cached_num_recv_tokens: int,
        cached_rank_prefix_matrix: Tensor | None,
        cached_channel_prefix_matrix: Tensor | None,
        expert_alignment: int,
        config: Config,
        previous_event: Any,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> tuple[Any, ...]:
        """Sends tokens to the ranks that hold their experts; with a cached rank_prefix_matrix by an earlier routing.

        Args:
            x: bfloat16 [T, hidden], or float8_e4m3fn with x_scales [T, hidden / 128] float32.
            The others: as `moegen.compat.deep_ep.Buffer.dispatch`.

        Returns:
            recv_x, recv_x_scales, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list (each None or []
            where there is none), rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix, recv_src_idx,
            send_head, event (None unless async_finish).

        Raises:
            InputError, HandleError: arguments that do not fit.
        """
        given = x if x_scales is None else (x, x_scales)
        streams = (previous_event, async_finish, allocate_on_comm_stream)
        if cached_rank_prefix_matrix is not None:
            if topk_idx is not None or topk_weights is not None:
                raise InputError("a dispatch by a cached routing takes no topk_idx and no topk_weights")
            handle = self._routing(cached_rank_prefix_matrix)
            rows, *_, event = self._sender.dispatch(
                given, handle, None, None, None, None, None, None, 1, 0, config, *streams
            )
            matrices = (cached_rank_prefix_matrix, cached_channel_prefix_matrix, handle[2], handle[3], handle[5])
            return (*_pair(rows), None, None, [], *matrices, _event(event))
        rows, ids, weights, counts, made, event = self._sender.dispatch(
            given, None, num_tokens_per_rank, None, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights,
            expert_alignment, 0, config, *streams,
        )  # fmt: skip
        if async_finish:  # the matrices are made on this stream, from what the call leaves
            event.current_stream_wait()
        assert isinstance(made, NormalHandle)
        prefix, channels, received, src_idx, _, head = made
        self._keep(prefix, made)
        return (*_pair(rows), ids, weights, counts, prefix, channels, received, src_idx, head, _event(event))

    @exclusive
    def intranode_combine(
        self,
        x: Tensor,
        topk_weights: Tensor | None,
        src_idx: Tensor,
        rank_prefix_matrix: Tensor,
        recv_channel_prefix_matrix: Tensor,
        send_head: Tensor,
        config: Config,
        previous_event: Any,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Brings rows back: each token's plain sum over the ranks.

        Args:
            x: bfloat16 [n, hidden]; topk_weights: float32 [n, topk], added up likewise, or None.
            rank_prefix_matrix: the tensor that the dispatch returned; the other matrices follow from it.

        Returns:
            combined_x [T, hidden], combined_topk_weights [T, topk] or None, event (None unless async_finish).

        Raises:
            HandleError: rank_prefix_matrix is not a dispatch's.
        """
        handle = self._routing(rank_prefix_matrix)
        combined, weights, event = self._sender.combine(
            x, handle, topk_weights, None, config, previous_event, async_finish, allocate_on_comm_stream
        )
        return combined, weights, _event(event)

    def internode_dispatch(self, *args: Any) -> Any:
        raise NotImplementedError("moegen.compat.mscclpp has no internode_dispatch: ranks map each other's memory")

    def internode_combine(self, *args: Any) -> Any:
        raise NotImplementedError("moegen.compat.mscclpp has no internode_combine: ranks map each other's memory")

    def _routing(self, rank_prefix_matrix: Tensor) -> NormalHandle:
        kept = self._routings.get(rank_prefix_matrix.data_ptr())
        if kept is None or kept[0]() is None:
            raise HandleError("rank_prefix_matrix is the tensor that intranode_dispatch returned, not a copy of it")
        return kept[1]

    def _keep(self, prefix: Tensor, handle: NormalHandle) -> None:
        for at in [at for at, kept in self._routings.items() if kept[0]() is None]:
            del self._routings[at]
        handle.forget(0)  # else the matrix would live as long as the handle
        self._routings[prefix.data_ptr()] = (weakref.ref(prefix), handle)

    def _destroy_rows(self) -> None:
        self._sender._destroy_rows()
        self._routings.clear()


def _event(event: Any) -> Any:
    """The event itself, which has current_stream_wait(); None if the call is ordered already."""
    return event.event


def _pair(rows: Any) -> tuple[Tensor, Tensor | None]:
    return rows if isinstance(rows, tuple) else (rows, None)
