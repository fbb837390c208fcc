# SPDX-License-Identifier: Apache-2.0
"""DeepEP's `Buffer`: its constructor, attributes and low-latency calls; `NormalMode` has the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moegen import admission, checks
from moegen.compat.deep_ep.config import Config, combine_config, dispatch_config, low_latency_size_hint
from moegen.compat.deep_ep.local_memory import LocalMemory
from moegen.compat.deep_ep.normal import NormalMode
from moegen.compat.deep_ep.utils import CallEvent, EventHandle, EventOverlap
from moegen.compat.low_latency import CombineBuffers, Layers, LowLatencyHandle, mode, unpacked
from moegen.errors import InputError
from moegen.runtime.ownership import exclusive, lasting, write_anyway

Tensor = torch.Tensor
Hook = Callable[[], None]


class Buffer(NormalMode):
    """DeepEP's communication buffer. Its sizes are kept and not used: moegen allocates what the shapes of the calls
    need, when a shape is first seen; that first call is collective and compiles.

    Args:
        group: a torch process group (gloo or nccl); or the rank_world that `LocalWorld.run` gives.
        num_nvl_bytes, num_rdma_bytes, num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl,
            explicitly_destroy: kept as attributes or ignored.
        low_latency_mode: kept as an attribute; the low-latency calls work either way.
        enable_shrink: a rank that does not come in time is masked and left out, where otherwise the call fails with
            PeerTimeoutError; and waits can be measured.
        comm: not supported.

    Attributes:
        timeout: seconds that a call waits for a rank; moegen's own, and may be set at any time.
        max_tokens_per_rank: moegen's own, of the normal mode; see `NormalMode`.

    Raises:
        NotImplementedError: comm.
    """

    num_sms: int = 20
    timeout: float = 30.0

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
        if comm is not None:
            raise NotImplementedError("moegen.compat.deep_ep has no Buffer(comm=...): give a torch process group")
        self.group = group
        self._layers = Layers(group, masked=enable_shrink)
        self.rank, self.group_size = self._layers.rank, self._layers.size
        self.num_nvl_bytes = checks.integer("num_nvl_bytes", num_nvl_bytes)
        self.num_rdma_bytes = checks.integer("num_rdma_bytes", num_rdma_bytes)
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._combine_buffers = CombineBuffers("get_next_low_latency_combine_buffer")
        self._local: dict[bool, LocalMemory] = {}

    @exclusive
    def destroy(self) -> None:
        """Gives all memory back. Not collective."""
        self._layers.destroy()
        self._destroy_rows()
        self._combine_buffers.clear()
        self._local.clear()

    @staticmethod
    def is_sm90_compiled() -> bool:
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Thread blocks of calls of the normal mode from now on; even, as in DeepEP."""
        number = checks.integer("new_num_sms", new_num_sms)
        if number % 2 != 0:
            raise InputError(f"the number of multiprocessors is even; got {number}")
        Buffer.num_sms = number

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

    @exclusive
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
            dispatch_wait_recv_cost_stats: int64 [ranks], to which the time is added that this call waited for each
                other rank, in nanoseconds (DeepEP's are clock cycles). Needs enable_shrink.
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
            InputError: arguments that do not fit.
        """
        self._check_stats("dispatch_wait_recv_cost_stats", dispatch_wait_recv_cost_stats)
        quantize = _quantize(use_fp8, round_scale, use_ue8m0)
        self._layers.timeout = self.timeout
        layer = self._layers.get(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, quantize)
        answer = layer.dispatch(
            x,
            topk_idx,
            total_counts=cumulative_local_expert_recv_stats,
            timeout=self.timeout,
            waited_ns=dispatch_wait_recv_cost_stats,
            **mode(async_finish, return_recv_hook),
        )
        received, event, hook = _unpacked(answer, async_finish, return_recv_hook)
        tokens = received.tokens if received.scales is None else (received.tokens, received.scales)
        return tokens, received.counts, LowLatencyHandle.of(layer, received, topk_idx), event, hook

    @exclusive
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
            topk_idx: that of the dispatch, in which selections may have become -1 since: these are left out, with a
                weight of 0, so rows for them hold finite numbers. Anything else in it is not looked at.
            topk_weights: float32 [T, topk].
            handle: of the dispatch, as it was returned.
            use_logfmt: taken and not needed: sums cross the link as bfloat16, one per token and rank.
            zero_copy: the outputs are in the tensor that `get_next_low_latency_combine_buffer` gave for this handle
                since its last combine, and `x` is not looked at. Where peers' memory is mapped nothing is copied in
                either case, so it saves nothing.
            async_finish, return_recv_hook, out: as in DeepEP.
            combine_wait_recv_cost_stats: as dispatch's, of the first sum of each rank that is waited for.

        Raises:
            HandleError: `handle` is not what low_latency_dispatch returned.
            InputError: arguments that do not fit; or zero_copy, and the tensor was not asked for.
        """
        self._check_stats("combine_wait_recv_cost_stats", combine_wait_recv_cost_stats)
        given = self._layers.own(handle)
        answer = given.owner.combine(
            self._combine_buffers.input_of(given, x, zero_copy),
            given.received.handle,
            given.routed.weights_of(topk_idx, topk_weights),
            out=out,
            timeout=self.timeout,
            waited_ns=combine_wait_recv_cost_stats,
            **mode(async_finish, return_recv_hook),
        )
        given.buffer = None
        return _unpacked(answer, async_finish, return_recv_hook)

    @exclusive
    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> Tensor:
        """A bfloat16 tensor [local experts, ranks * max tokens, hidden] for the outputs that the next combine of this
        handle reads: one of two per shape, which handles take in turns.
        """
        return self._combine_buffers.next(self._layers.own(handle))

    @exclusive
    @lasting()
    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """Memory of this rank, `num_rdma_bytes` or `num_nvl_bytes` of it, for whatever the caller likes: zeros at
        first, and the same in every call. In DeepEP the library's own data lie there; here they do not. More than a MiB
        is allocated when it is first used: not for its shape, nor for zeroing it.

        Args:
            dtype: of the result.
            size: its shape; None: one dimension, up to the end of the memory.
            offset: bytes from the start of the memory to the result's, a multiple of the dtype's size.
            use_rdma_buffer: the memory of num_rdma_bytes.

        Raises:
            InputError: the memory ends before the tensor does, or the offset is no such multiple.
            CapacityError: from whatever uses the memory first: there is no room for it.
        """
        if use_rdma_buffer not in self._local:
            name = "num_rdma_bytes" if use_rdma_buffer else "num_nvl_bytes"
            self._local[use_rdma_buffer] = LocalMemory(name, getattr(self, name), self._layers.device)
        return self._local[use_rdma_buffer].tensor(dtype, size, offset)

    @exclusive
    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leaves a rank out (`mask`) or takes it back, on this rank; see `ExpertParallel.active_ranks` for when.

        Raises:
            InputError: no such rank, or a Buffer without enable_shrink.
        """
        active = self._active()
        rank = checks.integer("rank_to_mask", rank_to_mask)
        if not 0 <= rank < self.group_size:
            raise InputError(f"a rank is 0..{self.group_size - 1}; got {rank}")
        active[rank] = 0 if mask else 1

    @exclusive
    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Writes 1 for each rank that is masked here, else 0, into int32 [ranks], on the current stream.

        Raises:
            InputError: another kind of tensor, or a Buffer without enable_shrink.
        """
        active = self._active()
        if mask_status.dtype != torch.int32 or mask_status.shape != active.shape:
            given = f"{mask_status.dtype} {list(mask_status.shape)}"
            raise InputError(f"mask_status is torch.int32 [{self.group_size}]; got {given}")
        admission.written("mask_status", mask_status)
        write_anyway(mask_status, active == 0)

    @exclusive
    def low_latency_clean_mask_buffer(self) -> None:
        """Takes all ranks back. Collective in effect: see `ExpertParallel.active_ranks`.

        Raises:
            InputError: a Buffer without enable_shrink.
        """
        self._active().fill_(1)

    def _active(self) -> Tensor:
        if not self.enable_shrink:
            raise InputError("this Buffer has no mask; make it with enable_shrink=True")
        return self._layers.active_on(self._layers.device)

    def _check_stats(self, name: str, stats: Tensor | None) -> None:
        if stats is not None and not self.enable_shrink:
            raise InputError(f"{name} needs kernels that measure; make the Buffer with enable_shrink=True")


def _quantize(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> str | None:
    if use_ue8m0 and not (round_scale and use_fp8):
        raise InputError("use_ue8m0 needs use_fp8 and round_scale: UE8M0 holds powers of two")
    if not use_fp8:
        return None
    return "fp8_ue8m0" if use_ue8m0 else "fp8_pow2" if round_scale else "fp8"


def _unpacked(answer: Any, async_finish: bool, return_recv_hook: bool) -> tuple[Any, EventOverlap, Hook | None]:
    """Moegen's result, with DeepEP's event and hook."""
    result, event, hook = unpacked(answer, async_finish, return_recv_hook)
    return result, EventOverlap(None if event is None else CallEvent(event)), hook
