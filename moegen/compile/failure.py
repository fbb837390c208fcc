# SPDX-License-Identifier: Apache-2.0
"""What is kept of a failed compile: `failed/<stem>-<key>/` under the cache root, with a `repro.sh`."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path

from moegen.compile import cache
from moegen.compile.recipe import KEY_WORD, Recipe

log = logging.getLogger(__name__)

_REPRO = """#!/bin/sh
# Compiles {stem}.cu as moegen did and exits with the compiler's status.
# PYTHON names a Python that has moegen; without one, nvcc does.
cd "$(dirname "$0")" || exit 2
python=${{PYTHON:-python3}}
if "$python" -c 'import moegen' 2>/dev/null; then
    exec "$python" -m moegen.compile.repro .
fi
exec nvcc -std=c++20 -arch={arch} -Iinclude -cubin -o /dev/null {stem}.cu
"""


def keep(recipe: Recipe, files: dict[str, bytes], script: str = "") -> str:
    """Writes source, headers, options, `files` and repro.sh; returns the folder, "" if it cannot be written.

    Args:
        script: the text of repro.sh, if it is not the one for GPU kernels.
    """
    about = {"stem": recipe.stem, "target": recipe.target.name, "options": recipe.options, "compiler": recipe.compiler}
    contents = {f"{recipe.stem}.cu": recipe.text.encode(), "recipe.json": json.dumps(about, indent=1).encode(), **files}
    contents |= {f"include/{name}": content for name, content in recipe.headers if "/" in name}
    contents["repro.sh"] = (script or _REPRO.format(stem=recipe.stem, arch=recipe.target.arch)).encode()
    try:
        parent = cache.store().base / "failed"
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        place = parent / f"{recipe.stem}-{recipe.key[:KEY_WORD]}"
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=parent))
        for name, content in contents.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (made / "repro.sh").chmod(0o700)
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)
    except OSError as error:
        log.warning("event=failure_not_kept stem=%s error=%s", recipe.stem, error)
        return ""
    return str(place)
