# SPDX-License-Identifier: Apache-2.0
"""What the low-latency interfaces of other libraries have in common: their objects learn the shapes call by call."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from moegen import checks
from moegen.compat.groups import rank_and_size, usual_device
from moegen.errors import HandleError, InputError
from moegen.expert_parallel import ExpertParallel
from moegen.handle import Dispatched
from moegen.runtime.ownership import ProcessBound, lasting

IN_FLIGHT = 2
"""Calls whose hooks may be open, as in DeepEP and all that follow it."""


class Layers(ProcessBound):
    """One ExpertParallel per shape of call.

    Args:
        group: a torch process group, or a rank_world.
        masked: whether ranks may be missing.
        path: of the objects.
    """

    def __init__(self, group: Any, *, masked: bool = False, path: str = "auto") -> None:
        self._group = group
        self._masked = masked
        self._path = path
        self._active: torch.Tensor | None = None
        self._made: dict[tuple[Any, ...], ExpertParallel] = {}
        self.rank, self.size = rank_and_size(group)

    def get(
        self, x: torch.Tensor, topk_idx: torch.Tensor, max_tokens: int, num_experts: int, quantize: str | None
    ) -> ExpertParallel:
        """The object for these shapes; made, on all ranks together, when they are first seen.

        Raises:
            InputError: shapes that none of these libraries takes.
        """
        if x.dim() != 2 or topk_idx.dim() != 2:
            raise InputError(
                f"x is [tokens, hidden], topk_idx [tokens, topk]; got {list(x.shape)}, {list(topk_idx.shape)}"
            )
        num_experts = checks.integer("num_experts", num_experts)
        max_tokens = checks.integer("num_max_dispatch_tokens_per_rank", max_tokens)
        if num_experts % self.size != 0:
            raise InputError(f"num_experts is a multiple of the {self.size} ranks; got {num_experts}")
        key = (x.shape[1], topk_idx.shape[1], max_tokens, num_experts, quantize, x.device)
        layer = self._made.get(key)
        if layer is None:
            layer = self._made[key] = ExpertParallel(
                self._group,
                num_experts=num_experts,
                num_topk=topk_idx.shape[1],
                hidden=x.shape[1],
                max_tokens_per_rank=max_tokens,
                path=self._path,
                quantize=quantize,
                slots=1 if self._path == "collective" else IN_FLIGHT,
                active_ranks=self.active_on(x.device) if self._masked else False,
                device=x.device,
            )
        return layer

    @property
    def device(self) -> torch.device:
        """Where tensors are that are made before any call: with the ranks, or with the mask of their calls."""
        if self._active is not None:
            return self._active.device
        return usual_device(self._group)

    @lasting()
    def active_on(self, device: torch.device) -> torch.Tensor:
        """The one mask of all these objects, int32 [ranks], 1: active; `keep_in`, or the first call, settles where it
        is.
        """
        if self._active is None:
            self._active = torch.ones(self.size, dtype=torch.int32, device=device)
        elif self._active.device != device and not self._made:
            self._active = self._active.to(device)
        return self._active

    def keep_in(self, active: torch.Tensor) -> torch.Tensor:
        """The mask: this tensor, if there is none so far."""
        if self._active is None:
            self._active = active
        return self._active

    def destroy(self) -> None:
        for layer in self._made.values():
            layer.destroy()
        self._made.clear()


def mode(async_finish: bool, return_recv_hook: bool) -> dict[str, Any]:
    """Keyword arguments of moegen's calls."""
    asked = {"async_finish": async_finish, "return_recv_hook": return_recv_hook}
    return {name: True for name, wanted in asked.items() if wanted}


def unpacked(answer: Any, async_finish: bool, return_recv_hook: bool) -> tuple[Any, Any, Any]:
    """Moegen's result, event and hook; None where there is none."""
    if async_finish:
        return *answer, None
    if return_recv_hook:
        result, hook = answer
        return result, None, hook
    return answer, None, None


class LowLatencyHandle(ProcessBound, tuple[Any, ...]):
    """DeepEP's five elements: src_info int32 [local experts, ranks * max tokens] (the source's token of each row),
    layout_range int64 [local experts, ranks] (first row << 32 | rows), max tokens, hidden, num_experts.

    Attributes:
        owner, received: what moegen's combine needs.
    """

    _noun: ClassVar[str] = "handle"
    _belongs_to: ClassVar[str] = "its process and its Buffer"

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


def own_handle(handle: Any) -> LowLatencyHandle:
    """What dispatch returned.

    Raises:
        HandleError: it is something else.
    """
    if not isinstance(handle, LowLatencyHandle):
        raise HandleError("the handle is the tuple that dispatch returned, itself: a copy cannot be used")
    return handle


class CombineBuffers(ProcessBound):
    """Memory for experts' outputs: two tensors per object, which take turns with the combines, as in DeepEP.

    Attributes:
        combines: how many there were so far.
    """

    def __init__(self) -> None:
        self.combines = 0
        self._made: dict[int, list[torch.Tensor]] = {}

    def next(self, owner: ExpertParallel) -> torch.Tensor:
        """[local experts, ranks * max tokens, hidden] for the next combine."""
        buffers = self._made.get(id(owner))
        if buffers is None:
            shape = owner._alive().received.tokens_shape
            with lasting():
                made = [torch.empty(shape, dtype=owner.dtype, device=owner.device) for _ in range(IN_FLIGHT)]
            buffers = self._made[id(owner)] = made
        return buffers[self.combines % IN_FLIGHT]

    def clear(self) -> None:
        self._made.clear()
