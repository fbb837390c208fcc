# SPDX-License-Identifier: Apache-2.0
"""`python -m moegen.compile.repro FOLDER`: compiles again what a failed compile left behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moegen.compile import nvrtc
from moegen.compile.recipe import Recipe
from moegen.compile.target import Target


def load(folder: Path) -> Recipe:
    """The recipe that `folder` holds, for the compiler in use."""
    about = json.loads((folder / "recipe.json").read_text())
    include = folder / "include"
    paths = sorted(path for path in include.rglob("*") if path.is_file()) if include.is_dir() else []
    headers = tuple((path.relative_to(include).as_posix(), path.read_bytes()) for path in paths)
    text = (folder / f"{about['stem']}.cu").read_text()
    return Recipe(about["stem"], Target(about["target"]), text, headers, tuple(about["options"]), nvrtc.identity())


def main() -> int:
    compiles, log = nvrtc.attempt(load(Path(sys.argv[1])))
    sys.stderr.write(f"{log}\n")
    return 0 if compiles else 1


if __name__ == "__main__":
    sys.exit(main())
