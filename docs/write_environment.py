# SPDX-License-Identifier: Apache-2.0
"""Writes `docs/environment.md` from the table in `moegen/env.py`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from moegen import env

    (ROOT / "docs" / "environment.md").write_text(env.markdown())
