# SPDX-License-Identifier: Apache-2.0
"""`python -m moegen.compile.worker BATCH`: compiles a batch of recipes into the cache, for ninja.

Starting Python and NVRTC costs more than a kernel, so ninja's edges are batches. For each recipe a file appears in
`done/`, and a pickled CompileError in `failed/` if it did not compile.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from moegen.compile import binary
from moegen.errors import CompileError


def main() -> int:
    batch = Path(sys.argv[1])
    # Written by this process's parent into its own 0700 folder.
    recipes = pickle.loads(batch.read_bytes())
    compiler = binary.toolchain(recipes[0].target).identity()
    if any(recipe.compiler != compiler for recipe in recipes):
        # The parent had another libnvrtc loaded; it compiles these itself.
        return 2
    for recipe in recipes:
        try:
            binary.make(recipe)
        except CompileError as error:
            (batch.parent / "failed" / recipe.key).write_bytes(pickle.dumps(error))
        (batch.parent / "done" / recipe.key).touch()
    (batch.parent / f"{batch.stem}.stamp").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
