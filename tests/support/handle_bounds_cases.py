# SPDX-License-Identifier: Apache-2.0
"""What results show of a handle's memory can be overwritten: kernels stay inside their buffers, whatever stands there.
Sums mean nothing then; rows may time out, or not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import moegen
from moegen import errors, functional
from moegen.runtime.worlds import RankWorld
from support.a2a_data import PayloadShape
from support.a2a_layer import PayloadLayer
from support.collective_rows_cases import PACKED, TOKEN
from support.ht_layer import RowsLayer, RowsShape

SHAPE = RowsShape(2, 4, 2, 64, "token", max_tokens=8)
VALUES = [1 << 20, -1, -(1 << 31), 9]
SHAPES = [SHAPE, replace(SHAPE, layout="packed")]
ACROSS = [TOKEN, PACKED]
"""On path collective."""


def overwrite(received: moegen.DispatchedRows, value: int) -> None:
    starts = received.expert_starts
    for view in (received.counts, received.source_starts, received.row_tokens, received.source_counts, starts):
        if view is not None:
            view.fill_(value)


def reverse(received: moegen.DispatchedRows, _: int) -> None:
    """Sources begin in the wrong order."""
    starts = received.source_starts
    starts.copy_(starts.flip(0))


def whatever_comes_of_it(layer: Any, work: Callable[[RankWorld], Any]) -> None:
    def guarded(world: RankWorld) -> None:
        try:
            work(world)
            layer.ranks[world.rank].synchronize()
        except (errors.PeerTimeoutError, errors.CapacityError):
            pass

    layer.world.run(guarded)
    layer.destroy()


def inputs(world: RankWorld, shape: RowsShape) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.ones(4, shape.hidden, device=world.device).bfloat16()
    ids = torch.arange(4 * shape.topk, device=world.device).view(4, -1) % shape.experts
    return x, ids


def use_again(rank: moegen.HighThroughput, op: str, x: torch.Tensor, received: moegen.DispatchedRows) -> None:
    if op == "combine":
        weights = received.topk_weights
        rank.combine(received.tokens.clone(), received.handle, weights, bias=x)
    else:
        rank.dispatch(x, handle=received.handle)


@pytest.mark.parametrize("change", [overwrite, reverse])
@pytest.mark.parametrize("op", ["combine", "dispatch"])
@pytest.mark.parametrize("shape", [*SHAPES, *ACROSS], ids=str)
def test_views_of_rows(device: str, shape: RowsShape, op: str, change: Callable[[Any, int], None]) -> None:
    path = {"path": "collective"} if shape in ACROSS else {}
    for value in VALUES if change is overwrite else [0]:
        layer = RowsLayer(shape, device, timeout=0.2, **path)

        def work(world: RankWorld, layer: RowsLayer = layer, value: int = value) -> None:
            rank = layer.ranks[world.rank]
            x, ids = inputs(world, shape)
            received = rank.dispatch(x, ids, torch.ones(ids.shape, device=world.device))
            change(received, value)
            layer.step(world)
            use_again(rank, op, x, received)

        whatever_comes_of_it(layer, work)


@pytest.mark.parametrize("rows", ["pushed", "pulled"])
def test_counts_of_payloads(device: str, rows: str) -> None:
    shape = PayloadShape(2, 4, 2, 64, "layer", max_tokens=8)
    for value in VALUES:
        layer = PayloadLayer(replace(shape, rows=rows), device, timeout=0.2)

        def work(world: RankWorld, layer: PayloadLayer = layer, value: int = value) -> None:
            rank = layer.ranks[world.rank]
            x = torch.ones(4, 64, device=world.device).bfloat16()
            ids = torch.tensor([[0, 2]] * 4, device=world.device)
            received = rank.dispatch(ids, [x, ids.int(), torch.ones(4, 2, device=world.device)])
            y = received.payloads[0].clone()
            if rows == "pulled":
                y = rank.expert_rows().copy_(y)
            received.counts.fill_(value)
            layer.step(world)
            rank.combine(y, received.handle)

        whatever_comes_of_it(layer, work)


def test_a_handle_of_more_tokens_than_there_can_be(device: str) -> None:
    layer = RowsLayer(replace(SHAPE, layout="packed"), device)

    def work(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        x, ids = inputs(world, SHAPE)
        rows, _, _, handle = functional.dispatch(rank, x, ids)
        for number in (SHAPE.max_tokens + 1, 200_000, -1):
            with pytest.raises(errors.InputError, match=r"num_tokens is an integer in 0\.\.8; got"):
                functional.combine(rank, rows, handle._replace(num_tokens=number))
        functional.combine(rank, rows, handle)

    layer.world.run(work)
    layer.destroy()
