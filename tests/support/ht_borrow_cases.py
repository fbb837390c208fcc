# SPDX-License-Identifier: Apache-2.0
"""Rows that are read where they were received, on every device."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import moegen
from moegen import errors
from moegen.runtime.worlds import RankWorld
from support.ht_layer import OPTIONS, RowsShape, make
from support.layer import Shape, random_routing

ROUNDS = 4
SLOW = 1
"""A rank that takes its time over what it has borrowed, while the others are in their next dispatch already."""


@pytest.mark.parametrize("form", ["bf16", "fp8", "given"])
def test_borrowed_rows_stay_until_the_next_dispatch(device: str, form: str) -> None:
    shape = RowsShape(3, 8, 3, 256, "token", form, max_tokens=70)
    tokens = (70, 0, 33)
    like = Shape(shape.ranks, shape.experts, shape.topk, shape.hidden, shape.max_tokens)
    routings = [random_routing(like, tokens, seed, kind="free") for seed in range(ROUNDS)]

    def given(x: torch.Tensor) -> Any:
        scales = x[:, :2].float().abs()
        return (x.to(torch.float8_e4m3fn), scales) if "dtype" in OPTIONS[form] else x

    def work(world: RankWorld) -> None:
        lent, placed = make(world, shape, borrow=True), make(world, shape)

        def step() -> None:
            lent.synchronize()
            placed.synchronize()
            world.barrier()

        inputs = [
            [part[world.rank].to(device) for part in (routing.x, routing.ids, routing.weights)] for routing in routings
        ]
        wanted = []
        for x, ids, weights in inputs:
            step()
            wanted.append(placed.dispatch(given(x), ids, weights))
        step()
        for want, (x, ids, weights) in zip(wanted, inputs, strict=True):
            got = lent.dispatch(given(x), ids, weights)
            lent.synchronize()
            if world.rank == SLOW:
                time.sleep(0.1)
            check(got, want)
            y = torch.ones(got.handle.rows, shape.hidden, dtype=torch.bfloat16, device=device)
            lent.synchronize()
            assert torch.equal(lent.combine(y, got.handle)[0], placed.combine(y, want.handle)[0])
            again = lent.dispatch(given(2 * x), handle=got.handle)
            lent.synchronize()
            assert again.tokens.data_ptr() == got.tokens.data_ptr() and again.topk_idx is None
        step()
        lent.warmup()
        lent.destroy()
        placed.destroy()

    moegen.LocalWorld(shape.ranks, device).run(work)


def check(got: moegen.DispatchedRows, want: moegen.DispatchedRows) -> None:
    """The same rows, by source and the source's token."""
    number = int(want.source_starts[-1])
    row = torch.arange(number, dtype=torch.int32, device=got.row_tokens.device)
    at = torch.searchsorted(got.source_starts[1:], row, right=True), got.row_tokens[:number].long()
    assert torch.equal(got.tokens[at].view(torch.uint8), want.tokens[:number].view(torch.uint8))
    assert (got.scales is None) == (want.scales is None)
    if got.scales is not None and want.scales is not None:
        assert torch.equal(got.scales[at], want.scales[:number])
    assert got.topk_idx is not None and want.topk_idx is not None and torch.equal(got.topk_idx, want.topk_idx)
    assert got.topk_weights is not None and want.topk_weights is not None
    assert torch.equal(got.topk_weights, want.topk_weights)


def test_what_cannot_be_borrowed(device: str) -> None:
    shape = RowsShape(1, 4, 2, 64, "token", max_tokens=8)

    def work(world: RankWorld) -> None:
        with pytest.raises(errors.InputError, match="layout token"):
            make(world, RowsShape(1, 4, 2, 64, "packed"), borrow=True)
        with pytest.raises(errors.InputError, match="capacity"):
            make(world, RowsShape(1, 4, 2, 64, "token", mode="exact"), borrow=True)
        with make(world, shape, borrow=True) as layer:
            x = torch.zeros(3, 64, dtype=torch.bfloat16, device=device)
            ids = torch.zeros(3, 2, dtype=torch.int64, device=device)
            for more in ({"mode": "exact"}, {"max_rows": 3}, {"out": x}, {"zero_unused": True}):
                with pytest.raises(errors.InputError, match="borrow=True"):
                    layer.dispatch(x, ids, **more)

    moegen.LocalWorld(1, device).run(work)
