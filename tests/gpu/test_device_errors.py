# SPDX-License-Identifier: Apache-2.0
"""What only the device can see is an exception at the next check, never a wrong number or an illegal access."""

from __future__ import annotations

import pytest
import torch
from support.layer import Layer, Shape, expert_outputs, random_routing

import moegen
from moegen.errors import InvalidRoutingError


def test_an_id_that_names_no_expert() -> None:
    shape = Shape(2, 8, 2, 64, 16)
    layer = Layer(shape, "cuda")
    good = random_routing(shape, (5, 6), 1)
    bad = random_routing(shape, (5, 6), 1)
    bad.ids[0][3, 1] = 8
    bad.ids[1][2, 0] = -7

    def work(world: moegen.runtime.worlds.RankWorld) -> torch.Tensor:
        r, rank = world.rank, layer.ranks[world.rank]
        received = rank.dispatch(bad.x[r].cuda(), bad.ids[r].cuda(), bad.weights[r].cuda())
        with pytest.raises(InvalidRoutingError, match=f"token {[3, 2][r]}"):
            rank.synchronize()
        combined = rank.combine(expert_outputs(received), received.handle)
        rank.synchronize()  # reported once
        return combined.cpu()

    results = layer.world.run(work)
    assert all(not result.isnan().any() for result in results)
    layer.verify(good, layer.round_trip(good))
    layer.destroy()


def test_num_tokens_beyond_the_tensor_is_cut() -> None:
    shape = Shape(2, 8, 2, 64, 16)
    layer = Layer(shape, "cuda")
    routing = random_routing(shape, (5, 6), 1)
    wanted = layer.round_trip(routing)

    def work(world: moegen.runtime.worlds.RankWorld) -> torch.Tensor:
        r, rank = world.rank, layer.ranks[world.rank]
        count = torch.tensor([1_000_000], dtype=torch.int32, device="cuda")
        inputs = [part[r].cuda() for part in (routing.x, routing.ids, routing.weights)]
        received = rank.dispatch(*inputs, num_tokens=count)
        combined = rank.combine(expert_outputs(received), received.handle)
        rank.synchronize()
        return combined.cpu()

    for got, want in zip(layer.world.run(work), wanted, strict=True):
        assert torch.equal(got, want.combined)
    layer.destroy()
