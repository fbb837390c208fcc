# SPDX-License-Identifier: Apache-2.0
"""Ranks that are missing in the middle of something: of two ranks, one is written by hand."""

from __future__ import annotations

import pytest
import torch

from moegen.limits import FIRST_EPOCH
from moegen.low_latency.regions import Regions, regions
from moegen.runtime.worlds import RankWorld
from support.layer import Layer
from support.mask_layer import (
    PAIR,
    make,
)


def pair_regions(layer: Layer) -> Regions:
    return regions(layer.ranks[0].selection.dispatch, PAIR.max_tokens, 0)


def poke(layer: Layer, offset: int, words: list[int]) -> None:
    """Writes 32-bit words into rank 0's symmetric memory, as rank 1 would."""
    signed = [word - 2**32 if word >= 2**31 else word for word in words]
    view = layer.ranks[0]._alive().memory.local.view(torch.int32)
    view[offset // 4 : offset // 4 + len(words)] = torch.tensor(signed, dtype=torch.int32)
    if layer.device == "cuda":
        torch.cuda.synchronize()


def announce(layer: Layer, routes: list[list[int]], tokens: int) -> None:
    """Rank 1 says how many tokens it has, and what the first of them select."""
    packets = layer.ranks[0].selection.dispatch.route_packets
    start = pair_regions(layer).routes + (1 + layer.shape.max_tokens * packets) * 16
    poke(layer, start, [tokens, 0, 0, FIRST_EPOCH])
    for token, words in enumerate(routes):
        poke(layer, start + (1 + token * packets) * 16, [*words, FIRST_EPOCH])


SELECTS_EXPERT_0 = [0xFFFF0000, 0xFFFFFFFF, 0xFFFFFFFF]
"""A route: 16 bits each."""


@pytest.mark.parametrize(("wire", "head"), [("row", False), ("inline", False), ("inline", True)])
def test_row_that_was_announced_and_does_not_come(device: str, wire: str, head: bool) -> None:
    """Also with its head there, and no payload: counts stay as announced, and combine adds nothing up for it."""
    layer = make(device, shape=PAIR, wire=wire)
    announce(layer, [SELECTS_EXPERT_0], 1)
    if head:
        spec = layer.ranks[0].selection.dispatch
        record = pair_regions(layer).rows + PAIR.max_tokens * spec.slot_bytes
        poke(layer, record, [0, 0, 0, FIRST_EPOCH] * spec.head_units)
    rank = layer.ranks[0]
    x = torch.ones(2, PAIR.hidden, dtype=torch.bfloat16, device=device)
    ids = torch.tensor([[0, 1], [0, 3]], device=device)

    def work(world: RankWorld) -> None:
        if world.rank != 0:
            return
        received = rank.dispatch(x, ids)
        rank.synchronize()
        assert rank.active_ranks.tolist() == [1, 0]
        assert received.counts.tolist() == [3, 1]
        assert received.ranges[0].tolist() == [[2, 0], [1, 2]]
        rank.active_ranks.fill_(1)  # as nobody should: combine has nothing to send for that row all the same
        y = torch.full(received.tokens.shape, 2.0, dtype=torch.bfloat16, device=device)
        peer = layer.ranks[1]._alive().memory.local
        before = peer.clone()
        combined = rank.combine(y, received.handle)
        rank.synchronize()
        assert combined[:, 0].tolist() == [4.0, 2.0]
        assert rank.active_ranks.tolist() == [1, 0]
        changed = (peer != before).nonzero().flatten().tolist()
        start = regions(layer.ranks[0].selection.dispatch, PAIR.max_tokens, 0).end
        at = regions(layer.ranks[0].selection.combine, PAIR.max_tokens, start)
        words = {*range(start, start + 4), *range(at.calls, at.routes)}  # what was read, and what call this is
        assert set(changed) <= words

    layer.world.run(work)
    layer.destroy()


def test_routes_of_which_a_part_came(device: str) -> None:
    """A source whose routes are not all there has sent nothing."""
    layer = make(device, shape=PAIR)
    announce(layer, [SELECTS_EXPERT_0], 2)

    def work(world: RankWorld) -> tuple[list[int], list[int]]:
        if world.rank != 0:
            return [], []
        rank = layer.ranks[0]
        x = torch.ones(1, PAIR.hidden, dtype=torch.bfloat16, device=device)
        received = rank.dispatch(x, torch.tensor([[0, 1]], device=device))
        rank.synchronize()
        return received.counts.tolist(), rank.active_ranks.tolist()

    assert layer.world.run(work)[0] == ([1, 1], [1, 0])
    layer.destroy()


def test_nothing_is_written_to_a_rank_that_is_not_ready(device: str) -> None:
    layer = make(device, shape=PAIR)

    def together(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        x = torch.ones(2, PAIR.hidden, dtype=torch.bfloat16, device=device)
        rank.dispatch(x, torch.tensor([[0, 3], [1, 2]], device=device))
        rank.synchronize()

    def alone(world: RankWorld) -> None:
        if world.rank == 0:
            together(world)

    layer.world.run(together)
    poke(layer, pair_regions(layer).consumed + 4, [0xFFFFFFF0])  # as if rank 1 were some epochs behind
    start = pair_regions(layer).routes
    peer = layer.ranks[1]._alive().memory.local
    before = peer[start:].clone()
    layer.world.run(alone)
    assert torch.equal(peer[start:], before)
    assert layer.ranks[0].active_ranks.tolist() == [1, 0]
    layer.destroy()
