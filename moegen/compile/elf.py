# SPDX-License-Identifier: Apache-2.0
"""ELF files, read without loading them: the exact identity of a library, and whether what a compiler wrote is sound."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

EM_CUDA = 190
_ET_DYN = 3
_SYMBOL_TABLES = (2, 11)
_SHT_NOBITS = 8
_HEADER_BYTES, _SECTION_BYTES, _SYMBOL_BYTES = 64, 64, 24
_PT_NOTE = 4
_SHT_NOTE = 7
_NT_GNU_BUILD_ID = 3


def identity(library: Path) -> str:
    """`build-id <hex>`, or `sha256 <hex>` of the whole file where a library has no build-id."""
    found = build_id(library)
    if found is not None:
        return f"build-id {found}"
    digest = hashlib.sha256()
    with library.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return f"sha256 {digest.hexdigest()}"


def build_id(library: Path) -> str | None:
    """The GNU build-id of a 64-bit little-endian ELF file in hex; None if it has none or is something else."""
    with library.open("rb") as file:
        try:
            return _build_id(file)
        except struct.error:
            return None


def _build_id(file: BinaryIO) -> str | None:
    head = file.read(64)
    if head[:6] != b"\x7fELF\x02\x01":
        return None
    segments, sections = struct.unpack_from("<QQ", head, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", head, 54)
    # NVRTC 12.8's segment of notes holds zeros since the wheel was patched; its section table is right.
    places = [*_table(file, segments, segment_size, segment_count, "<I4xQ16xQ", _PT_NOTE)]
    places += _table(file, sections, section_size, section_count, "<4xI16xQQ", _SHT_NOTE)
    for offset, size in places:
        file.seek(offset)
        if (found := _find_note(file.read(size))) is not None:
            return found
    return None


def _table(file: BinaryIO, at: int, size: int, count: int, layout: str, kind: int) -> Iterator[tuple[int, int]]:
    """(offset, size) in the file of each entry of that kind in the table of segments or sections."""
    for index in range(count):
        file.seek(at + index * size)
        found, offset, length = struct.unpack_from(layout, file.read(size))
        if found == kind:
            yield offset, length


def _find_note(notes: bytes) -> str | None:
    position = 0
    while position + 12 <= len(notes):
        name_size, value_size, kind = struct.unpack_from("<III", notes, position)
        name_at = position + 12
        value_at = name_at + (name_size + 3) // 4 * 4
        if kind == _NT_GNU_BUILD_ID and notes[name_at : name_at + name_size] == b"GNU\0":
            return notes[value_at : value_at + value_size].hex()
        position = value_at + (value_size + 3) // 4 * 4
    return None


def defect(content: bytes, symbol: str, *, machine: int, shared: bool) -> str:
    """What keeps a compiler's output from being used, "" if nothing does. A compiler may exit with 0 behind a full disk
    or a wrapper that hides its failure.

    Args:
        symbol: a part of one that it must define.
        machine: of the ELF header.
        shared: whether it is a library to be loaded.
    """
    if content[:6] != b"\x7fELF\x02\x01":
        return f"the compiler succeeded, but its output of {len(content)} bytes is no 64-bit ELF file"
    try:
        kind, found = struct.unpack_from("<HH", content, 16)
        sections = _sections(content)
        names = list(_defined(content, sections))
    except (struct.error, IndexError, ValueError):
        return f"the compiler succeeded, but its output ends early, behind {len(content)} bytes"
    if found != machine or (shared and kind != _ET_DYN):
        return f"the compiler succeeded, but its output is for another use (ELF type {kind}, machine {found})"
    if not any(symbol.encode() in name for name in names):
        return f"the compiler succeeded, but its output does not define {symbol}"
    return ""


def machine_of(program: Path) -> int:
    """The ELF header's number of the processor that a program is for."""
    with program.open("rb") as file:
        return int.from_bytes(file.read(20)[18:], "little")


_Section = tuple[int, int, int, int]
"""Type, offset, size, and the number of the section that it refers to."""


def _sections(content: bytes) -> list[_Section]:
    """Raises ValueError if one, or a segment, lies beyond the end."""
    segments, start = struct.unpack_from("<QQ", content, 32)
    segment_size, segment_count, size, count = struct.unpack_from("<4H", content, 54)
    if segments + segment_size * segment_count > len(content):
        raise ValueError("beyond the end")
    if size != _SECTION_BYTES or count == 0 or start < _HEADER_BYTES or start + count * size > len(content):
        raise ValueError("no table of sections")
    sections = []
    for index in range(count):
        kind, offset, length, other = struct.unpack_from("<4xI16xQQI", content, start + index * size)
        if kind != _SHT_NOBITS and offset + length > len(content):
            raise ValueError("beyond the end")
        sections.append((kind, offset, length, other))
    return sections


def _defined(content: bytes, sections: list[_Section]) -> Iterator[bytes]:
    """The names of symbols that are defined here."""
    for kind, offset, length, names in sections:
        if kind not in _SYMBOL_TABLES:
            continue
        _, first_name, size, _ = sections[names]
        strings = content[first_name : first_name + size]
        for at in range(offset, offset + length - _SYMBOL_BYTES + 1, _SYMBOL_BYTES):
            name, section = struct.unpack_from("<I2xH", content, at)
            if section != 0:
                yield strings[name : strings.index(b"\0", name)]
