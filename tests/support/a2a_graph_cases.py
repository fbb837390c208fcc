# SPDX-License-Identifier: Apache-2.0
"""`OneSided` in CUDA graphs: captured once, replayed with other tokens and routings, and none on some ranks or all."""

from __future__ import annotations

from typing import Any

import torch

from support.a2a_data import Batch, PayloadShape, random_batch
from support.a2a_layer import make
from support.capturing import captured

SHAPES = (
    PayloadShape(2, 16, 4, 512, "layer", "pulled"),
    PayloadShape(2, 13, 8, 512, "sixteen", "pushed", "fp16", "fp32", max_tokens=90),
    PayloadShape(4, 64, 6, 128, "fp8", "pulled", "fp32", "bf16"),
)
REPLAYS = 200
IDLE = ((), (0,), (1,), (0, 1), ())
"""Ranks that have no tokens in a step, of the first two; the others have some in all but one."""


def batches(shape: PayloadShape) -> list[Batch]:
    made = []
    for step, idle in enumerate(IDLE):
        most = shape.max_tokens + 1
        counts = [0 if rank in idle or (step == 3 and rank > 1) else (step * 7 + 13 * rank + 5) % most
                  for rank in range(shape.ranks)]  # fmt: skip
        made.append(random_batch(shape, counts, step, ("uniform", "free", "one")[step % 3]))
    assert any(sum(batch.tokens) == 0 for batch in made)
    return made


def factors(plane: torch.Tensor) -> torch.Tensor:
    """A number for each slot."""
    ranks, slots = plane.shape[:2]
    return (torch.arange(ranks * slots, device=plane.device) % 5 - 2).view(ranks, slots, 1)


class Static:
    """One rank's inputs of the captured calls."""

    def __init__(self, shape: PayloadShape) -> None:
        rows = shape.max_tokens
        self.ids = torch.full((rows, shape.topk), -1, device="cuda")
        self.payloads = [torch.zeros(rows, width, dtype=dtype, device="cuda") for width, dtype in shape.columns]
        self.number = torch.zeros(1, dtype=torch.int32, device="cuda")

    def take(self, ids: torch.Tensor, payloads: list[torch.Tensor]) -> None:
        self.number.fill_(len(ids))
        self.ids[: len(ids)].copy_(ids)
        for target, value in zip(self.payloads, payloads, strict=True):
            target.view(torch.uint8)[: len(ids)].copy_(value.view(torch.uint8))


def replays(world: Any, shape: PayloadShape) -> int:
    """Numbers in which replays differ from the same calls made one by one."""
    given = [
        (batch.ids[world.rank].cuda(), [part.cuda() for part in batch.payloads[world.rank]]) for batch in batches(shape)
    ]
    with make(world, shape) as layer:
        y = torch.ones(shape.ranks, shape.max_tokens, shape.hidden, device="cuda")
        y = (y * factors(y)).to(layer.dtype)
        wanted = []
        for ids, payloads in given:
            layer.synchronize()
            world.barrier()
            received = layer.dispatch(ids, payloads)
            combined = layer.combine(y, received.handle, out_dtype=shape.out_dtype)
            layer.synchronize()
            bits = [plane.view(torch.uint8).clone() for plane in received.payloads]
            wanted.append((received.counts.clone(), bits, combined))
        static = Static(shape)
        slots = torch.arange(shape.max_tokens, device="cuda")
        layer.synchronize()
        world.barrier()
        graph = torch.cuda.CUDAGraph()
        with captured(graph):
            received = layer.dispatch(static.ids, static.payloads, num_tokens=static.number)
            kept = [plane.view(torch.uint8).clone() for plane in received.payloads]
            combined = layer.combine(y, received.handle, out_dtype=shape.out_dtype)
            again = layer.combine(y, received.handle, out_dtype=shape.out_dtype)
        world.barrier()
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for replay in range(REPLAYS):
            step = replay * 3 % len(given)
            static.take(*given[step])
            counts, bits, expected = wanted[step]
            graph.replay()
            wrong += (received.counts != counts).sum()
            used = (slots < counts[:, None])[:, :, None]
            for found, value in zip(kept, bits, strict=True):
                wrong += ((found != value) & used).sum()
            for found in (combined, again):
                wrong += (found[: len(expected)] != expected).sum()
        layer.synchronize()
        return int(wrong)
