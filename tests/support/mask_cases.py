# SPDX-License-Identifier: Apache-2.0
"""Ranks that are missing: marked, left out, taken back; on every device."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from moegen import errors
from moegen.runtime.worlds import RankWorld
from support.layer import Layer, Routing, Shape, random_routing
from support.mask_layer import (
    ABSENT,
    EVERYBODY,
    OTHERS,
    PLENTY,
    SHAPE,
    TIMEOUT,
    TOKENS,
    Got,
    How,
    combine,
    dispatch,
    make,
    masks,
    round_trip,
    verify,
)

HOWS = [
    How(),
    How(late=True, renormalize=True),
    How(halves=True, renormalize=True),
    How(late=True, halves=True),
]


@pytest.mark.parametrize("wire", ["inline", "row"])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_silent_rank_in_dispatch(device: str, wire: str, how: How) -> None:
    layer = make(device, wire=wire, slots=2)
    routings = [random_routing(SHAPE, TOKENS, seed, kind="free" if seed else "uniform") for seed in range(3)]
    round_trip(layer, routings[0], replace(how, timeout=PLENTY))
    assert masks(layer, EVERYBODY) == [[1, 1, 1]] * 3
    start = time.monotonic()
    round_trip(layer, routings[1], how, dispatching=OTHERS, combining=OTHERS)
    assert time.monotonic() - start >= TIMEOUT
    assert masks(layer, OTHERS) == [[1, 1, 0]] * 2
    start = time.monotonic()
    round_trip(layer, routings[2], how, dispatching=OTHERS, combining=OTHERS)
    assert time.monotonic() - start < TIMEOUT  # nobody waits for it again
    layer.destroy()


@pytest.mark.parametrize("wire", ["inline", "row"])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_rank_that_stops_after_dispatch(device: str, wire: str, how: How) -> None:
    layer = make(device, wire=wire, slots=2)
    routing = random_routing(SHAPE, TOKENS, 5)
    routing.weights[0][:2] = 0  # nothing to make up from
    round_trip(layer, routing, how, combining=OTHERS)
    assert masks(layer, OTHERS) == [[1, 1, 0]] * 2
    round_trip(layer, routing, how, dispatching=OTHERS, combining=OTHERS)
    layer.destroy()


@pytest.mark.parametrize("num_sms", [1, 2, 3])
@pytest.mark.parametrize("how", [How(late=True, renormalize=True), How(halves=True)], ids=str)
def test_missing_rank_with_few_blocks(device: str, num_sms: int, how: How) -> None:
    layer = make(device, wire="inline" if num_sms == 2 else "row", slots=2, num_sms=num_sms)
    routing = random_routing(SHAPE, TOKENS, num_sms)
    round_trip(layer, routing, replace(how, timeout=PLENTY))
    round_trip(layer, routing, how, combining=OTHERS)
    round_trip(layer, routing, how, dispatching=OTHERS, combining=OTHERS)
    assert masks(layer, OTHERS) == [[1, 1, 0]] * 2
    layer.destroy()


@pytest.mark.parametrize(("groups", "wire"), [("1x4", "row"), ("3x2", "inline")])
def test_teams(device: str, groups: str, wire: str) -> None:
    """A team's verdict is one barrier with or without shared memory."""
    layer = make(device, wire=wire, warp_groups=groups)
    routing = random_routing(SHAPE, TOKENS, 3, kind="free")
    round_trip(layer, routing, How(renormalize=True, timeout=PLENTY))
    round_trip(layer, routing, How(renormalize=True), dispatching=OTHERS, combining=OTHERS)
    layer.destroy()


SAME = ((SHAPE, {"slots": 2}), (Shape(2, 70, 8, 512, 20), {"quantize": "fp8"}))


@pytest.mark.parametrize(("shape", "options"), SAME, ids=str)
def test_nobody_missing_is_the_same_as_without_a_mask(device: str, shape: Shape, options: dict[str, Any]) -> None:
    plain, masked = Layer(shape, device, **options), make(device, shape=shape, timeout=PLENTY, **options)
    tokens = [(shape.max_tokens + 5 * rank) % (shape.max_tokens + 1) for rank in range(shape.ranks)]
    for seed, late in enumerate((False, True)):
        routing = random_routing(shape, tokens, seed, kind="free")
        how = How(late=late, halves="slots" in options, renormalize=late)

        def work(world: RankWorld, layer: Layer, routing: Routing, how: How) -> Got:
            rank = layer.ranks[world.rank]
            got = dispatch(rank, routing, how)
            combine(rank, routing, got, how)
            return got

        wanted = plain.world.run(work, plain, routing, How(late=how.late, halves=how.halves))
        for got, want in zip(masked.world.run(work, masked, routing, how), wanted, strict=True):
            assert torch.equal(got.counts, want.counts)
            for expert, count in enumerate(want.counts.tolist()):
                ours, theirs = (g.received.tokens[expert, :count].view(torch.uint8) for g in (got, want))
                assert torch.equal(ours, theirs)
            assert got.combined is not None
            assert want.combined is not None
            assert torch.equal(got.combined, want.combined)
    plain.destroy()
    masked.destroy()


@pytest.mark.parametrize("wire", ["inline", "row"])
@pytest.mark.parametrize("how", [How(), How(late=True, halves=True, renormalize=True)], ids=str)
def test_late_rank_catches_up_and_is_taken_back(device: str, wire: str, how: How) -> None:
    """It makes the calls that it missed while the others go on, and learns that it is left out; what it sends meanwhile
    shows up nowhere.
    """
    layer = make(device, wire=wire, slots=2)
    missed = [random_routing(SHAPE, TOKENS, seed) for seed in range(5)]
    back = [random_routing(SHAPE, TOKENS, 10 + seed, kind="free") for seed in range(3)]
    gone: dict[int, list[Got]] = {r: [] for r in OTHERS}

    def work(world: RankWorld) -> list[Got]:
        rank = layer.ranks[world.rank]
        left_out: list[errors.LeftOutError] | None = [] if world.rank == ABSENT else None

        def pair(routing: Routing, how: How = how) -> Got:
            got = dispatch(rank, routing, how, left_out)
            combine(rank, routing, got, how, left_out)
            return got

        for step, routing in enumerate(missed):
            if step == 2:
                world.barrier()  # from here on the late rank makes its calls too
            if world.rank == ABSENT:
                continue
            gone[world.rank].append(pair(routing))
        if world.rank == ABSENT:
            for routing in missed:
                pair(routing)
        world.barrier()
        assert rank.active_ranks.tolist() == ([0, 0, 0] if world.rank == ABSENT else [1, 1, 0])
        assert left_out is None or len(left_out) == 1
        rank.active_ranks.fill_(1)
        rank.synchronize()
        world.barrier()
        left_out = None
        return [pair(routing, replace(how, timeout=PLENTY)) for routing in back]

    results = layer.world.run(work)
    for step, routing in enumerate(missed):
        verify(SHAPE, routing, {r: gone[r][step] for r in OTHERS}, how, dispatching=OTHERS, combining=OTHERS)
    for step, routing in enumerate(back):
        verify(
            SHAPE,
            routing,
            {r: results[r][step] for r in EVERYBODY},
            how,
            dispatching=EVERYBODY,
            combining=EVERYBODY,
        )
    assert masks(layer, EVERYBODY) == [[1, 1, 1]] * 3
    layer.destroy()


def test_epochs_wrap_while_a_rank_is_missing(device: str) -> None:
    layer = make(device, first_epoch=0xFFFFFFFD)
    routing = random_routing(SHAPE, TOKENS, 1)
    for _ in range(8):
        round_trip(layer, routing, How(), dispatching=OTHERS, combining=OTHERS)
    layer.destroy()


def test_rank_that_is_masked_by_hand(device: str) -> None:
    """The others leave it out at once, though it is there and makes its calls."""
    layer = make(device, timeout=PLENTY)
    routing = random_routing(SHAPE, TOKENS, 4)
    round_trip(layer, routing, How())

    def work(world: RankWorld) -> Got:
        rank = layer.ranks[world.rank]
        rank.active_ranks[:] = torch.tensor([0, 0, 1] if world.rank == ABSENT else [1, 1, 0], dtype=torch.int32)
        got = dispatch(rank, routing, How())
        combine(rank, routing, got, How())
        return got

    results = layer.world.run(work)
    verify(SHAPE, routing, {r: results[r] for r in OTHERS}, How(), dispatching=OTHERS, combining=OTHERS)
    verify(SHAPE, routing, {2: results[2]}, How(), dispatching=[2], combining=[2])
    layer.destroy()
