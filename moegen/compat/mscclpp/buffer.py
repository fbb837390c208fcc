# SPDX-License-Identifier: Apache-2.0
"""MSCCL++ EP's `Buffer`: its constructor and low-latency calls; `Intranode` has the others."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from moegen import checks
from moegen.compat.deep_ep.config import low_latency_size_hint
from moegen.compat.low_latency import Layers, RoutedIds, mode, unpacked
from moegen.compat.mscclpp.intranode import Intranode
from moegen.errors import HandleError
from moegen.expert_parallel import ExpertParallel
from moegen.handle import Dispatched
from moegen.runtime.ownership import exclusive

Tensor = torch.Tensor
Hook = Callable[[], None]


class Buffer(Intranode):
    """MSCCL++ EP's communication buffer; its sizes are kept and not used.

    Args:
        group: a torch process group (gloo or nccl); or the rank_world that `LocalWorld.run` gives.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode: kept as attributes.
        num_qps_per_rank: ignored, as there.
    """

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 12,
    ) -> None:
        self._layers = Layers(group)
        self.group = group
        self.rank, self.group_size = self._layers.rank, self._layers.size
        self.num_nvl_bytes = checks.integer("num_nvl_bytes", num_nvl_bytes)
        self.num_rdma_bytes = checks.integer("num_rdma_bytes", num_rdma_bytes)
        self.low_latency_mode = low_latency_mode
        self._dispatched: dict[int, tuple[weakref.ref[Tensor], ExpertParallel, Dispatched, RoutedIds]] = {}
        """By the address of layout_range, as long as that tensor lives."""

    @exclusive
    def destroy(self) -> None:
        """Gives all memory back. Not collective."""
        self._layers.destroy()
        self._destroy_rows()
        self._dispatched.clear()

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes by DeepEP's formula, which MSCCL++ EP follows."""
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to clean: what announces data carries the number of its call."""

    @exclusive
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool,
        async_finish: bool,
        return_recv_hook: bool,
        out_packed_recv_x: Tensor | None = None,
        out_packed_recv_x_scales: Tensor | None = None,
        out_packed_recv_src_info: Tensor | None = None,
        out_packed_recv_layout_range: Tensor | None = None,
        out_packed_recv_count: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Any, Hook | None]:
        """Sends tokens to their experts.

        Args:
            x: bfloat16 [T, hidden]; topk_idx: int64 [T, topk].
            out_packed_recv_x: [local experts, ranks * max tokens, hidden], bfloat16 or float8_e4m3fn.
            out_packed_recv_x_scales: float32 [local experts, ranks * max tokens, hidden / 128], rows side by side.
            out_packed_recv_src_info: int32 [local experts, ranks * max tokens].
            out_packed_recv_layout_range: int64 [local experts, ranks].
            out_packed_recv_count: int32 [local experts].

        Returns:
            packed_recv_x, its scales (None without FP8), count, src_info, layout_range, event (None unless
            async_finish; it has `wait()`), hook (None unless asked for).

        Raises:
            InputError: arguments that do not fit.
        """
        quantize = "fp8" if use_fp8 else None
        layer = self._layers.get(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, quantize)
        ranges = out_packed_recv_layout_range
        if ranges is None:
            shape = (num_experts // self.group_size, self.group_size)
            ranges = torch.empty(shape, dtype=torch.int64, device=x.device)
        out = layer.allocate(
            tokens=out_packed_recv_x,
            scales=out_packed_recv_x_scales,
            counts=out_packed_recv_count,
            ranges=ranges.view(torch.int32).reshape(*ranges.shape, 2),
            row_tokens=out_packed_recv_src_info,
        )
        answer = layer.dispatch(x, topk_idx, out=out, **mode(async_finish, return_recv_hook))
        received, event, hook = unpacked(answer, async_finish, return_recv_hook)
        self._remember(ranges, layer, received, topk_idx)
        return received.tokens, received.scales, received.counts, received.row_tokens, ranges, event, hook

    @exclusive
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        src_info: Tensor,
        layout_range: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        zero_copy: bool,
        async_finish: bool,
        return_recv_hook: bool,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Any, Hook | None]:
        """Brings the experts' outputs back: per token the sum of weight * output, in fp32, rounded to bfloat16.

        Args:
            x: bfloat16 [local experts, ranks * max tokens, hidden].
            src_info, layout_range: the tensors that the dispatch returned.
            topk_idx: that of the dispatch, in which selections may have become -1 since: these are left out, with a
                weight of 0, so rows for them hold finite numbers. Anything else in it is not looked at.
            num_max_dispatch_tokens_per_rank, num_experts: follow from the dispatch.
            zero_copy: False. Nothing here gives the memory that MSCCL++ would read in place of `x`, and there is
                nothing to save: nothing is copied.

        Raises:
            NotImplementedError: zero_copy.
            HandleError: `layout_range` is not a dispatch's, or a later dispatch was given the same tensor.
        """
        if zero_copy:
            raise NotImplementedError("moegen.compat.mscclpp has no combine with zero_copy=True: give x, and False")
        kept = self._dispatched.get(layout_range.data_ptr())
        if kept is None or kept[0]() is None:
            raise HandleError("layout_range is the tensor that low_latency_dispatch returned, not a copy of it")
        _, layer, received, routed = kept
        weights = routed.weights_of(topk_idx, topk_weights)
        answer = layer.combine(x, received.handle, weights, out=out, **mode(async_finish, return_recv_hook))
        combined, event, hook = unpacked(answer, async_finish, return_recv_hook)
        return combined, event, hook

    def _remember(self, ranges: Tensor, layer: ExpertParallel, received: Dispatched, topk_idx: Tensor) -> None:
        self._dispatched = {at: kept for at, kept in self._dispatched.items() if kept[0]() is not None}
        self._dispatched[ranges.data_ptr()] = (weakref.ref(ranges), layer, received, RoutedIds(topk_idx))
