# SPDX-License-Identifier: Apache-2.0
"""DeepEP's `Buffer`: its constructor, attributes and low-latency calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moegen.compat.deep_ep.config import Config, combine_config, dispatch_config, low_latency_size_hint
from moegen.compat.deep_ep.utils import EventHandle, EventOverlap
from moegen.compat.low_latency import IN_FLIGHT, Layers, mode, unpacked
from moegen.errors import HandleError, InputError
from moegen.expert_parallel import ExpertParallel
from moegen.handle import Dispatched

Tensor = torch.Tensor
Hook = Callable[[], None]


class LowLatencyHandle(tuple[Any, ...]):
    """DeepEP's five elements: src_info int32 [local experts, ranks * max tokens] (the source's token of each row),
    layout_range int64 [local experts, ranks] (first row << 32 | rows), max tokens, hidden, num_experts.

    Attributes:
        owner, received: what moegen's combine needs.
    """

    owner: ExpertParallel
    received: Dispatched

    @staticmethod
    def of(owner: ExpertParallel, received: Dispatched) -> LowLatencyHandle:
        problem = owner.problem
        ranges = received.ranges.view(torch.int64).squeeze(2)
        elements = (received.row_tokens, ranges, problem.max_tokens, problem.hidden, problem.num_experts)
        handle = LowLatencyHandle(elements)
        handle.owner, handle.received = owner, received
        return handle


class Buffer:
    """DeepEP's communication buffer. Its sizes are kept and not used: moegen allocates what the shapes of the calls
    need, when a shape is first seen; that first call is collective and compiles.

    Args:
        group: a torch process group (gloo or nccl); or the rank_world that `LocalWorld.run` gives.
        num_nvl_bytes, num_rdma_bytes, num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl,
            explicitly_destroy: kept as attributes or ignored.
        low_latency_mode: kept as an attribute; the low-latency calls work either way.
        enable_shrink, comm: not supported.

    Raises:
        NotImplementedError: enable_shrink or comm.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        if enable_shrink:
            raise _missing("Buffer(enable_shrink=True)")
        if comm is not None:
            raise _missing("Buffer(comm=...)")
        self.group = group
        self._layers = Layers(group)
        self.rank, self.group_size = self._layers.rank, self._layers.size
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._combine_buffers: dict[int, list[Tensor]] = {}
        self._combines = 0

    def destroy(self) -> None:
        """Gives all memory back. Not collective."""
        self._layers.destroy()
        self._combine_buffers.clear()

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """For the normal mode; even, as in DeepEP."""
        if new_num_sms % 2 != 0:
            raise InputError(f"the number of multiprocessors is even; got {new_num_sms}")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return dispatch_config(Buffer.num_sms, num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return combine_config(Buffer.num_sms, num_ranks)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """DeepEP's number of bytes; `buffer_bytes` of an ExpertParallel is what moegen takes."""
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to clean: what announces data carries the number of its call."""

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Sends tokens to their experts.

        Args:
            x: bfloat16 [T, hidden], T <= num_max_dispatch_tokens_per_rank.
            topk_idx: int64 (or int32) [T, topk], -1 for no selection.
            cumulative_local_expert_recv_stats: int32 [local experts], to which the counts are added.
            use_fp8: e4m3 with float32 scales per 128 elements; hidden is a multiple of 128.
            round_scale: scales are powers of two.
            use_ue8m0: their exponents, four to an int32; needs round_scale and a hidden of a multiple of 512.
            async_finish, return_recv_hook: as in DeepEP; at most one of them.

        Returns:
            received: [local experts, ranks * max tokens, hidden], with FP8 a pair with the scales [..., hidden / 128]
                float32 or [..., hidden / 512] int32, whose rows lie side by side in memory;
            counts: int32 [local experts];
            handle, event, hook (None unless asked for).

        Raises:
            InputError: arguments that do not fit; NotImplementedError: dispatch_wait_recv_cost_stats.
        """
        if dispatch_wait_recv_cost_stats is not None:
            raise _missing("low_latency_dispatch(dispatch_wait_recv_cost_stats=...)")
        quantize = _quantize(use_fp8, round_scale, use_ue8m0)
        layer = self._layers.get(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, quantize)
        answer = layer.dispatch(
            x,
            topk_idx,
            total_counts=cumulative_local_expert_recv_stats,
            **mode(async_finish, return_recv_hook),
        )
        received, event, hook = _unpacked(answer, async_finish, return_recv_hook)
        tokens = received.tokens if received.scales is None else (received.tokens, received.scales)
        return tokens, received.counts, LowLatencyHandle.of(layer, received), event, hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Brings the experts' outputs back: per token the sum of weight * output.

        Args:
            x: bfloat16 [local experts, ranks * max tokens, hidden].
            topk_idx: that of the dispatch; only its shape is looked at.
            topk_weights: float32 [T, topk].
            handle: of the dispatch, as it was returned.
            use_logfmt: taken and not needed: sums cross the link as bfloat16, one per token and rank.
            zero_copy: `x` is what `get_next_low_latency_combine_buffer` gave. Where peers' memory is mapped nothing is
                copied in either case, so it saves nothing.
            async_finish, return_recv_hook, out: as in DeepEP.

        Raises:
            HandleError: `handle` is not what low_latency_dispatch returned.
            InputError: arguments that do not fit; NotImplementedError: combine_wait_recv_cost_stats.
        """
        if combine_wait_recv_cost_stats is not None:
            raise _missing("low_latency_combine(combine_wait_recv_cost_stats=...)")
        given = _own(handle)
        if topk_idx.shape != topk_weights.shape:
            raise InputError(f"topk_idx and topk_weights differ: {list(topk_idx.shape)}, {list(topk_weights.shape)}")
        self._combines += 1
        answer = given.owner.combine(
            x, given.received.handle, topk_weights, out=out, **mode(async_finish, return_recv_hook)
        )
        return _unpacked(answer, async_finish, return_recv_hook)

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> Tensor:
        """A bfloat16 tensor [local experts, ranks * max tokens, hidden] for the `x` of the next combine: one of two per
        shape, which take turns with the combines, as in DeepEP.
        """
        owner = _own(handle).owner
        buffers = self._combine_buffers.get(id(owner))
        if buffers is None:
            shape = owner._alive().received.tokens_shape
            made = [torch.empty(shape, dtype=owner.dtype, device=owner.device) for _ in range(IN_FLIGHT)]
            buffers = self._combine_buffers[id(owner)] = made
        return buffers[self._combines % IN_FLIGHT]

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        raise _missing("low_latency_update_mask_buffer")

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        raise _missing("low_latency_query_mask_buffer")

    def low_latency_clean_mask_buffer(self) -> None:
        raise _missing("low_latency_clean_mask_buffer")


def _quantize(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> str | None:
    if use_ue8m0 and not (round_scale and use_fp8):
        raise InputError("use_ue8m0 needs use_fp8 and round_scale: UE8M0 holds powers of two")
    if not use_fp8:
        return None
    return "fp8_ue8m0" if use_ue8m0 else "fp8_pow2" if round_scale else "fp8"


def _unpacked(answer: Any, async_finish: bool, return_recv_hook: bool) -> tuple[Any, EventOverlap, Hook | None]:
    """Moegen's result, with DeepEP's event and hook."""
    result, event, hook = unpacked(answer, async_finish, return_recv_hook)
    return result, EventOverlap(None if event is None else _Waits(event)), hook


class _Waits:
    """moegen's event under DeepEP's name for waiting."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def current_stream_wait(self) -> None:
        self._event.wait()


def _own(handle: tuple[Any, ...]) -> LowLatencyHandle:
    if not isinstance(handle, LowLatencyHandle):
        raise HandleError("the handle is the tuple that low_latency_dispatch returned, itself: a copy cannot be used")
    return handle


def _missing(what: str) -> NotImplementedError:
    return NotImplementedError(f"moegen.compat.deep_ep has no {what} yet")
