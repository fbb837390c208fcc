# SPDX-License-Identifier: Apache-2.0
"""Mooncake EP's `Buffer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moegen import checks, env
from moegen.compat.deep_ep.utils import EventHandle, EventOverlap
from moegen.compat.low_latency import CombineBuffers, Layers, LowLatencyHandle, mode, unpacked
from moegen.compat.mooncake.health import Health
from moegen.errors import InputError
from moegen.runtime.ownership import Exclusive, exclusive

Tensor = torch.Tensor
Hook = Callable[[], None]


class Buffer(Exclusive):
    """Mooncake EP's communication buffer. Its size is kept and not used: moegen allocates what the shapes of the calls
    need, when a shape is first seen; that first call is collective and compiles.

    With MOONCAKE_EP_USE_TORCH_ALLTOALL=1 in the environment calls go through all-to-alls of torch.distributed. All
    ranks then take part in every call, `active_ranks` stays as it is, a missing rank is torch.distributed's to notice,
    and a call with a hook has received when it returns: the hook does nothing.

    Args:
        group: a torch process group (gloo or nccl); or the rank_world that `LocalWorld.run` gives.
        num_ep_buffer_bytes, disable_p2p: kept as attributes.

    Attributes:
        longest_wait: seconds that stand for a `timeout_us` of -1; moegen's own, and may be set at any time.
    """

    longest_wait: float = 3600.0

    def __init__(self, group: Any, num_ep_buffer_bytes: int = 0, disable_p2p: bool = False) -> None:
        self._collective = env.mooncake_uses_alltoall()
        self._layers = Layers(group, masked=not self._collective, path="collective" if self._collective else "auto")
        self.group = group
        self.rank, self.group_size = self._layers.rank, self._layers.size
        self.num_ep_buffer_bytes = checks.integer("num_ep_buffer_bytes", num_ep_buffer_bytes)
        self.disable_p2p = disable_p2p
        self._health = Health(None if self._collective else self._layers, self.group_size)
        self._combine_buffers = CombineBuffers("get_next_combine_buffer")

    @exclusive
    def destroy(self) -> None:
        """Gives all memory back. Not collective."""
        self._layers.destroy()
        self._combine_buffers.clear()

    def connect(self, is_update: bool = False) -> None:
        """Nothing to connect beforehand: `is_update` or not, see `update_ep_member`."""
        if is_update:
            self.update_ep_member()

    @exclusive
    def update_ep_member(self) -> None:
        """Takes ranks back that were missing. Collective: every rank of the group calls it, and writes 1 for them into
        its active_ranks; the next call of each shape makes its object anew, on all ranks together. Handles of calls
        before are void.
        """
        self.destroy()

    @staticmethod
    def get_ep_buffer_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes by Mooncake's formula, which does not depend on the ranks; moegen takes what `buffer_bytes` of an
        ExpertParallel says.
        """
        return 4 * num_experts * (4 + num_max_dispatch_tokens_per_rank * (32 + 2 * hidden))

    @exclusive
    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        active_ranks: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        timeout_us: int,
        use_fp8: bool = True,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor, LowLatencyHandle, EventOverlap, Hook | None]:
        """Sends tokens to their experts.

        Args:
            x: bfloat16 [T, hidden], T <= num_max_dispatch_tokens_per_rank.
            topk_idx: int64 (or int32) [T, topk], -1 for no selection.
            active_ranks: int32 [ranks] on the device; 0: the rank is left out. Ranks that do not come in time get a 0.
                The first tensor given is the one that kernels read and write: give the same one in every call. Any
                other is copied before and behind the call.
            timeout_us: microseconds that the call waits for a rank; -1: `longest_wait`.
            use_fp8: e4m3 with float32 scales per 128 elements; hidden is a multiple of 128.
            async_finish, return_recv_hook: as in Mooncake; at most one of them.

        Returns:
            received: [local experts, ranks * max tokens, hidden], with FP8 a pair with the scales [..., hidden / 128]
                float32, whose rows lie side by side in memory;
            counts: int32 [local experts];
            handle; event, whose current_stream_wait() may always be called; hook (None unless asked for).

        Raises:
            InputError: arguments that do not fit.
        """
        timeout = self._seconds(timeout_us)
        settle = self._health.of_call(active_ranks, x.device)
        quantize = "fp8" if use_fp8 else None
        self._layers.timeout = timeout
        layer = self._layers.get(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, quantize)
        answer = layer.dispatch(x, topk_idx, timeout=timeout, **self._mode(async_finish, return_recv_hook))
        received, event, hook = self._finished(answer, async_finish, return_recv_hook, settle)
        tokens = received.tokens if received.scales is None else (received.tokens, received.scales)
        return tokens, received.counts, LowLatencyHandle.of(layer, received, topk_idx), event, hook

    @exclusive
    def combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        active_ranks: Tensor,
        timeout_us: int,
        handle: tuple[Any, ...],
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Hook | None]:
        """Brings the experts' outputs back: per token the sum of weight * output, without those of ranks that are left
        out; weights are not renormalised.

        Args:
            x: bfloat16 [local experts, ranks * max tokens, hidden].
            topk_idx: that of the dispatch, in which selections may have become -1 since: these are left out, with a
                weight of 0, so rows for them hold finite numbers. Anything else in it is not looked at.
            topk_weights: float32 [T, topk].
            handle: of the dispatch, as it was returned.
            zero_copy: the outputs are in the tensor that `get_next_combine_buffer` gave for this handle since its last
                combine, and `x` is not looked at. Nothing is copied in either case.
            out: bfloat16 [T, hidden], for the result.
            active_ranks, timeout_us, async_finish, return_recv_hook: as for `dispatch`.

        Raises:
            HandleError: `handle` is not what dispatch returned.
            InputError: arguments that do not fit; or zero_copy, and the tensor was not asked for.
            DestroyedError: `update_ep_member()` or `destroy()` came after the dispatch.
        """
        timeout = self._seconds(timeout_us)
        given = self._layers.own(handle)
        y = self._combine_buffers.input_of(given, x, zero_copy)
        topk_weights = given.routed.weights_of(topk_idx, topk_weights)
        settle = self._health.of_call(active_ranks, y.device)
        how = self._mode(async_finish, return_recv_hook)
        answer = given.owner.combine(y, given.received.handle, topk_weights, out=out, timeout=timeout, **how)
        given.buffer = None
        return self._finished(answer, async_finish, return_recv_hook, settle)

    @exclusive
    def get_next_combine_buffer(self, handle: tuple[Any, ...]) -> Tensor:
        """A bfloat16 tensor [local experts, ranks * max tokens, hidden] for the outputs that the next combine of this
        handle reads: one of two per shape, which handles take in turns.

        Raises:
            HandleError: `handle` is not what dispatch returned.
        """
        return self._combine_buffers.next(self._layers.own(handle))

    def _seconds(self, timeout_us: int) -> float:
        timeout_us = checks.integer("timeout_us", timeout_us)
        if timeout_us == -1:
            return self.longest_wait
        if timeout_us <= 0:
            raise InputError(f"timeout_us is microseconds, or -1 for no deadline; got {timeout_us}")
        return timeout_us / 1e6

    def _mode(self, async_finish: bool, return_recv_hook: bool) -> dict[str, Any]:
        """Of moegen's call. Path collective has no halves."""
        if async_finish and return_recv_hook:
            raise InputError("async_finish and return_recv_hook exclude each other; give one of them")
        return mode(async_finish, return_recv_hook and not self._collective)

    def _finished(
        self, answer: Any, async_finish: bool, return_recv_hook: bool, settle: Hook
    ) -> tuple[Any, EventOverlap, Hook | None]:
        """Moegen's result, with Mooncake's event and hook, behind which `settle` is called."""
        result, event, hook = unpacked(answer, async_finish, return_recv_hook and not self._collective)
        if event is not None:
            return result, EventOverlap(_Then(event.wait, settle)), None
        if hook is not None:
            return result, EventOverlap(EventHandle()), _Then(hook, settle)
        settle()
        return result, EventOverlap(EventHandle()), _received if return_recv_hook else None


class _Then:
    """One call behind another: an event's `current_stream_wait`, or a hook."""

    def __init__(self, first: Hook, then: Hook) -> None:
        self._first, self._then = first, then

    def __call__(self) -> None:
        self._first()
        self._then()

    current_stream_wait = __call__


def _received() -> None:
    """The hook of a call that has received already."""
