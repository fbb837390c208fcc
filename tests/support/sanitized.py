# SPDX-License-Identifier: Apache-2.0
"""Round trips of virtual ranks on one GPU, as a program to run under compute-sanitizer.

Kernels load lazily here (the sanitizer would instrument all of torch otherwise), and loading one waits for those that
run: the ranks go in step.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from support.ht_layer import RowsLayer, RowsShape  # noqa: E402
from support.layer import Layer, Shape, random_routing  # noqa: E402

SHAPES = (
    Shape(1, 5, 5, 512, 70),
    Shape(2, 13, 8, 2880, 65),
    Shape(3, 9, 5, 2880, 37),
    Shape(4, 256, 8, 512, 80),
    Shape(8, 20, 6, 96, 66),
)
ROWS_SHAPES = (
    RowsShape(1, 13, 8, 512, "packed", "fp8_ue8m0", alignment=128),
    RowsShape(3, 9, 5, 2880, "token"),
    RowsShape(3, 10, 3, 24, "packed", alignment=4, max_tokens=150),
    RowsShape(4, 16, 4, 512, "token", "given"),
)
"""Mode exact makes results between two launches, and what torch loads for that waits for the other ranks."""


def high_throughput() -> None:
    for shape in ROWS_SHAPES:
        layer = RowsLayer(shape, "cuda", timeout=60.0)
        for rank in layer.ranks:
            rank.synchronize()
        for seed, kind in enumerate(("uniform", "free", "none")):
            tokens = [(11 * seed + 17 * rank) % 40 for rank in range(shape.ranks)]
            routing = random_routing(shape, tokens, seed, kind=kind)
            layer.verify(routing, layer.round_trip(routing, narrow=seed % 2 == 1))
        layer.destroy()
        print(f"{shape}: ok", flush=True)


def main() -> None:
    for shape in SHAPES:
        layer = Layer(shape, "cuda", timeout=60.0)
        for seed, kind in enumerate(("uniform", "free", "one", "none")):
            tokens = [(11 * seed + 17 * rank) % min(shape.max_tokens, 40) for rank in range(shape.ranks)]
            routing = random_routing(shape, tokens, seed, kind=kind)
            for late in (False, True):
                layer.verify(routing, layer.round_trip(routing, late=late, narrow_ids=seed % 2 == 1, in_step=True))
        layer.destroy()
        print(f"{shape}: ok", flush=True)
    high_throughput()


if __name__ == "__main__":
    main()
