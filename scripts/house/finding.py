# SPDX-License-Identifier: Apache-2.0
"""What a measure finds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Finding(NamedTuple):
    """One thing to mend.

    Attributes:
        place: a kernel's stem, or a file relative to the tree; several are separated by commas.
        line: its line there, from 1 on; 0: none.
        name: what was found.
    """

    place: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.place}{f':{self.line}' if self.line else ''}: {self.name}"


def line_of(text: str, offset: int) -> int:
    """The line, from 1 on, of a place in a text."""
    return text.count("\n", 0, offset) + 1


def relative(path: Path, root: Path = ROOT) -> str:
    return path.relative_to(root).as_posix()
