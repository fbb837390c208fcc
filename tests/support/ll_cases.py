# SPDX-License-Identifier: Apache-2.0
"""Tests of family `ll` that run on every device; tests/host and tests/gpu collect them with their own `device`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moegen
from moegen import errors
from moegen.codegen.render import render
from moegen.compile.binary import obtain_many
from moegen.compile.target import Target
from moegen.kernels.problem import Problem
from moegen.runtime.worlds import MAX_CONNECTIONS
from moegen.select import select
from support.layer import Layer, Routing, Shape, expert_outputs, random_routing

# Covers the domain pairwise: ranks 1..9, experts that divide and do not, top-k 1..16, rows from 16 bytes up, both wire
# formats (capacity up to 64 is inline), rows that 12 bytes divide and do not.
POOL = (
    Shape(1, 4, 2, 8, 8),
    Shape(1, 5, 5, 512, 70),
    Shape(2, 8, 1, 64, 16),
    Shape(2, 13, 8, 2880, 65),
    Shape(3, 9, 5, 2880, 37),
    Shape(3, 10, 3, 24, 100),
    Shape(4, 16, 4, 128, 64),
    Shape(4, 256, 8, 512, 80),
    Shape(5, 7, 2, 16, 3),
    Shape(6, 20, 6, 96, 66),
    Shape(7, 33, 16, 48, 12),
    Shape(8, 8, 8, 128, 128),
    Shape(9, 20, 3, 8, 16),
    Shape(9, 61, 10, 200, 90),
)
# The far ends of the domain: ranks, experts, top-k, the widest rows, many tokens.
EDGES = (
    Shape(16, 384, 8, 64, 8),
    Shape(33, 70, 4, 16, 4),
    Shape(64, 64, 3, 8, 2),
    Shape(2, 64, 32, 64, 8),
    Shape(1, 1024, 32, 8, 300),
    Shape(2, 8, 2, 16384, 4),
    Shape(2, 8, 2, 32768, 70),
    Shape(2, 16, 8, 16, 1500),
)
SOAK_SHAPE = Shape(3, 9, 4, 256, 24)


def build(shapes: tuple[Shape, ...], device: str) -> None:
    """Compiles what the shapes need, in parallel, once."""
    on_host = device == "cpu"
    target = Target("host") if on_host else Target.for_capability(*torch.cuda.get_device_capability())
    specs = {
        spec
        for s in shapes
        for spec in select(Problem(s.ranks, s.experts, s.topk, s.hidden, s.max_tokens, on_host=on_host)).specs
    }
    obtain_many([render(spec) for spec in sorted(specs, key=lambda spec: spec.stem)], target)


@pytest.fixture(scope="module")
def layers(device: str) -> Iterator[dict[Shape, Layer]]:
    """One layer per shape of the pool, made when first used."""
    build(POOL, device)
    made: dict[Shape, Layer] = {}

    class Layers(dict[Shape, Layer]):
        def __missing__(self, shape: Shape) -> Layer:
            made[shape] = self[shape] = Layer(shape, device)
            return made[shape]

    yield Layers()
    for layer in made.values():
        layer.destroy()


@pytest.mark.parametrize("shape", POOL, ids=str)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trip_equals_reference(shape: Shape, layers: dict[Shape, Layer], data: Any) -> None:
    largest = min(shape.max_tokens, 40)
    counts = st.one_of(st.integers(0, largest), st.sampled_from([0, 1, largest]))
    tokens = data.draw(st.lists(counts, min_size=shape.ranks, max_size=shape.ranks))
    kind = data.draw(st.sampled_from(["uniform", "free", "one", "none"]))
    routing = random_routing(shape, tokens, data.draw(st.integers(0, 2**31)), kind=kind)
    late, narrow = data.draw(st.booleans()), data.draw(st.booleans())
    layer = layers[shape]
    layer.verify(routing, layer.round_trip(routing, late=late, narrow_ids=narrow))


@pytest.mark.slow
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges_of_the_domain(shape: Shape, device: str) -> None:
    if device == "cuda" and shape.ranks > MAX_CONNECTIONS:
        pytest.skip(f"a GPU has {MAX_CONNECTIONS} queues at most: no room for {shape.ranks} virtual ranks")
    layer = Layer(shape, device)
    for seed, kind in enumerate(("uniform", "free", "one")):
        tokens = [(shape.max_tokens + 3 * rank * seed) % (shape.max_tokens + 1) for rank in range(shape.ranks)]
        routing = random_routing(shape, tokens, seed, kind=kind)
        layer.verify(routing, layer.round_trip(routing, late=seed == 1))
    layer.destroy()


@st.composite
def shapes(draw: Any) -> Shape:
    ranks = draw(st.integers(1, 9))
    experts = draw(st.integers(ranks, 300))
    topk = draw(st.integers(1, min(32, experts)))
    return Shape(ranks, experts, topk, 8 * draw(st.integers(1, 400)), draw(st.integers(1, 130)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), seed=st.integers(0, 2**31), late=st.booleans())
def test_drawn_shapes(device: str, shape: Shape, seed: int, late: bool) -> None:
    layer = Layer(shape, device)
    tokens = [(seed // (rank + 1)) % (min(shape.max_tokens, 30) + 1) for rank in range(shape.ranks)]
    routing = random_routing(shape, tokens, seed, kind="free")
    layer.verify(routing, layer.round_trip(routing, late=late))
    layer.destroy()


def test_full_capacity(layers: dict[Shape, Layer]) -> None:
    for shape in (Shape(2, 8, 1, 64, 16), Shape(3, 10, 3, 24, 100)):
        routing = random_routing(shape, [shape.max_tokens] * shape.ranks, 1)
        layers[shape].verify(routing, layers[shape].round_trip(routing))


def test_more_tokens_than_a_block_has_threads(device: str) -> None:
    shape = Shape(2, 16, 16, 8, 300)
    layer = Layer(shape, device, warp_groups="2x2")
    assert layer.ranks[0].selection.dispatch.block_threads < 270
    routing = random_routing(shape, (300, 270), 1, kind="free")
    layer.verify(routing, layer.round_trip(routing))
    layer.destroy()


def test_r3_e9_k5_h2880_tokens_0_1_37(device: str) -> None:
    """The same stem on the host and on a GPU, by the digest of its text; `warp_groups` pins it."""
    shape = Shape(3, 9, 5, 2880, 37)
    layer = Layer(shape, device, warp_groups="2x1", wire="inline")
    spec = layer.ranks[0].selection.dispatch
    assert spec.stem == "ll_dispatch_bf16_expert_r3_h2880_k5_e9_ipc_w2x1_inline_whole"
    print(f"\n{device}: {spec.stem} {render(spec).digest}")
    routing = random_routing(shape, (0, 1, 37), 7)
    for late in (False, True):
        layer.verify(routing, layer.round_trip(routing, late=late))
    layer.destroy()


@pytest.mark.parametrize("wire", ["inline", "row"])
@pytest.mark.parametrize("groups", ["1x1", "4x2", "1x8", "31x1"])
def test_warp_groups(device: str, wire: str, groups: str) -> None:
    shape = Shape(3, 10, 4, 136, 20)
    layer = Layer(shape, device, wire=wire, warp_groups=groups)
    routing = random_routing(shape, (20, 3, 11), 5, kind="free")
    layer.verify(routing, layer.round_trip(routing))
    layer.destroy()


def test_epoch_wraps(device: str) -> None:
    shape = POOL[2]
    layer = Layer(shape, device, first_epoch=0xFFFFFFF0)
    for step in range(40):
        routing = random_routing(shape, (step % 17, 16 - step % 17), step)
        results = layer.round_trip(routing)
        if step % 8 == 7:
            layer.verify(routing, results)
    layer.destroy()


def test_results_do_not_depend_on_timing(layers: dict[Shape, Layer]) -> None:
    shape = Shape(4, 256, 8, 512, 80)
    routing = random_routing(shape, (40, 0, 13, 27), 3)
    first, *others = [layers[shape].round_trip(routing) for _ in range(4)]
    for other in others:
        for one, two in zip(first, other, strict=True):
            assert torch.equal(one.counts, two.counts)
            assert torch.equal(one.combined, two.combined)


def soak(device: str, pairs: int, *, options: dict[str, Any] | None = None) -> None:
    """Back-to-back pairs with random delays per rank and no host synchronisation; every result equals the first."""
    shape = SOAK_SHAPE
    layer = Layer(shape, device, **(options or {}))
    routings = [
        random_routing(
            shape, [(7 * rank + 5 * step) % 25 for rank in range(3)], step, kind=["uniform", "free"][step % 2]
        )
        for step in range(4)
    ]
    golden = [layer.round_trip(routing) for routing in routings]
    for routing, results in zip(routings, golden, strict=True):
        layer.verify(routing, results)

    def work(world: moegen.runtime.worlds.RankWorld) -> int:
        rank = layer.ranks[world.rank]
        generator = torch.Generator().manual_seed(world.rank)
        inputs = [
            (r.x[world.rank].to(device), r.ids[world.rank].to(device), r.weights[world.rank].to(device))
            for r in routings
        ]
        wanted = [results[world.rank].combined.to(device) for results in golden]
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for step in range(pairs):
            delay(device, generator)
            received = rank.dispatch(*inputs[step % 4])
            combined = rank.combine(expert_outputs(received), received.handle)
            wrong += (combined != wanted[step % 4]).sum()
        rank.synchronize()
        return int(wrong)

    assert layer.world.run(work) == [0, 0, 0]
    layer.destroy()


def delay(device: str, generator: torch.Generator) -> None:
    """Now and then a rank is late by up to a few calls' time."""
    draw = int(torch.randint(0, 100, (), generator=generator))
    if draw >= 20:
        return
    if device == "cpu":
        time.sleep(draw * 2e-4)
    else:
        torch.cuda._sleep(draw * 20_000)


def test_back_to_back_300(device: str) -> None:
    soak(device, 300)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_back_to_back_10000(device: str) -> None:
    soak(device, 10_000)


def test_num_tokens_on_the_device(layers: dict[Shape, Layer]) -> None:
    shape = POOL[4]
    layer = layers[shape]
    full = random_routing(shape, (9, 20, 37), 11)
    counts = (4, 0, 30)
    cut = Routing(
        *([part[:n] for part, n in zip(parts, counts, strict=True)] for parts in (full.x, full.ids, full.weights))
    )

    def work(world: moegen.runtime.worlds.RankWorld) -> tuple[torch.Tensor, torch.Tensor]:
        rank, r = layer.ranks[world.rank], world.rank
        given = torch.tensor([counts[r]], dtype=torch.int32, device=world.device)
        inputs = [part[r].to(world.device) for part in (full.x, full.ids, full.weights)]
        received = rank.dispatch(*inputs, num_tokens=given)
        combined = rank.combine(expert_outputs(received), received.handle)
        rank.synchronize()
        return received.counts.cpu(), combined[: counts[r]].cpu()

    wanted = layer.round_trip(cut)
    for (got_counts, got), want in zip(layer.world.run(work), wanted, strict=True):
        assert torch.equal(got_counts, want.counts)
        assert torch.equal(got, want.combined)


def test_preallocated_outputs(layers: dict[Shape, Layer]) -> None:
    shape = POOL[2]
    layer = layers[shape]
    routing = random_routing(shape, (5, 9), 2)
    wanted = layer.round_trip(routing)

    def work(world: moegen.runtime.worlds.RankWorld) -> None:
        rank, r = layer.ranks[world.rank], world.rank
        tokens = torch.empty(len(rank.local_experts), 2 * 16, 64, dtype=torch.bfloat16, device=world.device)
        out = torch.empty(routing.x[r].shape, dtype=torch.bfloat16, device=world.device)
        inputs = [part[r].to(world.device) for part in (routing.x, routing.ids, routing.weights)]
        received = rank.dispatch(*inputs, out=tokens)
        assert received.tokens is tokens
        assert rank.combine(expert_outputs(received), received.handle, out=out) is out
        rank.synchronize()
        assert torch.equal(out.cpu(), wanted[r].combined)

    layer.world.run(work)


def test_strided_tokens(layers: dict[Shape, Layer]) -> None:
    shape = POOL[2]
    layer = layers[shape]
    routing = random_routing(shape, (6, 7), 4)
    wanted = layer.round_trip(routing)

    def work(world: moegen.runtime.worlds.RankWorld) -> None:
        rank, r = layer.ranks[world.rank], world.rank
        for padding in (8, 1):  # rows that start on 16 bytes, and rows that do not
            wide = torch.zeros(len(routing.x[r]), shape.hidden + padding, dtype=torch.bfloat16, device=world.device)
            x = wide[:, : shape.hidden].copy_(routing.x[r])
            ids = routing.ids[r].to(world.device).t().contiguous().t()
            received = rank.dispatch(x, ids, routing.weights[r].to(world.device))
            combined = rank.combine(expert_outputs(received), received.handle)
            rank.synchronize()
            assert torch.equal(combined.cpu(), wanted[r].combined)

    layer.world.run(work)


def test_many_handles_live(layers: dict[Shape, Layer]) -> None:
    shape = POOL[6]
    layer = layers[shape]
    routings = [random_routing(shape, (step, 64, 3, 10), step) for step in range(5)]
    wanted = [layer.round_trip(routing) for routing in routings]

    def work(world: moegen.runtime.worlds.RankWorld) -> None:
        rank, r = layer.ranks[world.rank], world.rank
        parts = [[part[r].to(world.device) for part in (s.x, s.ids, s.weights)] for s in routings]
        received = [rank.dispatch(*part) for part in parts]
        for step in (3, 0, 4, 1, 2, 3):
            combined = rank.combine(expert_outputs(received[step]), received[step].handle)
            rank.synchronize()
            assert torch.equal(combined.cpu(), wanted[step][r].combined)

    layer.world.run(work)


def test_combine_takes_no_foreign_handle(layers: dict[Shape, Layer]) -> None:
    one, two = layers[POOL[0]], Layer(POOL[0], layers[POOL[0]].device)
    routing = random_routing(POOL[0], (3,), 0)
    inputs = [part[0].to(one.device) for part in (routing.x, routing.ids)]
    received = one.ranks[0].dispatch(*inputs)
    with pytest.raises(errors.HandleError, match="another ExpertParallel"):
        two.ranks[0].combine(received.tokens, received.handle)
    two.destroy()
    with pytest.raises(errors.DestroyedError):
        two.ranks[0].dispatch(*inputs)


def test_warmup_then_use(device: str) -> None:
    layer = Layer(POOL[2], device)
    layer.world.run(lambda world: layer.ranks[world.rank].warmup())
    routing = random_routing(POOL[2], (3, 4), 9)
    layer.verify(routing, layer.round_trip(routing))
    layer.destroy()
