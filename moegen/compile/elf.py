# SPDX-License-Identifier: Apache-2.0
"""Exact identity of a shared library: its GNU build-id, read from the file without loading it."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import BinaryIO

_PT_NOTE = 4
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
    table = struct.unpack_from("<Q", head, 32)[0]
    entry_size, entries = struct.unpack_from("<HH", head, 54)
    for index in range(entries):
        file.seek(table + index * entry_size)
        entry = file.read(entry_size)
        if struct.unpack_from("<I", entry, 0)[0] == _PT_NOTE:
            offset, size = struct.unpack_from("<Q", entry, 8)[0], struct.unpack_from("<Q", entry, 32)[0]
            file.seek(offset)
            found = _find_note(file.read(size))
            if found is not None:
                return found
    return None


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
