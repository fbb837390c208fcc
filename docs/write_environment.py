# SPDX-License-Identifier: Apache-2.0
"""Writes `docs/environment.md` from the table in `moegen/env.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "environment.md"

HEAD = """# Environment variables

Every variable that moegen reads. They are read when they are needed, not at import; a value that is not allowed raises
`InputError`. This page is written by `python docs/write_environment.py` from `moegen/env.py`.

| variable | value | default | meaning |
|---|---|---|---|
"""


def page() -> str:
    from moegen.env import VARIABLES

    rows = ((f"`{v.name}`", v.kind, v.default, v.meaning) for v in VARIABLES.values())
    return HEAD + "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    TARGET.write_text(page())
