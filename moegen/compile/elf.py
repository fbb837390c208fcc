# SPDX-License-Identifier: Apache-2.0
"""Exact identity of a shared library: its GNU build-id, read from the file without loading it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

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
