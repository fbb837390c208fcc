# SPDX-License-Identifier: Apache-2.0
"""The one argument of every kernel: a struct, declared here once, from which the C text and the packing follow."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

_FORMAT = {"uint64_t": "Q", "int64_t": "q", "uint32_t": "I", "int32_t": "i", "Blocks": "II"}


@dataclass(frozen=True)
class Param:
    """One member: a C type (a pointer type is 8 bytes), a name, what it means, and its length if it is an array."""

    ctype: str
    name: str
    note: str
    length: int | None = None

    @property
    def format(self) -> str:
        return _FORMAT.get(self.ctype, "Q")

    @property
    def declaration(self) -> str:
        array = "" if self.length is None else f"[{self.length}]"
        return f"{self.ctype} {self.name}{array};"


@dataclass(frozen=True)
class ParamStruct:
    """Members in order, 8-byte ones first so that nothing is padded but the end."""

    members: tuple[Param, ...]

    def __post_init__(self) -> None:
        sizes = [struct.calcsize("=" + member.format) for member in self.members]
        if sizes != sorted(sizes, reverse=True):
            raise ValueError("8-byte parameters come before 4-byte ones")

    @cached_property
    def packer(self) -> struct.Struct:
        """Packs the members' values, in order, arrays flattened."""
        body = "".join(f"{member.length or 1}{member.format}" for member in self.members)
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
