# SPDX-License-Identifier: Apache-2.0
"""A loaded kernel with its parameter struct half filled in: what does not change between calls is packed once."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch

from moegen.kernels.params import ParamStruct
from moegen.kernels.spec import Spec
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.watchdog import Watchdog


class BoundKernel:
    """Calling it launches the kernel with new values for the members, or arrays, named `varying`, in that order."""

    def __init__(
        self,
        kernel: LoadedKernel,
        params: ParamStruct,
        blocks: int,
        fixed: Mapping[str, int | Sequence[int]],
        varying: Sequence[str],
    ) -> None:
        self._packer = params.packer
        self._buffer = ctypes.create_string_buffer(params.size)
        self._start = kernel.launcher(self._buffer, blocks)
        self._values: list[int] = []
        places: dict[str, int] = {}
        for member in params.members:
            places[member.name] = len(self._values)
            value = fixed.get(member.name, 0 if member.length is None else (0,) * member.length)
            self._values += [value] if isinstance(value, int) else list(value)
        unknown = (set(fixed) | set(varying)) ^ set(places)
        if unknown or set(fixed) & set(varying):
            raise AssertionError(f"parameters not bound exactly once: {unknown or set(fixed) & set(varying)}")
        lengths = {member.name: member.length or 1 for member in params.members}
        self._places = [places[name] + index for name in varying for index in range(lengths[name])]

    def __call__(self, *varying: int) -> None:
        values = self._values
        for place, value in zip(self._places, varying, strict=True):
            values[place] = value
        self._packer.pack_into(self._buffer, 0, *values)
        self._start()


class BoundKernels:
    """The kernels that an object has bound so far, each with what it reports. A new set of payloads brings new ones."""

    def __init__(self) -> None:
        self._bound: dict[Spec, tuple[BoundKernel, Watchdog]] = {}

    @property
    def specs(self) -> tuple[Spec, ...]:
        return tuple(self._bound)

    def knows(self, spec: Spec) -> bool:
        return spec in self._bound

    def raise_expired(self) -> None:
        for _, watchdog in self._bound.values():
            watchdog.raise_expired()

    def raise_what_happened(self) -> None:
        for _, watchdog in self._bound.values():
            watchdog.raise_what_happened()


def address(tensor: torch.Tensor | None) -> int:
    """Of its memory; null if there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def signed(word: int) -> int:
    """A 32-bit word as torch's int32 takes it."""
    return word - 2**32 if word >= 2**31 else word
