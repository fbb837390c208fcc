# SPDX-License-Identifier: Apache-2.0
"""Hostile tensors: what callers give in place of a well-formed one, by name."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

Tensor = torch.Tensor


class NotApplicableError(Exception):
    """There is no such variant of the value; the case goes on with the value itself."""


@dataclass
class Scene:
    """What a hostile value may be made of.

    Attributes:
        random: the only source of chance.
        tensors: other arguments of the call and results of earlier ones, by name.
        handles: of other objects, and of earlier calls of this one.
        memory: the object's own buffers.
    """

    random: random.Random
    tensors: dict[str, Tensor]
    handles: list[Any]
    memory: list[Tensor]


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


class Wrapper(torch.Tensor):
    """A subclass without memory, which says nothing of where its values are."""

    @staticmethod
    def __new__(cls, inside: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=inside.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("this tensor has no values")


class LooksLikeOne:
    """What has a tensor's attributes and is none."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        if name == "_tensor":
            raise AttributeError(name)
        return getattr(self._tensor, name)


Variant = Callable[[Tensor, Scene], Any]


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _in_larger(tensor: Tensor, before: int, dtype_bytes: int | None = None) -> Tensor:
    """The same values, `before` bytes behind the start of a storage."""
    size = dtype_bytes or tensor.element_size()
    room = torch.zeros(tensor.nbytes + before + 64, dtype=torch.uint8, device="cpu")
    align = -room.data_ptr() % 16
    start = align + before
    if start % size:
        raise NotApplicableError
    view = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return view.copy_(tensor)


def _unaligned(tensor: Tensor) -> Tensor:
    """At an address that is no multiple of the element's size, as only foreign memory can be."""
    room = (ctypes.c_char * (tensor.nbytes + 64))()
    count = max(1, tensor.numel())
    flat = torch.frombuffer(room, dtype=tensor.dtype, offset=1, count=count)[: tensor.numel()]
    flat.untyped_storage()._keep = room  # type: ignore[attr-defined]
    return flat.view(tensor.shape).copy_(tensor)


def _strided(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        raise NotApplicableError
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype, device="cpu")
    return wide[..., : 2 * tensor.shape[-1] : 2].copy_(tensor)


def _padded(tensor: Tensor, more: int) -> Tensor:
    if tensor.dim() == 0:
        raise NotApplicableError
    wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + more, dtype=tensor.dtype, device="cpu")
    return wide[..., : tensor.shape[-1]].copy_(tensor)


def _transposed(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        raise NotApplicableError
    return _fresh(tensor.transpose(-1, -2)).transpose(-1, -2)


def _expanded(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        raise NotApplicableError
    return _fresh(tensor[:1]).expand(tensor.shape)


def _overlapping(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2 or tensor.numel() == 0:
        raise NotApplicableError
    flat = _fresh(tensor).flatten()
    return flat.as_strided(tensor.shape, [1] * tensor.dim())


def _freed(tensor: Tensor, left: float = 0.0) -> Tensor:
    made = _fresh(tensor)
    made.untyped_storage().resize_(int(made.untyped_storage().nbytes() * left))
    return made


def _lazy_conjugate(tensor: Tensor) -> Tensor:
    if tensor.dtype.is_complex:
        return _fresh(tensor).conj()
    if tensor.dtype != torch.float32:
        raise NotApplicableError
    return torch.complex(tensor, -tensor).conj().imag


def _fake(tensor: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(_fresh(tensor))


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def _half_open(tensor: Tensor) -> Tensor:
    """A result of autograd, which requires grad and is no leaf."""
    return _fresh(tensor).requires_grad_() * 1


def _aliased(tensor: Tensor, scene: Scene) -> Tensor:
    """Memory of another argument or of an earlier result, in the shape of this one where it is large enough."""
    others = [scene.tensors[name] for name in sorted(scene.tensors)]
    if not others:
        raise NotApplicableError
    return _reshaped(scene.random.choice(others), tensor, scene)


def _own_memory(tensor: Tensor, scene: Scene) -> Tensor:
    if not scene.memory:
        raise NotApplicableError
    return _reshaped(scene.random.choice(scene.memory), tensor, scene)


def _reshaped(other: Tensor, tensor: Tensor, scene: Scene) -> Tensor:
    flat = other.flatten() if other.is_contiguous() else other.contiguous().flatten()
    raw = flat.view(torch.uint8)
    if raw.numel() < tensor.nbytes:
        return other
    last = (raw.numel() - tensor.nbytes) // 16
    start = 16 * scene.random.randint(0, last)
    if (raw.storage_offset() + start) % max(1, tensor.element_size()):
        raise NotApplicableError
    return raw[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _with_shape(change: Callable[[list[int], random.Random], list[int]]) -> Variant:
    def changed(tensor: Tensor, scene: Scene) -> Tensor:
        shape = change(list(tensor.shape), scene.random)
        if any(size < 0 for size in shape):
            raise NotApplicableError
        values = _fresh(tensor).flatten()
        number = torch.Size(shape).numel()
        if number == 0 or values.numel() == 0:
            return torch.zeros(shape, dtype=tensor.dtype, device="cpu")
        return values.repeat(number // values.numel() + 1)[:number].view(shape).clone()

    return changed


def _grown(dimension: int, by: int) -> Callable[[list[int], random.Random], list[int]]:
    def grown(shape: list[int], _: random.Random) -> list[int]:
        if len(shape) < 1 + (dimension if dimension >= 0 else 0):
            raise NotApplicableError
        shape[dimension] += by
        return shape

    return grown


DTYPES = (
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint8,
    torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64,
)  # fmt: skip

TENSORS: dict[str, Variant] = {
    "another dtype": lambda t, s: _fresh(t).to(s.random.choice(DTYPES)),
    "same width, another dtype": lambda t, s: _fresh(t).view(
        s.random.choice([d for d in DTYPES if d.itemsize == t.element_size() and d != torch.bool])
    ),
    "one row fewer": _with_shape(_grown(0, -1)),
    "one row more": _with_shape(_grown(0, 1)),
    "many rows": _with_shape(_grown(0, 100)),
    "one column fewer": _with_shape(_grown(-1, -1)),
    "one column more": _with_shape(_grown(-1, 1)),
    "no rows": _with_shape(lambda shape, _: [0, *shape[1:]]),
    "no columns": _with_shape(lambda shape, _: [*shape[:-1], 0]),
    "one more dimension": _with_shape(lambda shape, _: [*shape, 1]),
    "one more dimension before": _with_shape(lambda shape, _: [1, *shape]),
    "one dimension fewer": _with_shape(lambda shape, _: shape[1:]),
    "flat": _with_shape(lambda shape, _: [torch.Size(shape).numel()]),
    "a scalar": _with_shape(lambda shape, _: []),
    "strided": lambda t, s: _strided(t),
    "padded": lambda t, s: _padded(t, s.random.choice((1, 8, 16))),
    "transposed": lambda t, s: _transposed(t),
    "expanded": lambda t, s: _expanded(t),
    "overlapping": lambda t, s: _overlapping(t),
    "one element in": lambda t, s: _in_larger(t, t.element_size()),
    "eight bytes in": lambda t, s: _in_larger(t, 8),
    "unaligned": lambda t, s: _unaligned(t),
    "meta": lambda t, s: t.to("meta"),
    "fake": lambda t, s: _fake(t),
    "functionalized": lambda t, s: torch._to_functional_tensor(_fresh(t)),
    "sparse": lambda t, s: t.to_sparse(),
    "sparse rows": lambda t, s: t.to_sparse_csr(),
    "mkldnn": lambda t, s: t.to_mkldnn(),
    "quantized": lambda t, s: torch.quantize_per_tensor(t.float(), 1.0, 0, torch.quint8),
    "nested": lambda t, s: torch.nested.nested_tensor(list(t)),
    "zero tensor": lambda t, s: torch._efficientzerotensor(t.shape, dtype=t.dtype, device="cpu"),
    "subclass": lambda t, s: _fresh(t).as_subclass(Plain),
    "wrapper": lambda t, s: Wrapper(t),
    "looks like one": lambda t, s: LooksLikeOne(t),
    "parameter": lambda t, s: torch.nn.Parameter(_fresh(t), requires_grad=t.is_floating_point()),
    "requires grad": lambda t, s: _fresh(t).requires_grad_(),
    "of autograd": lambda t, s: _half_open(t),
    "conjugated": lambda t, s: _lazy_conjugate(t),
    "negated": lambda t, s: torch._neg_view(-_fresh(t)),
    "freed": lambda t, s: _freed(t),
    "cut short": lambda t, s: _freed(t, 0.5),
    "inference": lambda t, s: _inference(t),
    "alias": _aliased,
    "alias again": _aliased,
    "own memory": _own_memory,
    "numpy": lambda t, s: _fresh(t).float().numpy(),
    "list": lambda t, s: _fresh(t).tolist(),
}


def _ids(value: Callable[[random.Random], int]) -> Variant:
    def some(tensor: Tensor, scene: Scene) -> Tensor:
        made = _fresh(tensor).long() if abs(value(random.Random(0))) > 2**31 - 1 else _fresh(tensor)
        flat = made.view(-1)
        for _ in range(scene.random.randint(1, 4)):
            if flat.numel():
                flat[scene.random.randrange(flat.numel())] = value(scene.random)
        return made

    return some


IDS: dict[str, Variant] = {
    "none selected": lambda t, s: torch.full_like(t, -1),
    "some -1": _ids(lambda r: -1),
    "some -2": _ids(lambda r: -2),
    "too large": _ids(lambda r: r.choice((8, 9, 1000, 2**31 - 1))),
    "huge": _ids(lambda r: r.choice((2**40, 2**32 + 1, -(2**40), 2**63 - 1))),
    "all the same": lambda t, s: torch.full_like(t, s.random.randint(0, 3)),
    "int32": lambda t, s: t.int(),
    "int64": lambda t, s: t.long(),
    "uint8": lambda t, s: t.to(torch.uint8),
    "zeros": lambda t, s: torch.zeros_like(t),
}

_ODD_FLOATS = (float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-40, 0.0, -0.0)


def _odd_floats(tensor: Tensor, scene: Scene) -> Tensor:
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise NotApplicableError
    made = _fresh(tensor)
    flat = made.view(-1)
    for _ in range(scene.random.randint(1, 5)):
        if flat.numel():
            flat[scene.random.randrange(flat.numel())] = scene.random.choice(_ODD_FLOATS)
    return made


FLOATS: dict[str, Variant] = {
    "odd numbers": _odd_floats,
    "all nan": lambda t, s: torch.full_like(t, float("nan")),
    "all infinite": lambda t, s: torch.full_like(t, float("inf")),
    "huge numbers": lambda t, s: torch.full_like(t, 3e38),
    "tiny numbers": lambda t, s: torch.full_like(t, 1e-39),
}


def _filled(number: int) -> Variant:
    return lambda tensor, scene: torch.full_like(tensor, number)


COUNTS: dict[str, Variant] = {
    f"count {number}": _filled(number) for number in (-(2**31), -1, 0, 1, 5, 6, 8, 9, 2**31 - 1)
}
