# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput` in CUDA graphs: captured once, replayed with other tokens, other routings and none at all."""

from __future__ import annotations

from typing import Any

import torch

from support.capturing import captured
from support.ht_layer import RowsShape, expert_outputs, inputs_of, make
from support.layer import random_routing

SHAPES = (RowsShape(2, 16, 4, 512, "token", "given"), RowsShape(2, 13, 8, 512, "packed", alignment=4))
REPLAYS = 200


def replays(world: Any, shape: RowsShape) -> int:
    """Numbers in which replays differ from the same calls made one by one."""
    routings = [
        random_routing(
            shape,
            [((7 + 6 * r) * step + 5 * r) % 41 for r in range(shape.ranks)],
            step,
            kind=("uniform", "free", "one")[step % 3],
        )
        for step in range(6)
    ]
    device = torch.device("cuda")
    with make(world, shape) as layer:
        mine = [inputs_of(shape, routing, world.rank, "cuda") for routing in routings]
        wanted = []
        for given in mine:
            received = layer.dispatch(given.x, given.ids, given.weights)
            combined, _ = layer.combine(expert_outputs(received), received.handle)
            wanted.append((received.counts.clone(), combined))
        parts = [given.x if isinstance(given.x, tuple) else (given.x,) for given in mine]
        rows = shape.max_tokens
        static = [torch.zeros(rows, *part.shape[1:], dtype=part.dtype, device=device) for part in parts[0]]
        ids = torch.zeros(rows, shape.topk, dtype=mine[0].ids.dtype, device=device)
        weights = torch.zeros(rows, shape.topk, device=device)
        count = torch.zeros(1, dtype=torch.int32, device=device)
        x: Any = tuple(static) if len(static) > 1 else static[0]
        layer.synchronize()
        world.barrier()
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            received = layer.dispatch(x, ids, weights, num_tokens=count)
            combined, _ = layer.combine(expert_outputs(received), received.handle)
            again = layer.dispatch(x, handle=received.handle)
            combined_again, _ = layer.combine(expert_outputs(again), again.handle)
        world.barrier()
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for replay in range(REPLAYS):
            step = replay * 5 % len(mine)
            given, (counts, expected) = mine[step], wanted[step]
            tokens = len(given.ids)
            count.fill_(tokens)
            for target, value in zip((*static, ids, weights), (*parts[step], given.ids, given.weights), strict=True):
                target[:tokens].copy_(value)
            graph.replay()
            wrong += (received.counts != counts).sum()
            for found in (combined, combined_again):
                wrong += (found[:tokens] != expected).sum()
        layer.synchronize()
        return int(wrong)
