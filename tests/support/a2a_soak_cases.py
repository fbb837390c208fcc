# SPDX-License-Identifier: Apache-2.0
"""`OneSided` back to back: ranks wait for each other in kernels only, and are late now and then; on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moegen.runtime.worlds import RankWorld
from support.a2a_cases import BOTH, one_thread_per_rank  # noqa: F401
from support.a2a_data import Got, How, PayloadShape, expected_of, random_batch
from support.a2a_layer import Given, PayloadLayer
from support.ll_cases import delay

HOWS = [How(max_tokens=slots) for slots in (24, 9, 17, None)]


@dataclass(frozen=True)
class Known:
    """One rank's part of a call that was verified: what it gives, and what it must get; on its device."""

    given: Given
    counts: torch.Tensor
    used: torch.Tensor
    rows: list[torch.Tensor]
    y: torch.Tensor
    combined: torch.Tensor

    def differs(self, received: Any) -> torch.Tensor:
        """Numbers in which the views of a dispatch, and its counts, are not what they must be."""
        planes = [plane.view(torch.uint8).flatten(0, 1)[self.used] for plane in received.payloads]
        wrong = [(plane != rows).sum() for plane, rows in zip(planes, self.rows, strict=True)]
        return torch.stack([*wrong, (received.counts != self.counts).sum()]).sum()


def known(layer: PayloadLayer, world: RankWorld, batch: Any, how: How, got: Got) -> Known:
    expected = expected_of(layer.shape, batch, how)[world.rank]
    used = expected.used.flatten().nonzero().flatten()
    rows = [plane.view(torch.uint8).flatten(0, 1)[used].to(world.device) for plane in expected.payloads]
    assert got.y is not None
    assert got.combined is not None
    parts = (got.counts, used, got.y, got.combined)
    counts, used, y, combined = (part.to(world.device) for part in parts)
    return Known(layer.given(batch, how, world.rank), counts, used, rows, y, combined)


def soak(device: str, shape: PayloadShape, rounds: int) -> None:
    """Of three rounds one only dispatches, and one combines twice; slots per source change from round to round."""
    layer = PayloadLayer(shape, device)
    batches = [
        random_batch(shape, [(7 * rank + 5 * step) % ((how.max_tokens or 24) + 1) for rank in range(shape.ranks)], step)
        for step, how in enumerate(HOWS)
    ]
    golden = [layer.round_trip(batch, how) for batch, how in zip(batches, HOWS, strict=True)]

    def work(world: RankWorld) -> tuple[int, int]:
        rank, generator = layer.ranks[world.rank], torch.Generator().manual_seed(world.rank)
        calls = [
            known(layer, world, batch, how, got[world.rank])  # type: ignore[arg-type]
            for batch, how, got in zip(batches, HOWS, golden, strict=True)
        ]
        opposite = [-call.y for call in calls]
        wrong = torch.zeros(2, dtype=torch.int64, device=device)
        layer.step(world)
        for step in range(rounds):
            call = calls[step % 4]
            received = layer.call(world, call.given)
            delay(device, generator)
            wrong[0] += call.differs(received)
            if step % 3 == 0:
                continue
            y, signs = call.y, [1]
            if shape.rows == "pulled":  # nobody reads what was there before: all have dispatched since
                y = rank.expert_rows(y.shape[1]).copy_(y)
            if step % 3 == 2:
                signs = [1, 1] if shape.rows == "pulled" else [1, -1]
            for sign in signs:
                rows = opposite[step % 4] if sign < 0 else y
                combined = rank.combine(rows, received.handle, out_dtype=shape.out_dtype)
                wrong[1] += (combined != sign * call.combined).sum()
        rank.synchronize()
        return tuple(wrong.tolist())  # type: ignore[return-value]

    assert layer.world.run(work) == [(0, 0)] * shape.ranks
    layer.destroy()


@BOTH
def test_back_to_back_50(device: str, shape: PayloadShape) -> None:
    soak(device, shape, 50)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("rounds", [1000, 10_000])
@BOTH
def test_back_to_back_for_long(device: str, shape: PayloadShape, rounds: int) -> None:
    soak(device, shape, rounds)
