# SPDX-License-Identifier: Apache-2.0
"""Ranks that are missing: marked, left out, taken back; on every device."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import moegen
from moegen import errors, reference
from moegen.kernels.ll import Regions, regions
from moegen.runtime.low_latency import FIRST_EPOCH
from moegen.runtime.worlds import RankWorld
from support.layer import Layer, Routing, Shape, expert_outputs, random_routing

SHAPE = Shape(3, 10, 4, 136, 12)
TOKENS = (12, 7, 9)
TIMEOUT = 0.5
PLENTY = 30.0
"""Seconds, where nobody is missing."""
EVERYBODY = (0, 1, 2)
OTHERS = (0, 1)
ABSENT = 2


@dataclass
class Got:
    """What one rank has of a dispatch and a combine, on the CPU."""

    received: moegen.Dispatched
    counts: torch.Tensor
    ranges: torch.Tensor
    y: torch.Tensor
    combined: torch.Tensor | None = None


@dataclass(frozen=True)
class How:
    """Options of a round trip."""

    late: bool = False
    halves: bool = False
    renormalize: bool = False
    timeout: float | None = None


def make(device: str, *, shape: Shape = SHAPE, **options: Any) -> Layer:
    settings = {"timeout": TIMEOUT, "active_ranks": True, **options}
    return Layer(shape, device, **settings)


def dispatch(rank: moegen.ExpertParallel, routing: Routing, how: How) -> Got:
    r = rank.rank
    x, ids, weights = (part[r].to(rank.device) for part in (routing.x, routing.ids, routing.weights))
    options: dict[str, Any] = {"timeout": how.timeout}
    given = None if how.late else weights
    if how.halves:
        received, receive = rank.dispatch(x, ids, given, return_recv_hook=True, **options)
        receive()
    else:
        received = rank.dispatch(x, ids, given, **options)
    quantised = rank.problem.dtype != "bf16"
    y = torch.ones(received.tokens.shape, device=rank.device).bfloat16() if quantised else expert_outputs(received)
    rank.synchronize()
    return Got(received, received.counts.cpu(), received.ranges.cpu(), y)


def combine(rank: moegen.ExpertParallel, routing: Routing, got: Got, how: How) -> None:
    weights = routing.weights[rank.rank].to(rank.device) if how.late else None
    options: dict[str, Any] = {"timeout": how.timeout, "renormalize": how.renormalize}
    if how.halves:
        combined, receive = rank.combine(got.y, got.received.handle, weights, return_recv_hook=True, **options)
        receive()
    else:
        combined = rank.combine(got.y, got.received.handle, weights, **options)
    rank.synchronize()
    got.combined = combined.cpu()


def verify(
    shape: Shape,
    routing: Routing,
    results: dict[int, Got],
    how: How,
    *,
    dispatching: Collection[int],
    combining: Collection[int],
) -> None:
    """Of the ranks that made both calls, against the reference without those that did not."""
    everybody = range(shape.ranks)
    silent = [[r for r in everybody if r not in dispatching]] * shape.ranks
    expected = reference.dispatch(routing.x, routing.ids, shape.experts, shape.max_tokens, missing=silent)
    for r in combining:
        want, got = expected[r], results[r]
        assert torch.equal(got.counts, want.counts), f"rank {r}: counts"
        assert torch.equal(got.ranges, want.ranges), f"rank {r}: ranges"
        for expert, count in enumerate(want.counts.tolist()):
            assert torch.equal(got.received.tokens[expert, :count].cpu(), want.tokens[expert, :count])
    shape_of_y = next(iter(results.values())).y.shape
    outputs = [results[r].y.cpu() if r in results else torch.zeros(shape_of_y) for r in everybody]
    missing = [[q for q in everybody if q not in combining] if r in combining else everybody for r in everybody]
    sums = reference.combine(
        outputs,
        expected,
        routing.ids,
        routing.weights,
        shape.experts,
        in_halves=how.halves,
        missing=missing,
        renormalize=how.renormalize,
    )
    for r in combining:
        combined = results[r].combined
        assert combined is not None
        assert not combined.isnan().any(), f"rank {r}: what did not come was summed"
        excess = (combined.double() - sums[r].exact).abs() - sums[r].bound
        assert not (excess > 0).any(), f"rank {r}: {excess.max():.3g} over the bound"


def round_trip(
    layer: Layer,
    routing: Routing,
    how: How,
    *,
    dispatching: Collection[int] = EVERYBODY,
    combining: Collection[int] = EVERYBODY,
) -> dict[int, Got]:
    """A dispatch of some ranks and a combine of some of those; the others make no call."""

    def work(world: RankWorld) -> Got | None:
        if world.rank not in dispatching:
            return None
        rank = layer.ranks[world.rank]
        got = dispatch(rank, routing, how)
        if world.rank in combining:
            combine(rank, routing, got, how)
        return got

    results = {r: got for r, got in enumerate(layer.world.run(work)) if got is not None}
    verify(layer.shape, routing, results, how, dispatching=dispatching, combining=combining)
    return results


def masks(layer: Layer, ranks: Collection[int]) -> list[list[int]]:
    return [layer.ranks[r].active_ranks.tolist() for r in ranks]


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
    """It makes the calls that it missed while the others go on; what it sends meanwhile shows up nowhere."""
    layer = make(device, wire=wire, slots=2)
    missed = [random_routing(SHAPE, TOKENS, seed) for seed in range(5)]
    back = [random_routing(SHAPE, TOKENS, 10 + seed, kind="free") for seed in range(3)]
    gone: dict[int, list[Got]] = {r: [] for r in OTHERS}

    def work(world: RankWorld) -> list[Got]:
        rank = layer.ranks[world.rank]

        def pair(routing: Routing, how: How = how) -> Got:
            got = dispatch(rank, routing, how)
            combine(rank, routing, got, how)
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
        assert rank.active_ranks.tolist() == ([0, 0, 1] if world.rank == ABSENT else [1, 1, 0])
        rank.active_ranks.fill_(1)
        rank.synchronize()
        world.barrier()
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


# ---- two ranks, of which one is written by hand -----------------------------------------------------

PAIR = Shape(2, 4, 2, 64, 8)


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
    pieces = layer.ranks[0].selection.dispatch.route_pieces
    start = pair_regions(layer).routes + (1 + layer.shape.max_tokens * pieces) * 16
    poke(layer, start, [tokens, 0, 0, FIRST_EPOCH])
    for token, words in enumerate(routes):
        poke(layer, start + (1 + token * pieces) * 16, [*words, FIRST_EPOCH])


SELECTS_EXPERT_0 = [0xFFFF0000, 0xFFFFFFFF, 0xFFFFFFFF]
"""A route: 16 bits each."""


@pytest.mark.parametrize(("wire", "head"), [("row", False), ("inline", False), ("inline", True)])
def test_row_that_was_announced_and_does_not_come(device: str, wire: str, head: bool) -> None:
    """Also with its head there, and no payload: counts stay as announced, and combine adds nothing up for it."""
    layer = make(device, shape=PAIR, wire=wire)
    announce(layer, [SELECTS_EXPERT_0], 1)
    if head:
        spec = layer.ranks[0].selection.dispatch
        record = pair_regions(layer).rows + PAIR.max_tokens * spec.record_bytes
        poke(layer, record, [0, 0, 0, FIRST_EPOCH] * spec.head_pieces)
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
        assert set(changed) <= set(range(start, start + 4))  # the word that says what was read

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


# ---- what is measured, given and refused ------------------------------------------------------------


@pytest.mark.parametrize("wire", ["inline", "row"])
def test_time_waited_for_each_rank(device: str, wire: str) -> None:
    layer = make(device, wire=wire, timeout=PLENTY, slots=2)
    routing = random_routing(SHAPE, TOKENS, 6)
    seconds = 0.3

    def work(world: RankWorld) -> list[list[int]]:
        rank, r = layer.ranks[world.rank], world.rank
        waited = torch.zeros(4, SHAPE.ranks, dtype=torch.int64, device=world.device)
        inputs = [part[r].to(world.device) for part in (routing.x, routing.ids, routing.weights)]

        def step() -> None:
            rank.synchronize()
            world.barrier()
            if r == ABSENT:
                time.sleep(seconds)

        step()
        received = rank.dispatch(*inputs, waited_ns=waited[0])
        step()
        rank.combine(expert_outputs(received), received.handle, waited_ns=waited[1])
        step()
        received, receive = rank.dispatch(*inputs, waited_ns=waited[2], return_recv_hook=True)
        receive()
        step()
        _, receive = rank.combine(expert_outputs(received), received.handle, waited_ns=waited[3], return_recv_hook=True)
        receive()
        rank.synchronize()
        return waited.tolist()

    waited = layer.world.run(work)
    for r in EVERYBODY:
        for call in waited[r]:
            assert call[r] == 0
            assert all(nanoseconds >= 0 for nanoseconds in call)
    for r in OTHERS:
        for call in waited[r]:
            assert 0.5 * seconds < call[ABSENT] / 1e9 < 20
    layer.destroy()


def test_timeout_of_one_call(device: str) -> None:
    layer = make(device, timeout=600.0)
    routing = random_routing(SHAPE, TOKENS, 8)
    round_trip(layer, routing, How(timeout=TIMEOUT), combining=OTHERS)
    assert masks(layer, OTHERS) == [[1, 1, 0]] * 2
    layer.destroy()


def test_timeout_of_one_call_that_needs_everybody(device: str) -> None:
    layer = Layer(PAIR, device, timeout=600.0)
    x = torch.ones(1, PAIR.hidden, dtype=torch.bfloat16, device=device)

    def work(world: RankWorld) -> None:
        if world.rank == 0:
            layer.ranks[0].dispatch(x, torch.tensor([[0, 3]], device=device), timeout=0.3)
            layer.ranks[0].synchronize()

    with pytest.raises(errors.PeerTimeoutError) as caught:
        layer.world.run(work)
    assert caught.value.timeout == 0.3
    layer.destroy()


def test_objects_that_share_a_mask(device: str) -> None:
    world = moegen.LocalWorld(2, device)

    def work(rank: RankWorld) -> list[list[int]]:
        mask = torch.ones(2, dtype=torch.int32, device=rank.device)
        layers = [
            moegen.ExpertParallel(rank, num_experts=4, num_topk=2, hidden=hidden, max_tokens_per_rank=8,
                timeout=TIMEOUT, active_ranks=mask)
            for hidden in (64, 128)
        ]  # fmt: skip
        if rank.rank == 0:
            for layer in layers:
                x = torch.ones(2, layer.problem.hidden, dtype=torch.bfloat16, device=rank.device)
                layer.dispatch(x, torch.tensor([[0, 3], [1, 2]], device=rank.device))
                layer.synchronize()
        seen = [layer.active_ranks.tolist() for layer in layers]
        rank.barrier()
        for layer in layers:
            layer.destroy()
        return seen

    assert world.run(work) == [[[1, 0], [1, 0]], [[1, 1], [1, 1]]]


def test_bad_masks_and_options(device: str) -> None:
    shape = Shape(1, 4, 2, 64, 8)
    plain, masked = Layer(shape, device), make(device, shape=shape)

    def work(world: RankWorld) -> None:
        x = torch.ones(1, 64, dtype=torch.bfloat16, device=world.device)
        ids = torch.tensor([[0, 3]], device=world.device)
        good = torch.zeros(1, dtype=torch.int64, device=world.device)
        one, two = plain.ranks[0], masked.ranks[0]
        with pytest.raises(errors.InputError, match="active_ranks=True"):
            _ = one.active_ranks
        with pytest.raises(errors.InputError, match=r"no waited_ns.*active_ranks=True"):
            one.dispatch(x, ids, waited_ns=good)
        with pytest.raises(errors.InputError, match=r"waited_ns is torch.int64; got torch.int32"):
            two.dispatch(x, ids, waited_ns=good.int())
        with pytest.raises(errors.InputError, match=r"waited_ns is \[1\]; got \[2\]"):
            two.dispatch(x, ids, waited_ns=torch.zeros(2, dtype=torch.int64, device=world.device))
        with pytest.raises(errors.InputError, match="timeout is a number of seconds"):
            two.dispatch(x, ids, timeout=0)
        received = one.dispatch(x, ids)
        with pytest.raises(errors.InputError, match=r"no renormalize.*active_ranks=True"):
            one.combine(expert_outputs(received), received.handle, renormalize=True)
        received = two.dispatch(x, ids, waited_ns=good)
        two.combine(expert_outputs(received), received.handle, waited_ns=good, renormalize=True)
        two.synchronize()
        assert good.tolist() == [0]
        for bad, says in (
            (torch.ones(2, dtype=torch.int32, device=world.device), r"active_ranks is \[1\]; got \[2\]"),
            (torch.ones(1, device=world.device), "active_ranks is torch.int32; got torch.float32"),
            (torch.ones(1, dtype=torch.int32, device="meta"), "active_ranks is on meta"),
            ("all", "active_ranks is a torch tensor; got str"),
        ):
            with pytest.raises(errors.InputError, match=says):
                moegen.ExpertParallel(
                    world, num_experts=4, num_topk=2, hidden=64, max_tokens_per_rank=8, active_ranks=bad
                )

    plain.world.run(work)
    plain.destroy()
    masked.destroy()
