# SPDX-License-Identifier: Apache-2.0
"""Round trips of virtual ranks on one GPU, as a program to run under compute-sanitizer.

Kernels load lazily here (the sanitizer would instrument all of torch otherwise), and loading one waits for those that
run: the ranks go in step. A rank without tokens launches none of torch's kernels, and another one that needs one for
the first time may wait for a launch that waits for it: in the first round of each layer every rank has tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from support.a2a_data import How, PayloadShape, random_batch  # noqa: E402
from support.a2a_layer import PayloadLayer  # noqa: E402
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

PAYLOAD_SHAPES = (
    PayloadShape(1, 8, 8, 512, "sixteen", "pulled", "bf16", "fp32"),
    PayloadShape(2, 13, 3, 512, "sixteen", "pushed", "fp32", "bf16"),
    PayloadShape(3, 9, 2, 24, "small", "pushed", "fp32"),
    PayloadShape(4, 384, 8, 2880, "fp8", "pulled", "fp8", "fp16", max_tokens=70),
)

PATIENCE = 200.0
"""Seconds: the sanitizer is slow, and slower where tests share the GPU."""


def tokens_of(ranks: int, most: int, seed: int) -> list[int]:
    """Different on each rank; none for rank 0 in the third round."""
    first = {0: 5, 2: 0}.get(seed, 11 * seed)
    return [(first + 17 * rank) % most for rank in range(ranks)]


def one_sided() -> None:
    for shape in PAYLOAD_SHAPES:
        layer = PayloadLayer(shape, "cuda", timeout=PATIENCE)
        ids = [index for index, (_, dtype) in enumerate(shape.columns) if dtype == torch.int32]
        for seed, kind in enumerate(("uniform", "free", "none")):
            tokens = tokens_of(shape.ranks, shape.max_tokens + 1, seed)
            how = How(narrow=seed % 2 == 1, stats=7 * seed, unused_ids=(ids[0], -1) if ids else None)
            layer.round_trip(random_batch(shape, tokens, seed, kind), how)
        layer.destroy()
        print(f"{shape}: ok", flush=True)


def high_throughput() -> None:
    for shape in ROWS_SHAPES:
        layer = RowsLayer(shape, "cuda", timeout=PATIENCE)
        for rank in layer.ranks:
            rank.synchronize()
        for seed, kind in enumerate(("uniform", "free", "none")):
            tokens = tokens_of(shape.ranks, 40, seed)
            routing = random_routing(shape, tokens, seed, kind=kind)
            layer.verify(routing, layer.round_trip(routing, narrow=seed % 2 == 1))
        layer.destroy()
        print(f"{shape}: ok", flush=True)


def main() -> None:
    for shape in SHAPES:
        layer = Layer(shape, "cuda", timeout=PATIENCE)
        for seed, kind in enumerate(("uniform", "free", "one", "none")):
            tokens = tokens_of(shape.ranks, min(shape.max_tokens, 40), seed)
            routing = random_routing(shape, tokens, seed, kind=kind)
            for late in (False, True):
                layer.verify(routing, layer.round_trip(routing, late=late, narrow_ids=seed % 2 == 1, in_step=True))
        layer.destroy()
        print(f"{shape}: ok", flush=True)
    high_throughput()
    one_sided()


if __name__ == "__main__":
    main()
