# SPDX-License-Identifier: Apache-2.0
"""What a process does with a `OneSided` of its group, the default one."""

from __future__ import annotations

import torch

from support.a2a_data import How, PayloadShape, expected_of, outputs_of, random_batch, verify_combine, verify_dispatch
from support.a2a_layer import Got, copied, given_of, make
from support.ll_cases import delay


def hows(shape: PayloadShape, rounds: int) -> list[How]:
    """Slots per source change; ids are filled in, statistics gathered, and tokens counted on the device in some."""
    ids = next(index for index, (_, dtype) in enumerate(shape.columns) if dtype == torch.int32)
    return [
        How(
            max_tokens=(None, 24, shape.max_tokens // 2)[step % 3],
            narrow=step % 2 == 1,
            unused_ids=(ids, -1) if step % 2 else None,
            stats=7 * (step % 3),
            told=tuple(3 * rank for rank in range(shape.ranks)) if step % 4 == 3 else None,
        )
        for step in range(rounds)
    ]


def round_trips(rank: int, device: str, shape: PayloadShape, rounds: int) -> str:
    """Pairs with zero tokens on some ranks, and once on all, each verified."""
    torch.set_num_threads(1)
    with make(torch.distributed.group.WORLD, shape, device=device) as layer:
        for seed, how in enumerate(hows(shape, rounds)):
            most = how.max_tokens or shape.max_tokens
            idle = [seed == 4 or (r + seed) % 3 == 0 for r in range(shape.ranks)]
            tokens = [0 if idle[r] else (29 * r + 41 * seed) % (most + 1) for r in range(shape.ranks)]
            batch = random_batch(shape, tokens, seed, ("uniform", "free", "one")[seed % 3])
            expected, given = expected_of(shape, batch, how), given_of(shape, batch, how, rank, device)
            received = layer.dispatch(given.ids, given.payloads, **given.options)
            planes = [copied(plane) for plane in received.payloads]
            y = outputs_of(shape, expected[rank], seed + rank)
            rows = y.to(device)
            if shape.rows == "pulled":
                rows = layer.expert_rows(y.shape[1]).copy_(rows)
            combined = layer.combine(rows, received.handle, out_dtype=shape.out_dtype)
            layer.synchronize()
            stats = None if received.stats is None else received.stats.cpu()
            mine = Got(planes, received.counts.cpu(), stats, y, combined.cpu())
            verify_dispatch(f"rank {rank}", expected[rank], mine, how, poisoned=False)
            sums = [Got([], mine.counts, None, *pair) for pair in layer.world.exchange((mine.y, mine.combined))]
            verify_combine(shape, batch, how, expected, sums)
    return "ok"


def back_to_back(rank: int, device: str, shape: PayloadShape, pairs: int, late: bool = False) -> int:
    """No rank waits for another but in kernels, and if `late` each is late now and then; numbers in which a sum differs
    from the first of its kind.
    """
    generator = torch.Generator().manual_seed(rank)
    with make(torch.distributed.group.WORLD, shape, device=device) as layer:
        slots = (shape.max_tokens, 9)
        batches = [random_batch(shape, [(17 * r + 9) % (n + 1) for r in range(shape.ranks)], n, "free") for n in slots]
        given = [given_of(shape, batch, How(max_tokens=n), rank, device)
                 for batch, n in zip(batches, slots, strict=True)]  # fmt: skip
        ys = [outputs_of(shape, expected_of(shape, batch, How(max_tokens=n))[rank], n).to(device)
              for batch, n in zip(batches, slots, strict=True)]  # fmt: skip
        wrong, wanted = torch.zeros((), dtype=torch.int64, device=device), {}
        for step in range(pairs):
            if late:
                delay(device, generator)
            now = step % 2
            received = layer.dispatch(given[now].ids, given[now].payloads, **given[now].options)
            rows = ys[now]
            if shape.rows == "pulled":
                rows = layer.expert_rows(rows.shape[1]).copy_(rows)
            combined = layer.combine(rows, received.handle, out_dtype=shape.out_dtype)
            wrong += (combined != wanted.setdefault(now, combined)).sum()
        layer.synchronize()
        return int(wrong)
