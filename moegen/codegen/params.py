# SPDX-License-Identifier: Apache-2.0
"""The one argument of every kernel: a struct, declared here once, from which the C text and the packing follow."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from functools import cached_property

_FORMAT = {"uint64_t": "Q", "int64_t": "q", "uint32_t": "I", "int32_t": "i", "Blocks": "II"}


@dataclass(frozen=True)
class Param:
    """One member: a C type (a pointer type is 8 bytes), a name, what it means, and its length if it is an array.

    Attributes:
        when: whether the kernel reads it. Else it is left out of the kernel's struct, and callers give a value all the
            same: they describe the op, and need not know what each of its kernels does.
    """

    ctype: str
    name: str
    note: str
    length: int | None = None
    when: bool = field(default=True, kw_only=True)

    @property
    def format(self) -> str:
        return _FORMAT.get(self.ctype, "Q")

    @property
    def numbers(self) -> int:
        """Values that it takes."""
        return self.length or 1

    @property
    def declaration(self) -> str:
        array = "" if self.length is None else f"[{self.length}]"
        return f"{self.ctype} {self.name}{array};"


def read_if(holds: bool, *params: Param) -> tuple[Param, ...]:
    """These, each of which is left out unless this and its own condition hold."""
    return tuple(replace(param, when=holds and param.when) for param in params)


@dataclass(frozen=True)
class ParamStruct:
    """Members in order, 8-byte ones first so that nothing is padded but the end.

    Attributes:
        declared: all that the op has, also what this kernel leaves out.
    """

    declared: tuple[Param, ...]

    def __post_init__(self) -> None:
        sizes = [struct.calcsize("=" + param.format) for param in self.declared]
        if sizes != sorted(sizes, reverse=True):
            raise ValueError("8-byte parameters come before 4-byte ones")

    @cached_property
    def members(self) -> tuple[Param, ...]:
        """What the kernel reads."""
        return tuple(param for param in self.declared if param.when)

    @cached_property
    def left_out(self) -> frozenset[str]:
        """Names of what it does not read."""
        return frozenset(param.name for param in self.declared if not param.when)

    @cached_property
    def packer(self) -> struct.Struct:
        """Packs the members' values, in order, arrays flattened."""
        body = "".join(f"{member.numbers}{member.format}" for member in self.members)
        return struct.Struct("=" + body + "x" * (-struct.calcsize("=" + body) % 8))

    @property
    def size(self) -> int:
        """Bytes, as sizeof() gives in C."""
        return self.packer.size

    @property
    def declarations(self) -> list[tuple[str, str]]:
        """(declaration, note) of each member, for the template."""
        width = max(len(member.declaration) for member in self.members)
        return [(member.declaration.ljust(width), member.note) for member in self.members]
