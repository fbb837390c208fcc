# SPDX-License-Identifier: Apache-2.0
"""What `get_local_buffer_tensor` gives: memory for the caller, of the number of bytes given to the constructor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from moegen.errors import CapacityError, InputError

MADE_AT_ONCE = 1 << 20
"""Bytes up to which memory is allocated when it is asked for."""


class LocalMemory:
    """Of one of a Buffer's two sizes; zeros at first.

    In DeepEP the library's own data lie there, and frameworks zero it when they recover from a lost rank, on a GPU
    that has no gigabytes to spare. Here only the caller's data lie there: until something else than zeros is written,
    or anything is read, there is nothing to allocate.

    Args:
        name: the constructor's argument.
        size: its value, bytes.
    """

    def __init__(self, name: str, size: int, device: torch.device) -> None:
        self.name, self.size, self.device = name, size, device
        self._made: torch.Tensor | None = None

    @property
    def is_made(self) -> bool:
        return self._made is not None

    def tensor(self, dtype: torch.dtype, shape: torch.Size | None, offset: int) -> torch.Tensor:
        """See `Buffer.get_local_buffer_tensor`."""
        if not 0 <= offset <= self.size or offset % dtype.itemsize != 0:
            raise InputError(f"offset is a multiple of {dtype.itemsize} bytes in 0..{self.size}; got {offset}")
        there = (self.size - offset) // dtype.itemsize
        shape = torch.Size([there]) if shape is None else torch.Size(shape)
        if shape.numel() > there:
            end = offset + shape.numel() * dtype.itemsize
            raise InputError(f"{list(shape)} of {dtype} end at byte {end}; make the Buffer with {self.name}={end}")
        if self.is_made or self.size <= MADE_AT_ONCE:
            return self.part(dtype, shape, offset)
        return Unused(self, dtype, shape, offset)

    def part(self, dtype: torch.dtype, shape: torch.Size, offset: int) -> torch.Tensor:
        """A tensor on this memory, which is allocated now if it was not.

        Raises:
            CapacityError: there is no room for it.
        """
        with torch.inference_mode(False):  # what is made there, views too, cannot be written elsewhere
            if self._made is None:
                self._made = self._make()
            return self._made[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def _make(self) -> torch.Tensor:
        try:
            return torch.zeros(self.size, dtype=torch.uint8, device=self.device)
        except RuntimeError as error:
            raise CapacityError(
                f"no room on {self.device} for the {self.size:,} bytes of {self.name}, which are allocated when what "
                f"get_local_buffer_tensor gave is first used: {error}"
            ) from error


class Unused(torch.Tensor):
    """A tensor on memory that may not have been allocated yet: being asked for its shape, or zeroed, does not allocate
    it; everything else does, and takes place there. A library that asks for its address without torch is refused by
    torch; give that one a slice.
    """

    _memory: LocalMemory
    _offset: int

    @staticmethod
    def __new__(cls, memory: LocalMemory, dtype: torch.dtype, shape: torch.Size, offset: int) -> Unused:
        made: Unused = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=memory.device)
        made._memory, made._offset = memory, offset
        return made

    def used(self) -> torch.Tensor:
        """The same as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self._memory.part(self.dtype, self.shape, self._offset)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _DESCRIBES:
            return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if _writes_zeros(function, args) and not args[0]._memory.is_made:
            return None if function is torch.Tensor.__setitem__ else args[0]
        return function(*_used(args), **_used(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Calls that come from C++."""
        return function(*_used(args), **_used(kwargs or {}))


_DESCRIBES = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "is_cuda", "ndim", "itemsize")]
    + [getattr(torch.Tensor, name) for name in ("size", "numel", "nelement", "dim", "element_size", "__len__")]
)


def _writes_zeros(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether it writes zeros into the first argument and does nothing else."""
    if not args or not isinstance(args[0], Unused):
        return False
    if function in (torch.Tensor.zero_, torch.zero_):
        return True
    if function in (torch.Tensor.fill_, torch.fill_, torch.Tensor.__setitem__):
        return isinstance(args[-1], (int, float)) and args[-1] == 0
    return False


def _used(values: Any) -> Any:
    return tree_map_only(Unused, Unused.used, values)
