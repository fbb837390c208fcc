# SPDX-License-Identifier: Apache-2.0
"""What the arguments of `ExpertParallel` must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from moegen.base import admission, arguments
from moegen.base.arguments import (
    HANDLE_MEMORY,
    in_range,
    one_of,
    readable,
    require_output,
    require_shape,
    require_tensor,
    require_writable,
    seconds_of_call,
)
from moegen.codegen.problem import Problem
from moegen.errors import HandleError, InputError
from moegen.formats import BF16, QUANTIZED
from moegen.limits import MAX_TOKENS_PER_RANK
from moegen.low_latency.results import Dispatched, GivenNumbers, Handle, NumbersLayout
from moegen.low_latency.spec import LowLatencyDispatch


class ExpertOwner(arguments.Owner, Protocol):
    """Of an `ExpertParallel`, what its checks need."""

    _active: torch.Tensor | None

    def _alive(self) -> Any: ...


def problem(
    num_ranks: int,
    *,
    num_experts: int,
    num_topk: int,
    hidden: int,
    max_tokens_per_rank: int,
    dtype: torch.dtype,
    layout: str,
    quantize: str | None,
    slots: int,
    wire: str,
    warp_groups: str | None,
    on_host: bool,
    masked: bool,
    path: str = "ipc",
) -> Problem:
    """The arguments of `ExpertParallel` that decide its kernels; what only the Spec can judge is judged there."""
    one_of("layout", layout, ("expert",))
    one_of("wire", wire, ("auto", *LowLatencyDispatch.words("wire")))
    one_of("dtype", dtype, (BF16.dtype,))
    one_of("quantize", quantize, (None, *QUANTIZED))
    if path == "collective" and (masked or wire != "auto" or warp_groups is not None):
        raise InputError(
            "path collective has no active_ranks, wire and warp_groups: leave them out, or give path='ipc' where the "
            "ranks can map each other's memory"
        )
    max_tokens = in_range("max_tokens_per_rank", max_tokens_per_rank, 1, MAX_TOKENS_PER_RANK)
    return Problem(
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_topk=num_topk,
        hidden=hidden,
        max_tokens=max_tokens,
        dtype=BF16.word if quantize is None else QUANTIZED[quantize],
        layout=layout,
        path=path,
        on_host=on_host,
        hooks=slots > 1,
        masked=masked,
        wire=wire,
        warp_groups=warp_groups,
    )


def expert_outputs(owner: ExpertOwner, y: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    y = require_tensor(owner, "y", y, (owner.dtype,))
    require_shape("y", y, shape)
    return readable(y)


def out(owner: ExpertOwner, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor is None:
        return
    require_output(owner, "out", tensor, (dtype,))
    require_shape("out", tensor, shape)
    require_writable("out", tensor)


def reused(owner: ExpertOwner, given: Dispatched) -> None:
    if given.handle.owner is not owner:
        raise HandleError("out is the result of another ExpertParallel; give one of this object's, or its allocate()'s")
    for name, tensor in zip(_RESULTS, given.allocations, strict=True):
        # What they are was looked at when they were made or given; what may have become of them is looked at again.
        if tensor is not None and (
            tensor.requires_grad or tensor.storage_offset() or tensor.untyped_storage().nbytes() < tensor.nbytes
        ):
            admission.written(name, tensor)


def outputs(
    owner: ExpertOwner,
    out: torch.Tensor | Dispatched | None,
    totals: torch.Tensor | None,
    waited: torch.Tensor | None,
    inputs: Sequence[admission.Named],
) -> Sequence[torch.Tensor]:
    """What a call was given to write into, which shares no memory with what it reads, nor with what calls need whose
    hooks are open.
    """
    if out is None and totals is None and waited is None:
        return ()
    held = owner._alive().held
    others = (("total_counts", totals), ("waited_ns", waited))
    inputs = (*inputs, ("active_ranks", owner._active))
    if not isinstance(out, Dispatched):
        admission.apart((("out", out), *others), inputs, taken=held)
        return [tensor for tensor in (out, totals, waited) if tensor is not None]
    if not out.spans:
        out.spans.extend(admission.apart(zip(_RESULTS, out.allocations, strict=True), ()))
    if held:
        admission.apart(zip(_RESULTS, out.allocations, strict=True), (), taken=held)
    admission.apart(others, inputs, out.spans, held)
    return [tensor for tensor in (*out.allocations, totals, waited) if tensor is not None]


_RESULTS = ("out.tokens", "out.scales", "the memory of out", "out.counts", "out.ranges", "out.row_tokens")
"""Of `Dispatched.allocations`."""


def given_numbers(
    owner: ExpertOwner,
    layout: NumbersLayout,
    counts: torch.Tensor | None,
    ranges: torch.Tensor | None,
    row_tokens: torch.Tensor | None,
) -> GivenNumbers:
    experts = layout.local_experts
    shapes = {"counts": (experts,), "ranges": (experts, layout.ranks, 2), "row_tokens": (experts, layout.rows)}
    for (name, shape), tensor in zip(shapes.items(), (counts, ranges, row_tokens), strict=True):
        if tensor is not None:
            arguments.numbers(owner, name, tensor, shape)
    return GivenNumbers(counts, ranges, row_tokens)


def scales(
    owner: ExpertOwner, tensor: torch.Tensor | None, storage: tuple[int, int, int] | None, dtype: torch.dtype
) -> None:
    """`storage`: their shape as they lie in memory, with the last two dimensions exchanged; None if there are none."""
    if tensor is None:
        return
    if storage is None:
        raise InputError("this object sends tokens as they are: there are no scales; make it with quantize='fp8'")
    require_output(owner, "scales", tensor, (dtype,))
    require_shape("scales", tensor, (storage[0], storage[2], storage[1]))
    if not tensor.transpose(1, 2).is_contiguous():
        raise InputError(f"the rows of scales lie side by side (stride 1); got strides {tensor.stride()}")


def active_ranks(owner: ExpertOwner, given: bool | torch.Tensor) -> torch.Tensor | None:
    """The mask to use: a new one in which all ranks are active, the given one, or none."""
    if given is False:
        return None
    if given is True:
        return torch.ones(owner.num_ranks, dtype=torch.int32, device=owner.device)
    arguments.numbers(owner, "active_ranks", given, (owner.num_ranks,))
    return given


def waiting(
    owner: ExpertOwner, timeout: float | None, waited_ns: torch.Tensor | None, renormalize: bool = False
) -> None:
    """How a call waits; most say nothing of it."""
    if owner._active is not None:
        admission.require_kept("active_ranks", owner._active)
    seconds_of_call(timeout)
    if (waited_ns is not None or renormalize) and not owner.problem.masked:
        name = "renormalize" if waited_ns is None else "waited_ns"
        raise InputError(f"this object's kernels have no {name}; make it with active_ranks=True")
    if waited_ns is not None:
        arguments.numbers(owner, "waited_ns", waited_ns, (owner.num_ranks,), torch.int64)


def handle(owner: ExpertOwner, given: Handle) -> None:
    if not isinstance(given, Handle):
        raise HandleError(f"combine takes the handle of a dispatch (Dispatched.handle); got {type(given).__name__}")
    if given.owner is not owner:
        raise HandleError("this handle comes from another ExpertParallel; give it to that one's combine")
    if given.num_tokens < 0:
        raise HandleError("nothing was dispatched into this memory; take the handle of what dispatch returned")
    if given.replaced:
        raise HandleError(
            "a later dispatch wrote its results over those of this handle, which were given to it as out; take the "
            "handle of what that dispatch returned, or give each dispatch results of its own"
        )
    admission.require_kept(HANDLE_MEMORY, given.memory)
