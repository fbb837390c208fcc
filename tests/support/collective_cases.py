# SPDX-License-Identifier: Apache-2.0
"""Path collective of `OneSided`: what path ipc gives is what is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moegen
from moegen import errors

EXPERTS, TOPK, HIDDEN, MOST = 21, 4, 128, 23


def make(world: Any, device: str, path: str, **more: Any) -> moegen.OneSided:
    return moegen.OneSided(
        world,
        num_experts=EXPERTS,
        num_topk=TOPK,
        max_tokens_per_rank=MOST,
        payload_bytes=2 * HIDDEN + 8 * TOPK + 3,
        hidden=HIDDEN,
        device=device,
        path=path,
        **more,
    )


def inputs(rank: int, size: int, seed: int, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Ranks with no tokens among them."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = 0 if (rank + seed) % 3 == 0 else (7 * rank + 5 * seed) % (MOST + 1)
    ids = torch.randint(-1, EXPERTS, (tokens, TOPK), generator=generator).to(device, torch.int32)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(device, torch.bfloat16)
    small = torch.randint(0, 255, (tokens, 3), generator=generator).to(device, torch.uint8)
    return ids, [x, ids, torch.rand(tokens, TOPK, generator=generator).to(device), small]


def outputs(received: moegen.DispatchedPayloads, rank: int) -> torch.Tensor:
    """A factor for each rank; what nothing came for is not a number."""
    rows = received.payloads[0].float() * (rank + 1)
    slot = torch.arange(rows.shape[1], device=rows.device)
    return rows.bfloat16().masked_fill_((slot >= received.counts[:, None])[:, :, None], torch.nan)


def compare_with_ipc(world: Any, device: str, rounds: int) -> str:
    """Every result of both paths, bit by bit, with sizes that change from call to call."""
    with make(world, device, "ipc") as right, make(world, device, "collective") as layer:
        rank, size = layer.rank, layer.num_ranks
        for seed in range(rounds):
            ids, payloads = inputs(rank, size, seed, device)
            most = MOST if seed < 5 else max(1, *(len(inputs(r, size, seed, "cpu")[0]) for r in range(size)))
            stats = torch.arange(7, dtype=torch.int32, device=device) + 100 * rank
            options: dict[str, Any] = {"stats": stats, "unused_ids": (1, -5), "max_tokens": most}
            results = []
            for each in (right, layer):
                received = each.dispatch(ids, payloads, **options)
                parts = [part.clone() for part in received.payloads]  # combine lets the others write there again
                combined = each.combine(outputs(received, rank), received.handle)
                each.synchronize()
                results.append((received, parts, combined))
            (wanted, rows, sums), (found, own_rows, mine) = results
            assert torch.equal(wanted.counts, found.counts)
            assert wanted.stats is not None and found.stats is not None and torch.equal(wanted.stats, found.stats)
            for a, b in zip(rows, own_rows, strict=True):
                for source, count in enumerate(wanted.counts.tolist()):
                    assert torch.equal(a[source, :count].view(torch.uint8), b[source, :count].view(torch.uint8))
            assert torch.equal(rows[1], own_rows[1])  # unused ids are filled
            assert torch.equal(sums, mine)
    return "ok"


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, pytest.param(16, marks=pytest.mark.slow)])
def test_equals_path_ipc(device: str, ranks: int) -> None:
    assert moegen.LocalWorld(ranks, device).run(compare_with_ipc, device, 7) == ["ok"] * ranks


def test_what_only_path_ipc_has(device: str) -> None:
    def work(world: Any) -> None:
        with make(world, device, "collective") as layer:
            ids, payloads = inputs(world.rank, 2, 1, device)
            with pytest.raises(errors.InputError, match="all ranks take part"):
                layer.dispatch(ids, payloads, active_ranks=1 << world.rank)

    moegen.LocalWorld(2, device).run(work)
