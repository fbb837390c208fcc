# SPDX-License-Identifier: Apache-2.0
"""Real text that is on every machine with Python: its licence and the sources of its standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

FILES = ("LICENSE.txt", "this.py", "textwrap.py", "heapq.py", "ast.py", "argparse.py", "inspect.py")


def text() -> bytes:
    """The files' bytes, one after the other, some 300 KB.

    Raises:
        FileNotFoundError: this Python has its standard library in no folder.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    content = b"".join((folder / name).read_bytes() for name in FILES if (folder / name).is_file())
    if not content:
        raise FileNotFoundError(f"{folder} holds none of {', '.join(FILES)}: the demo has no text to work on")
    return content


def piece(content: bytes, start: int, length: int) -> list[int]:
    """`length` bytes from `start` on; after the last byte comes the first."""
    return [content[(start + offset) % len(content)] for offset in range(length)]
