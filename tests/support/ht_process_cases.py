# SPDX-License-Identifier: Apache-2.0
"""What a process does with a `HighThroughput` of its group, the default one."""

from __future__ import annotations

import torch

from support.ht_layer import (
    RowsResult,
    RowsShape,
    expected_of,
    expert_outputs,
    inputs_of,
    make,
    on_cpu,
    row_weights,
    verify_combine,
    verify_dispatch,
)
from support.layer import random_routing
from support.ll_cases import delay


def round_trips(rank: int, device: str, shape: RowsShape, rounds: int) -> str:
    """Pairs with zero tokens now and then, fresh and by a handle, all verified."""
    torch.set_num_threads(1)
    with make(torch.distributed.group.WORLD, shape, device=device) as layer:
        for seed in range(rounds):
            tokens = [0 if (r + seed) % 3 == 0 else (29 * r + 41 * seed) % (shape.max_tokens + 1)
                      for r in range(shape.ranks)]  # fmt: skip
            routing = random_routing(shape, tokens, seed, kind=("uniform", "free", "one")[seed % 3])
            mine = inputs_of(shape, routing, rank, device, biases=seed % 3)
            expected = expected_of(shape, routing)
            received = layer.dispatch(mine.x, mine.ids, mine.weights)
            again = layer.dispatch(mine.x, handle=received.handle)
            y = expert_outputs(again)
            weights = row_weights(received) if shape.layout == "token" else None
            combined, sums = layer.combine(y, again.handle, weights, bias=mine.biases)
            layer.synchronize()
            verify_dispatch(rank, shape, expected[rank], on_cpu(received))
            verify_dispatch(rank, shape, expected[rank], on_cpu(again), by_handle=True)
            cpu = [None if part is None else part.cpu() for part in (y, weights, combined, sums)]
            results = [RowsResult({}, *parts) for parts in layer.world.exchange(cpu)]
            verify_combine(shape, routing, expected, results, biases=seed % 3)
    return "ok"


def back_to_back(rank: int, device: str, shape: RowsShape, pairs: int, late: bool = False) -> int:
    """No rank waits for another but in kernels, and if `late` each is late now and then; numbers in which a result
    differs from the first.
    """
    generator = torch.Generator().manual_seed(rank)
    with make(torch.distributed.group.WORLD, shape, device=device) as layer:
        routing = random_routing(shape, [(17 * r + 9) % 40 for r in range(shape.ranks)], 1, kind="free")
        mine = inputs_of(shape, routing, rank, device)
        wrong, wanted = torch.zeros((), dtype=torch.int64, device=device), None
        for _ in range(pairs):
            if late:
                delay(device, generator)
            received = layer.dispatch(mine.x, mine.ids, mine.weights)
            combined, _ = layer.combine(expert_outputs(received), received.handle)
            wanted = combined if wanted is None else wanted
            wrong += (combined != wanted).sum()
        layer.synchronize()
        return int(wrong)
