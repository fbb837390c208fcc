# SPDX-License-Identifier: Apache-2.0
"""Which tensors kernels may be given. Every tensor that a kernel of a call reads or writes passes here: kernels get
addresses, so nothing of what torch checks for its own operators protects them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from moegen.errors import InputError

Named = tuple[str, torch.Tensor | None]
"""A call's argument."""

Span = tuple[str, int, int]
"""An argument, and the addresses of its first byte and of the first one behind it."""

RECEIVE_BUFFER = "this object's receive buffer"
"""Its name in errors."""

_keys: Any = torch._C._dispatch_keys
"""A tensor's dispatch keys say all at once what torch thinks it is: its backend and layout, a subclass or a transform
that has wrapped it, whether its values are to be negated or conjugated when they are read.
"""

_DispatchKey: Any = torch._C.DispatchKey


def _mask(*names: str) -> int:
    sets = (torch._C.DispatchKeySet(getattr(_DispatchKey, name)) for name in names)
    return int(reduce(or_, (each.raw_repr() for each in sets)))


_ORDINARY = _mask("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA")
_ODD = ~_ORDINARY
_LAZY = _mask("Negative", "Conjugate")
_NEVER = ~(_ORDINARY | _LAZY)
_TRANSFORMED = _mask("FuncTorchBatched", "FuncTorchGradWrapper")
_TRACED = _mask("Functionalize", "Python", "PythonTLSSnapshot")
_ZERO = _mask("ZeroTensor")


def read(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy whose memory holds what it stands for. What most tensors are is looked at first, by calls
    that cost a fraction of a microsecond together.

    Raises:
        InputError: kernels cannot read it, or autograd would not know that they have.
    """
    odd = _keys(tensor).raw_repr() & _ODD
    if odd & _NEVER:
        _refuse(name, tensor, odd)
    if tensor.requires_grad or forward_ad._current_level >= 0:
        _require_untracked(name, tensor)
    there = tensor.untyped_storage().nbytes()
    if there < tensor.nbytes or tensor.storage_offset() or not tensor.is_contiguous():
        _require_memory(name, tensor, there)
    return tensor.resolve_conj().resolve_neg() if odd else tensor


def written(name: str, tensor: torch.Tensor) -> None:
    """Raises:
    InputError: kernels cannot write it, or autograd would have to know more than that they have.
    """
    if read(name, tensor) is not tensor:
        refuse_lazy(name)


def refuse_lazy(name: str) -> NoReturn:
    raise InputError(f"{name} is a negated or conjugated view and cannot be written to; give the tensor it views")


def require_kept(name: str, tensor: torch.Tensor) -> None:
    """Of memory that an earlier call has seen.

    Raises:
        InputError: it was freed since.
    """
    there = tensor.untyped_storage().nbytes()
    if there < tensor.nbytes:
        _require_memory(name, tensor, there)


def operand(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """What an operator of torch may be given: what `read` takes, also while it requires grad, and what torch puts in
    its place while it traces.

    Raises:
        InputError: neither; or it is inside one of torch.func's transforms, or has a tangent.
    """
    odd = _keys(tensor).raw_repr() & _ODD
    if odd & ~(_LAZY | _TRACED):
        _refuse(name, tensor, odd)
    _require_no_tangent(name, tensor)
    return tensor.resolve_conj().resolve_neg() if odd & _LAZY else tensor


def require_real_tensors() -> None:
    """Raises:
    InputError: torch traces and makes tensors without memory, which a call would give to kernels.
    """
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.maybe_current_level() is not None:
        made = torch.empty(0, dtype=torch.uint8, device="cpu")
        if _keys(made).raw_repr() & _ODD:
            raise InputError(
                "torch makes tensors without memory here (FakeTensorMode, functionalize or another trace), and kernels "
                "need some; make objects and calls outside of it, or trace moegen.functional, whose operators can be"
            )


def apart(
    outputs: Iterable[Named], inputs: Iterable[Named], known: Sequence[Span] = (), taken: Sequence[Span] = ()
) -> list[Span]:
    """What a call writes is nothing that it reads, or writes as another output. Returns where its outputs are.

    Args:
        known: where further outputs are, none of which shares memory with another.
        taken: other memory that it must not write.

    Raises:
        InputError: two of them share memory.
    """
    spans = [*known]
    for name, tensor in outputs:
        if tensor is not None:
            made = span(name, tensor)
            _require_apart(made, spans)
            _require_apart(made, taken)
            spans.append(made)
    if spans:
        for name, tensor in inputs:
            if tensor is not None:
                _require_apart(span(name, tensor), spans)
    return spans


def span(name: str, tensor: torch.Tensor) -> Span:
    start = tensor.data_ptr()
    return name, start, start + _extent(tensor)


def _require_apart(one: Span, others: Sequence[Span]) -> None:
    name, start, end = one
    for other, first, last in others:
        if start < last and first < end:
            raise InputError(
                f"{name} and {other} share memory, and the call would write to one and use the other, too; give one of "
                "them memory of its own, such as a clone"
            )


def refuse_received(name: str) -> NoReturn:
    """An input of a dispatch that lies where the other ranks may write as soon as they begin it."""
    raise InputError(
        f"{name} lies in {RECEIVE_BUFFER}, as what an earlier dispatch returned does; other ranks write there during "
        f"this call: give a clone of {name}"
    )


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether their elements have the same addresses."""
    alike = one.data_ptr() == other.data_ptr() and one.dtype == other.dtype
    return alike and one.shape == other.shape and one.stride() == other.stride()


def require_apart_within(name: str, tensor: torch.Tensor) -> None:
    """Raises:
    InputError: elements share memory.
    """
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                raise InputError(
                    f"elements of {name} share memory (strides {tensor.stride()} of {list(tensor.shape)}); give a "
                    "tensor in which each has its own, such as a contiguous one"
                )
            reach = stride * size


def note_writes(tensors: Sequence[torch.Tensor]) -> None:
    """Autograd then refuses to compute gradients with what was there before. It never keeps inference tensors, which
    count no versions.
    """
    if tensors:
        try:
            torch.autograd.graph.increment_version(tensors)
        except RuntimeError:
            torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _require_memory(name: str, tensor: torch.Tensor, there: int) -> None:
    extent = _extent(tensor)
    if extent and there < tensor.storage_offset() * tensor.element_size() + extent:
        raise InputError(
            f"the memory of {name} was freed or cut short: {there} bytes are left, too few for {list(tensor.shape)} of "
            f"{tensor.dtype}; give it its memory back first (FSDP frees parameters between their uses)"
        )


def _require_untracked(name: str, tensor: torch.Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{name} requires grad, and this call passes no gradients on: use moegen.functional, whose dispatch and "
            "combine are differentiable, or make the call under torch.no_grad() if none are needed"
        )
    _require_no_tangent(name, tensor)


def _require_no_tangent(name: str, tensor: torch.Tensor) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise InputError(
            f"{name} has a tangent, and moegen has no forward-mode derivatives: use moegen.functional with backward()"
        )


def _refuse(name: str, tensor: torch.Tensor, odd: int) -> NoReturn:
    if odd & _TRANSFORMED:
        why = (
            "is inside a transform of torch.func (vmap, grad, vjp, jvp), which moegen has no rules for: make the call "
            "outside of it; gradients are those of moegen.functional with backward()"
        )
    elif odd & _mask("Functionalize"):
        why = "has no memory, because torch.func.functionalize has wrapped it: make the call outside of it"
    elif odd & _mask("Python"):
        why = (
            f"is a {type(tensor).__name__}, which need not have the memory of an ordinary tensor: give a torch.Tensor, "
            "such as a DTensor's to_local(); while torch traces, moegen.functional takes what stands for one"
        )
    elif odd & _ZERO:
        why = "stands for zeros without having memory for them: give its clone()"
    else:
        why = f"has layout {tensor.layout} and no plain memory: give an ordinary dense tensor, such as its to_dense()"
    raise InputError(f"{name} {why}")
