# SPDX-License-Identifier: Apache-2.0
"""What the low-latency interfaces of other libraries have in common: their objects learn the shapes call by call."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any, ClassVar

import torch

from moegen import admission, checks
from moegen.compat.fewer_tokens import Sizes, whole_of
from moegen.compat.groups import rank_and_size, usual_device
from moegen.errors import HandleError, InputError, LeftOutError
from moegen.expert_parallel import ExpertParallel
from moegen.handle import Dispatched
from moegen.runtime.ownership import ProcessBound, lasting

log = logging.getLogger(__name__)

IN_FLIGHT = 2
"""Calls whose hooks may be open, as in DeepEP and all that follow it."""


class Layer(ExpertParallel):
    """One whose rank, left out by the others, reads so in the log: the emulated libraries have no error for that."""

    def _raise_reported(self) -> None:
        try:
            super()._raise_reported()
        except LeftOutError as error:
            log.warning("rank %d: %s", self.rank, error)


class Layers(ProcessBound):
    """The objects of each shape of call; what differs in the number of tokens per rank alone shares them.

    Args:
        group: a torch process group, or a rank_world.
        masked: whether ranks may be missing.
        path: of the objects.

    Attributes:
        timeout: seconds that ranks wait for each other where the next object is made.
    """

    timeout = 30.0

    def __init__(self, group: Any, *, masked: bool = False, path: str = "auto") -> None:
        self._group = group
        self._masked = masked
        self._path = path
        self._active: torch.Tensor | None = None
        self._made: dict[tuple[Any, ...], Sizes] = {}
        self.rank, self.size = rank_and_size(group)

    def get(
        self, x: torch.Tensor, topk_idx: torch.Tensor, max_tokens: int, num_experts: int, quantize: str | None
    ) -> ExpertParallel:
        """The object for these shapes; made, on all ranks together, when they are first seen, or `max_tokens` is larger
        than any before.

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
        key = (x.shape[1], topk_idx.shape[1], num_experts, quantize, x.device)
        sizes = self._made.get(key) or Sizes()
        layer = sizes.of(max_tokens)
        if layer is None:
            layer = sizes.add(max_tokens, partial(self._make, *key))
            self._made[key] = sizes
        return layer

    def _make(
        self,
        hidden: int,
        num_topk: int,
        num_experts: int,
        quantize: str | None,
        device: torch.device,
        max_tokens_per_rank: int,
    ) -> ExpertParallel:
        return Layer(
            self._group,
            num_experts=num_experts,
            num_topk=num_topk,
            hidden=hidden,
            max_tokens_per_rank=max_tokens_per_rank,
            path=self._path,
            quantize=quantize,
            slots=1 if self._path == "collective" else IN_FLIGHT,
            active_ranks=self.active_on(device) if self._masked else False,
            device=device,
            timeout=self.timeout,
        )

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

    def own(self, handle: Any) -> LowLatencyHandle:
        """The handle, if a dispatch of one of these objects returned it.

        Raises:
            HandleError: it is something else.
        """
        if not isinstance(handle, LowLatencyHandle):
            raise HandleError("the handle is the tuple that dispatch returned, itself: a copy cannot be used")
        whole = whole_of(handle.owner)
        # The error of a destroyed object is its own.
        if not whole.destroyed and not any(sizes.has(whole) for sizes in self._made.values()):
            raise HandleError("this handle comes from another Buffer; give it to the one whose dispatch returned it")
        return handle

    def destroy(self) -> None:
        for sizes in self._made.values():
            sizes.destroy()
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
        routed: the ids of the dispatch.
        buffer: what `CombineBuffers` gave for the next combine; None: nothing.
    """

    _noun: ClassVar[str] = "handle"
    _belongs_to: ClassVar[str] = "its process and its Buffer"

    owner: ExpertParallel
    received: Dispatched
    routed: RoutedIds
    buffer: torch.Tensor | None

    @staticmethod
    def of(owner: ExpertParallel, received: Dispatched, topk_idx: torch.Tensor) -> LowLatencyHandle:
        problem = owner.problem
        ranges = received.ranges.view(torch.int64).squeeze(2)
        elements = (received.row_tokens, ranges, problem.max_tokens, problem.hidden, problem.num_experts)
        handle = LowLatencyHandle(elements)
        handle.owner, handle.received = owner, received
        handle.routed, handle.buffer = RoutedIds(topk_idx), None
        return handle


class RoutedIds:
    """The ids of a dispatch, which combine is given again: selections may have become -1 since, and are left out then,
    as in DeepEP. Any other change means nothing: rows went where the dispatch's ids sent them.

    Torch counts what is written to a tensor; the same tensor with the same count needs no look. Inference tensors have
    no such count, and are always looked at.
    """

    def __init__(self, topk_idx: torch.Tensor) -> None:
        self._ids, self._version = topk_idx, _version(topk_idx)

    def weights_of(self, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Combine's weights: 0 where the id is -1 now.

        Raises:
            InputError: ids and weights of different shapes, or not of the dispatch's.
        """
        if not self._ids.shape == topk_idx.shape == topk_weights.shape:
            raise InputError(
                f"topk_idx and topk_weights must have the shape of the dispatch's topk_idx, {list(self._ids.shape)}; "
                f"got {list(topk_idx.shape)}, {list(topk_weights.shape)}"
            )
        topk_idx, topk_weights = admission.read("topk_idx", topk_idx), admission.read("topk_weights", topk_weights)
        if self._version is not None and self._version == _version(topk_idx) and self._are(topk_idx):
            return topk_weights
        if topk_idx.device != topk_weights.device:
            raise InputError(f"topk_idx is on {topk_idx.device} and topk_weights on {topk_weights.device}")
        return torch.where(topk_idx < 0, 0.0, topk_weights)

    def _are(self, given: torch.Tensor) -> bool:
        """Whether these are the dispatch's, of the same memory."""
        ids = self._ids
        same_place = given is ids or (given.data_ptr() == ids.data_ptr() and given.stride() == ids.stride())
        return same_place and given.dtype == ids.dtype


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class CombineBuffers(ProcessBound):
    """Memory for experts' outputs, two tensors per object, which handles take in turns: so two calls may hold one each.
    A number of tokens smaller than the object was made for gets the beginning of that memory.

    Args:
        name: of the method that gives them.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._turn = 0
        self._made: dict[int, list[torch.Tensor]] = {}

    def next(self, handle: LowLatencyHandle) -> torch.Tensor:
        """[local experts, ranks * max tokens, hidden] for the handle's next combine; the same until then."""
        if handle.buffer is None:
            whole = whole_of(handle.owner)
            if id(whole) not in self._made:
                size = math.prod(whole._alive().received.tokens_shape)
                with lasting():
                    made = [torch.empty(size, dtype=whole.dtype, device=whole.device) for _ in range(IN_FLIGHT)]
                self._made[id(whole)] = made
            shape = handle.owner._alive().received.tokens_shape
            handle.buffer = self._made[id(whole)][self._turn % IN_FLIGHT][: math.prod(shape)].view(shape)
            self._turn += 1
        return handle.buffer

    def input_of(self, handle: LowLatencyHandle, x: torch.Tensor, zero_copy: bool) -> torch.Tensor:
        """What a combine reads: `x`, or with zero_copy the handle's buffer, whatever `x` is.

        Raises:
            InputError: it was not asked for since the last combine: nothing says what would stand there.
        """
        if not zero_copy:
            return x
        if handle.buffer is None:
            raise InputError(
                f"zero_copy=True reads the tensor of {self._name}(handle), which must be asked for and filled before "
                "each such combine; nothing was asked for: do that, or give zero_copy=False"
            )
        return handle.buffer

    def clear(self) -> None:
        self._made.clear()
