# SPDX-License-Identifier: Apache-2.0
"""What a GPU runs of a cubin, without what only names it: two cubins with equal parts are the same machine code.

Strings, symbols, notes and unwind tables are left out. What refers to a symbol by its number (`.nv.info`, relocations)
is compared by what that symbol stands for, as numbers and names follow from those of everything else in a text.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_NOBITS = 8
_REL, _RELA = 9, 4
_COMPARED = (".text", ".nv.info", ".nv.constant", ".nv.shared", ".nv.local")

# The module's name holds a digest of things that do not matter.
_INTERNAL = re.compile(r"\d*_INTERNAL_[0-9a-f]+_\d+_\w*?_cu_[0-9a-f]{8}")

# .nv.info: tag, length, content. These tags' contents begin with the number of a symbol, or are one.
_SIZED = 4
_OF_SYMBOLS = {0x0A: "PARAM_CBANK", 0x0F: "EXTERNS", 0x11: "FRAME_SIZE", 0x12: "MIN_STACK_SIZE"}
_OF_SYMBOLS |= {0x23: "MAX_STACK_SIZE", 0x2F: "REGCOUNT"}


@dataclass(frozen=True)
class Section:
    name: str
    kind: int
    size: int
    link: int
    info: int
    content: bytes


@dataclass(frozen=True)
class Symbol:
    name: str
    kind: int
    section: int
    value: int
    size: int


class Cubin:
    """A 64-bit little-endian ELF file as NVRTC makes it.

    Args:
        symbol: the kernel's, for which a star stands in names.
    """

    def __init__(self, content: bytes, symbol: str) -> None:
        if content[:6] != b"\x7fELF\x02\x01":
            raise ValueError("no 64-bit ELF file")
        self._content = content
        self._symbol = symbol

    @property
    def parts(self) -> dict[str, str]:
        """Digest of each section that counts, by its name with a star for the kernel's."""
        found: dict[str, str] = {}
        for number, section in enumerate(self.sections):
            if section.name.startswith(_COMPARED):
                found[self.plain(section.name)] = self._digest(number, section)
        return found

    def bytes_of(self, prefix: str) -> int:
        return sum(section.size for section in self.sections if section.name.startswith(prefix))

    def plain(self, name: str) -> str:
        """A name without what the kernel's own name and the rest of its text put into it."""
        return plain(name, self._symbol)

    @cached_property
    def sections(self) -> list[Section]:
        (table,) = struct.unpack_from("<Q", self._content, 40)
        count, names = struct.unpack_from("<HH", self._content, 60)
        raw = [struct.unpack_from("<IIQQQQIIQQ", self._content, table + 64 * index) for index in range(count)]
        strings = self._content[raw[names][4] :]
        return [
            Section(_text(strings, name), kind, size, link, info, self._bytes(kind, offset, size))
            for name, kind, _, _, offset, size, link, info, _, _ in raw
        ]

    @cached_property
    def symbols(self) -> list[Symbol]:
        (table,) = (section for section in self.sections if section.name == ".symtab")
        strings = self.sections[table.link].content
        return [
            Symbol(_text(strings, name), info & 15, section, value, size)
            for name, info, _, section, value, size in struct.iter_unpack("<IBBHQQ", table.content)
        ]

    def _bytes(self, kind: int, offset: int, size: int) -> bytes:
        return b"" if kind == _NOBITS else self._content[offset : offset + size]

    def _digest(self, number: int, section: Section) -> str:
        sha = hashlib.sha256(f"{section.size}:".encode())
        if section.name.startswith(".nv.info"):
            sha.update(repr(self.info(section.content)).encode())
        else:
            sha.update(section.content)
            sha.update(repr(list(self._relocations(number))).encode())
        return sha.hexdigest()

    def info(self, content: bytes) -> list[tuple[str, str]]:
        """(tag, content in hex) of what `.nv.info` says; what is about symbols comes last, in a fixed order."""
        said, of_symbols = [], []
        for tag, value in _entries(content):
            if tag in _OF_SYMBOLS:
                of_symbols.append((_OF_SYMBOLS[tag], self._said_of_symbol(tag, value)))
            else:
                said.append((f"{tag:#04x}", value.hex()))
        return said + sorted(of_symbols)

    def _said_of_symbol(self, tag: int, value: bytes) -> str:
        numbers = [int.from_bytes(value[at : at + 4], "little") for at in range(0, len(value), 4)]
        of = len(numbers) if _OF_SYMBOLS[tag] == "EXTERNS" else 1
        return " ".join([self._place(number) for number in numbers[:of]] + [f"{number:#x}" for number in numbers[of:]])

    def _relocations(self, number: int) -> Iterator[tuple[int, int, str, int]]:
        """(offset, kind, what it is set to, addend) of each in that section."""
        for section in self.sections:
            if section.info == number and section.kind in (_REL, _RELA):
                layout = "<QQq" if section.kind == _RELA else "<QQ"
                for offset, info, *addend in sorted(struct.iter_unpack(layout, section.content)):
                    yield offset, info & 0xFFFFFFFF, self._place(info >> 32), *(addend or [0])

    def _place(self, number: int) -> str:
        """What a symbol stands for: data by its content, code by its place, what is not here by its name."""
        symbol = self.symbols[number]
        if not 0 < symbol.section < len(self.sections):
            return self.plain(symbol.name)
        section = self.sections[symbol.section]
        name = self.plain(section.name)
        if section.name.startswith(".nv.global") and symbol.size:
            content = section.content[symbol.value : symbol.value + symbol.size]
            return f"data {content.ljust(symbol.size, bytes(1)).hex()}"
        return f"{name}+{symbol.value:#x} {symbol.size}"


def plain(text: str, symbol: str) -> str:
    """With a star for the kernel's own name, and without the digests that NVRTC puts into names."""
    return _INTERNAL.sub("INTERNAL", text).replace(symbol, "*")


def _entries(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(content):
        form, tag = content[at], content[at + 1]
        (word,) = struct.unpack_from("<H", content, at + 2)
        end = at + 4 + (word if form == _SIZED else 0)
        yield tag, content[at + 4 : end] if form == _SIZED else content[at + 2 : at + 4]
        at = end


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(b"\0", at)].decode()
