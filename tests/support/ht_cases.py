# SPDX-License-Identifier: Apache-2.0
"""Tests of `HighThroughput` that run on every device; tests/host and tests/gpu collect them with their own `device`."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moegen
from moegen import errors, reference_rows
from moegen.codegen.render import render
from moegen.compile.binary import obtain_many
from moegen.compile.target import Target
from moegen.kernels.ht import CHUNK
from moegen.row_checks import problem
from moegen.runtime.worlds import RankWorld
from moegen.select import select_rows
from support.ht_layer import (
    OPTIONS,
    RowsLayer,
    RowsResult,
    RowsShape,
    assert_same_results,
    assert_within,
    expected_of,
    expert_outputs,
    same,
    strided,
    verify_dispatch,
)
from support.layer import Routing, random_routing
from support.ll_cases import delay

# Covers the domain pairwise: ranks 1..9, experts that divide and do not, top-k 1..16, rows from 16 bytes up, all
# formats in both layouts, both modes, alignments.
POOL = (
    RowsShape(1, 4, 2, 8, "token", max_tokens=8),
    RowsShape(1, 384, 16, 128, "packed", "fp8", mode="exact", alignment=4),
    RowsShape(2, 13, 8, 512, "packed", "fp8_ue8m0", alignment=128),
    RowsShape(2, 64, 8, 512, "token", "given_ue8m0", mode="exact"),
    RowsShape(3, 9, 5, 2880, "token"),
    RowsShape(3, 10, 3, 24, "packed", mode="exact", alignment=4, max_tokens=150),
    RowsShape(4, 256, 8, 1024, "packed", "given"),
    RowsShape(4, 16, 4, 512, "token", "fp8_ue8m0", mode="exact"),
    RowsShape(5, 7, 2, 128, "token", "fp8_pow2"),
    RowsShape(6, 20, 6, 512, "packed", "given_ue8m0", alignment=128),
    RowsShape(7, 33, 16, 384, "token", "given", mode="exact"),
    RowsShape(8, 8, 8, 256, "packed", "fp8_pow2", alignment=4),
    RowsShape(9, 384, 10, 128, "token", "fp8"),
    RowsShape(9, 20, 1, 16, "packed", mode="exact", max_tokens=100),
)
TOKEN, PACKED = POOL[4], replace(POOL[5], mode="capacity", max_tokens=40)
"""Of most tests below; the kernels are those of the pool."""
BOTH = pytest.mark.parametrize("shape", [TOKEN, PACKED], ids=str)
SCALED = pytest.mark.parametrize("shape", [POOL[2], POOL[6], POOL[8]], ids=str)

# The far ends of the domain: ranks, experts, top-k, the widest rows, many tokens.
EDGES = (
    RowsShape(16, 384, 8, 64, "packed", alignment=128, max_tokens=8),
    RowsShape(33, 70, 4, 16, "token", max_tokens=4),
    RowsShape(64, 64, 3, 8, "packed", max_tokens=2),
    RowsShape(2, 64, 32, 64, "token", max_tokens=8),
    RowsShape(1, 1024, 32, 8, "packed", max_tokens=300, mode="exact"),
    RowsShape(2, 8, 2, 32768, "token", max_tokens=70),
    RowsShape(2, 8, 2, 16384, "packed", "fp8_ue8m0", max_tokens=20),
    RowsShape(2, 16, 8, 16, "packed", max_tokens=1500, mode="exact"),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread_per_rank() -> Iterator[None]:
    """Ranks are threads already; torch's own would only get in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(shapes: tuple[RowsShape, ...], device: str) -> None:
    """Compiles what the shapes need, in parallel, once."""
    on_host = device == "cpu"
    target = Target("host") if on_host else Target.for_capability(*torch.cuda.get_device_capability())
    specs = set()
    for shape in shapes:
        options = {"dtype": torch.bfloat16, "scale_dtype": torch.float32, "quantize": None, **OPTIONS[shape.format]}
        options["borrow"] = False
        specs |= set(
            select_rows(
                problem(
                    shape.ranks,
                    num_experts=shape.experts,
                    num_topk=shape.topk,
                    hidden=shape.hidden,
                    max_tokens_per_rank=shape.max_tokens,
                    layout=shape.layout,
                    on_host=on_host,
                    **options,
                )
            ).specs
        )
    obtain_many([render(spec) for spec in sorted(specs, key=lambda spec: spec.stem)], target)


@pytest.fixture(scope="module")
def layers(device: str) -> Iterator[dict[RowsShape, RowsLayer]]:
    """One layer per shape, made when first used. NVRTC is slow, so a GPU's kernels are compiled all at once; on a CPU
    several test processes would then compile the same ones at the same time.
    """
    if device == "cuda":
        build(POOL, device)
    made: dict[RowsShape, RowsLayer] = {}

    class Layers(dict[RowsShape, RowsLayer]):
        def __missing__(self, shape: RowsShape) -> RowsLayer:
            build((shape,), device)
            made[shape] = self[shape] = RowsLayer(shape, device)
            return made[shape]

    yield Layers()
    for layer in made.values():
        layer.destroy()


Layers = dict[RowsShape, RowsLayer]


@pytest.mark.parametrize("shape", POOL, ids=str)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_round_trip_equals_reference(shape: RowsShape, layers: Layers, data: Any) -> None:
    largest = min(shape.max_tokens, 40)
    counts = st.one_of(st.integers(0, largest), st.sampled_from([0, 1, largest]))
    tokens = data.draw(st.lists(counts, min_size=shape.ranks, max_size=shape.ranks))
    kind = data.draw(st.sampled_from(["uniform", "free", "one", "none"]))
    routing = random_routing(shape, tokens, data.draw(st.integers(0, 2**31)), kind=kind)  # type: ignore[arg-type]
    weighted, biases = data.draw(st.booleans()), data.draw(st.integers(0, 2))
    results = layers[shape].round_trip(
        routing,
        weighted=weighted,
        narrow=data.draw(st.booleans()),
        padding=data.draw(st.sampled_from([None, 16, 3])),  # rows that start on 16 bytes, and rows that do not
        biases=biases,
        sums=shape.layout == "token" and data.draw(st.booleans()),
    )
    layers[shape].verify(routing, results, weighted=weighted, biases=biases)


@pytest.mark.slow
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges_of_the_domain(shape: RowsShape, device: str) -> None:
    if device == "cuda" and shape.ranks > 9:
        pytest.skip("with 16 virtual ranks on one H200 a rank's kernel was seen not to start while others waited")
    layer = RowsLayer(shape, device)
    for seed, kind in enumerate(("uniform", "free", "one")):
        tokens = [(shape.max_tokens + 3 * rank * seed) % (shape.max_tokens + 1) for rank in range(shape.ranks)]
        routing = some(shape, tokens, seed, kind)
        layer.verify(routing, layer.round_trip(routing, sums=shape.layout == "token"))
    layer.destroy()


@st.composite
def shapes(draw: Any) -> RowsShape:
    ranks = draw(st.integers(1, 9))
    experts = draw(st.integers(ranks, 384))
    form = draw(st.sampled_from(list(OPTIONS)))
    group = {"bf16": 8, "fp8_ue8m0": 512, "given_ue8m0": 512}.get(form, 128)
    return RowsShape(
        ranks,
        experts,
        draw(st.integers(1, min(16, experts))),
        group * draw(st.integers(1, 3200 // group)),
        draw(st.sampled_from(["token", "packed"])),
        form,
        draw(st.integers(1, 130)),
        draw(st.sampled_from(["capacity", "exact"])),
        draw(st.sampled_from([1, 4, 128])),
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), seed=st.integers(0, 2**31), sms=st.sampled_from([None, 1, 3]))
def test_drawn_shapes(device: str, shape: RowsShape, seed: int, sms: int | None) -> None:
    layer = RowsLayer(shape, device, num_sms=sms)
    tokens = [(seed // (rank + 1)) % (min(shape.max_tokens, 30) + 1) for rank in range(shape.ranks)]
    routing = some(shape, tokens, seed, "free")
    layer.verify(routing, layer.round_trip(routing, biases=seed % 3), biases=seed % 3)
    layer.destroy()


def some(shape: RowsShape, tokens: Any, seed: int, kind: str = "uniform") -> Routing:
    return random_routing(shape, list(tokens), seed, kind=kind)  # type: ignore[arg-type]


@BOTH
def test_full_capacity(shape: RowsShape, layers: Layers) -> None:
    routing = some(shape, [shape.max_tokens] * shape.ranks, 1)
    layers[shape].verify(routing, layers[shape].round_trip(routing))


@pytest.mark.parametrize("shape", [TOKEN, PACKED, POOL[2], POOL[3]], ids=str)
def test_capacity_mode_equals_exact_mode(shape: RowsShape, layers: Layers) -> None:
    for seed, kind in enumerate(("uniform", "free", "none")):
        routing = some(shape, [(17 * rank + 13 * seed) % 41 for rank in range(shape.ranks)], seed, kind)
        one, two = (layers[each].round_trip(routing, biases=1) for each in (shape, shape.other_mode))
        assert_same_results(one, two)


@pytest.mark.parametrize("sms", [1, 3, 7])
@BOTH
def test_more_tokens_than_the_blocks_plan_at_once(shape: RowsShape, device: str, sms: int) -> None:
    """Each receiving block plans several chunks, behind those of the others."""
    shape = replace(shape, max_tokens=9 * CHUNK + 5)
    layer = RowsLayer(shape, device, num_sms=sms)
    for seed, tokens in enumerate([(shape.max_tokens, 0, CHUNK), (CHUNK + 1, shape.max_tokens - 1, 8 * CHUNK)]):
        routing = some(shape, tokens, seed, "free")
        layer.verify(routing, layer.round_trip(routing))
    layer.destroy()


@pytest.mark.parametrize("sms", [1, 3])
@pytest.mark.parametrize("shape", [PACKED.other_mode, POOL[8]], ids=str)
def test_few_blocks(shape: RowsShape, device: str, sms: int) -> None:
    layer = RowsLayer(shape, device, num_sms=sms)
    for seed, kind in enumerate(("uniform", "free", "one")):
        routing = some(shape, [(31 * rank + 7 * seed) % 41 for rank in range(shape.ranks)], seed, kind)
        layer.verify(routing, layer.round_trip(routing))
    layer.destroy()


@BOTH
def test_epoch_wraps(shape: RowsShape, device: str) -> None:
    layer = RowsLayer(shape, device, first_epoch=0xFFFFFFF0)
    for step in range(40):
        routing = some(shape, [step % 17, 16 - step % 17, 3], step)
        results = layer.round_trip(routing)
        if step % 8 == 7:
            layer.verify(routing, results)
    layer.destroy()


@SCALED
def test_scales_of_any_strides(shape: RowsShape, layers: Layers) -> None:
    """Rows side by side, as grouped GEMMs take them, and words apart; in memory that is not theirs nothing changes."""
    layer = layers[shape]
    routing = some(shape, [(9 * rank + 5) % 40 for rank in range(shape.ranks)], 3)
    wanted = layer.round_trip(routing)
    for strides in ("side by side", "apart"):

        def work(world: RankWorld, strides: str = strides) -> RowsResult:
            rank = layer.ranks[world.rank]
            memory = rank.row_memory
            rows, words = memory.capacity, rank.selection.dispatch.scale_words
            whole = torch.full((words, rows + 1), 77, dtype=memory.scales_dtype, device=world.device)
            scales = whole[:, :rows].t()
            if strides == "apart":
                whole = torch.full((rows, 2 * words + 1), 77, dtype=memory.scales_dtype, device=world.device)
                scales = whole[:, 1::2]
            result = layer.pair(world, layer.inputs(routing, world.rank), out_scales=scales)
            others = whole[:, rows:] if strides == "side by side" else whole[:, ::2]
            assert (others == 77).all()
            return result

        assert_same_results(layer.world.run(work), wanted)


@pytest.mark.parametrize("shape", [TOKEN, PACKED.other_mode, POOL[2], POOL[3], POOL[7], POOL[6]], ids=str)
def test_a_handle_gives_what_a_fresh_dispatch_gives(shape: RowsShape, layers: Layers) -> None:
    """Other tokens by the same routing, also into given tensors, from a routing with -1 and repeats."""
    layer = layers[shape]
    tokens = [(23 * rank + 11) % 40 for rank in range(shape.ranks)]
    first, second = some(shape, tokens, 5, "free"), some(shape, tokens, 6, "free")
    second = Routing(second.x, first.ids, first.weights)
    wanted = layer.round_trip(second)
    expected = expected_of(shape, second)

    def work(world: RankWorld) -> list[RowsResult]:
        rank = layer.ranks[world.rank]
        inputs, others = layer.inputs(first, world.rank), layer.inputs(second, world.rank, padding=16)
        layer.step(world)
        handle = rank.dispatch(inputs.x, inputs.ids, inputs.weights).handle
        made = rank.row_memory.rows(handle.rows, selections=False)
        return [
            layer.pair(world, others, handle=handle),
            layer.pair(world, others, handle=handle, out=made.tokens, out_scales=made.scales),
        ]

    results = layer.world.run(work)
    for step in range(2):
        by_handle = [of_rank[step] for of_rank in results]
        assert_same_results(by_handle, wanted, by_handle=True)
        for rank, got in enumerate(by_handle):
            verify_dispatch(rank, shape, expected[rank], got.received, by_handle=True)


@pytest.mark.parametrize("shape", [TOKEN, PACKED, PACKED.other_mode], ids=str)
def test_many_handles_live(shape: RowsShape, layers: Layers) -> None:
    layer = layers[shape]
    routings = [some(shape, (step, 40, 9 * step), step, "free") for step in range(5)]
    wanted = [layer.round_trip(routing) for routing in routings]

    def work(world: RankWorld) -> list[RowsResult]:
        rank = layer.ranks[world.rank]
        parts = [layer.inputs(routing, world.rank) for routing in routings]
        layer.step(world)
        received = [rank.dispatch(part.x, part.ids, part.weights) for part in parts]
        results = []
        for step in (3, 0, 4, 1, 2, 3):
            results.append(layer.finish(world, received[step]))
            if step % 2:  # and dispatch once more by an old one
                layer.pair(world, parts[step], handle=received[step].handle)
        return results

    results = layer.world.run(work)
    for number, step in enumerate((3, 0, 4, 1, 2, 3)):
        assert_same_results([of_rank[number] for of_rank in results], wanted[step])


@pytest.mark.parametrize("shape", [TOKEN, PACKED, PACKED.other_mode], ids=str)
def test_num_tokens_on_the_device(shape: RowsShape, layers: Layers) -> None:
    layer = layers[shape]
    full = some(shape, (9, 20, 37), 11)
    counts, told = (4, 0, 37), (4, -3, 1000)  # below 0 is none, and more than there are is all
    cut = Routing(*([part[:n] for part, n in zip(p, counts, strict=True)] for p in (full.x, full.ids, full.weights)))

    def work(world: RankWorld) -> list[RowsResult]:
        inputs = layer.inputs(full, world.rank)
        number = torch.tensor([told[world.rank]], dtype=torch.int32, device=world.device)
        layer.step(world)
        received = layer.ranks[world.rank].dispatch(inputs.x, inputs.ids, inputs.weights, num_tokens=number)
        number.fill_(40)  # read when the kernel runs, and never again
        fresh = layer.finish(world, received)
        return [fresh, layer.pair(world, inputs, handle=received.handle)]

    results = layer.world.run(work)
    wanted = layer.round_trip(cut)
    for step in range(2):
        got = [
            replace(of_rank[step], combined=of_rank[step].combined[:n])
            for of_rank, n in zip(results, counts, strict=True)
        ]
        assert_same_results(got, wanted, by_handle=step == 1)


@pytest.mark.parametrize("shape", [TOKEN, PACKED, PACKED.other_mode], ids=str)
def test_total_counts_add_up(shape: RowsShape, layers: Layers) -> None:
    layer = layers[shape]
    routings = [some(shape, (step, 17, 40 - step), step, "free") for step in range(3)]

    def work(world: RankWorld) -> torch.Tensor:
        totals = torch.full((len(layer.ranks[world.rank].local_experts),), 5, dtype=torch.int32, device=world.device)
        for routing in routings:
            layer.pair(world, layer.inputs(routing, world.rank), total_counts=totals)
        return totals.cpu()

    expected = [expected_of(shape, routing) for routing in routings]
    for rank, got in enumerate(layer.world.run(work)):
        assert torch.equal(got, 5 + sum(each[rank].counts for each in expected))


@BOTH
def test_given_outputs(shape: RowsShape, layers: Layers) -> None:
    """`out` of dispatch and combine; its rows are how many rows the result has."""
    layer = layers[shape]
    routing = some(shape, (5, 9, 0), 2)
    wanted = layer.round_trip(routing)

    def work(world: RankWorld) -> RowsResult:
        rank, inputs = layer.ranks[world.rank], layer.inputs(routing, world.rank)
        tokens = torch.empty(60, shape.hidden, dtype=torch.bfloat16, device=world.device)
        sums = torch.empty(len(inputs.ids), shape.hidden, dtype=torch.bfloat16, device=world.device)
        layer.step(world)
        received = rank.dispatch(inputs.x, inputs.ids, inputs.weights, out=tokens)
        assert received.tokens is tokens
        assert received.handle.rows == 60
        result = layer.finish(world, received, out=sums)
        assert same(sums.cpu(), result.combined)
        return result

    assert_same_results(layer.world.run(work), wanted)


ROOM = 6


@BOTH
def test_strided_outputs_and_biases(shape: RowsShape, layers: Layers) -> None:
    """Also such that do not begin on 16 bytes."""
    layer = layers[shape]
    routing = some(shape, (5, 9, 30), 2)

    def work(world: RankWorld) -> list[torch.Tensor]:
        rank, inputs = layer.ranks[world.rank], layer.inputs(routing, world.rank, biases=1)
        layer.step(world)
        received = rank.dispatch(inputs.x, inputs.ids, inputs.weights)
        layer.step(world)
        y, bias = expert_outputs(received), inputs.biases[0]
        whole = torch.zeros(y.numel() + 1, dtype=y.dtype, device=world.device)
        shifted = whole[1:].view(y.shape).copy_(y)
        results = []
        for outputs, added in ((y, bias), (strided(y, 3), strided(bias, 16)), (shifted, strided(bias, 1))):
            layer.step(world)
            results.append(rank.combine(outputs, received.handle, bias=added)[0])
        rank.synchronize()
        return results

    for results in layer.world.run(work):
        for other in results[1:]:
            assert same(results[0], other)


@BOTH
def test_too_little_room(shape: RowsShape, layers: Layers) -> None:
    """What has no room is left out and reported; nothing is written behind the rows; the next call is whole."""
    layer = layers[shape]
    routing = some(shape, (12, 3, 20), 8)
    expected = expected_of(shape, routing)

    def work(world: RankWorld) -> torch.Tensor:
        rank, inputs = layer.ranks[world.rank], layer.inputs(routing, world.rank)
        memory = torch.full((ROOM + 40, shape.hidden), 7, dtype=torch.bfloat16, device=world.device)
        layer.step(world)
        received = rank.dispatch(inputs.x, inputs.ids, inputs.weights, max_rows=ROOM, out=memory[:ROOM])
        with pytest.raises(errors.CapacityError, match=r"had room for fewer.*max_rows=\d+"):
            rank.synchronize()
        rank.check()  # told once
        layer.step(world)
        rank.dispatch(inputs.x, handle=received.handle)
        with pytest.raises(errors.CapacityError):
            rank.synchronize()
        layer.step(world)
        return memory.cpu()

    for want, memory in zip(expected, layer.world.run(work), strict=True):
        assert len(want.tokens) > ROOM
        used = torch.zeros(len(want.tokens), dtype=torch.bool)
        used[want.rows[want.rows >= 0]] = True
        assert same(memory[:ROOM][used[:ROOM]], want.tokens[:ROOM][used[:ROOM]])
        assert (memory[ROOM:] == 7).all()
    layer.verify(routing, layer.round_trip(routing))


@BOTH
def test_combine_of_what_had_too_little_room(shape: RowsShape, layers: Layers) -> None:
    """It reads no row that is not there."""
    layer = layers[shape]
    routing = some(shape, (12, 3, 20), 8)
    sums = shape.layout == "token"

    def work(world: RankWorld) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        rank, inputs = layer.ranks[world.rank], layer.inputs(routing, world.rank)
        beyond = torch.full((ROOM + 400, shape.hidden), float("nan"), dtype=torch.bfloat16, device=world.device)
        beside = torch.full((ROOM + 400, shape.topk), float("nan"), device=world.device)
        layer.step(world)
        received = rank.dispatch(inputs.x, inputs.ids, inputs.weights, max_rows=ROOM)
        with pytest.raises(errors.CapacityError):
            rank.synchronize()
        layer.step(world)
        y = beyond[:ROOM].copy_(expert_outputs(received))
        given = None
        if sums:
            assert received.topk_weights is not None
            given = beside[:ROOM].copy_(received.topk_weights)
        layer.step(world)
        combined, added = rank.combine(y, received.handle, given)
        rank.synchronize()
        layer.step(world)
        return y.cpu(), combined.cpu(), None if given is None else given.cpu(), None if added is None else added.cpu()

    results = layer.world.run(work)
    expected = expected_of(shape, routing)
    tokens = [len(part) for part in routing.x]
    wanted = reference_rows.combine_rows([y for y, *_ in results], expected, tokens, shape.topk)
    for rank, (want, (_, combined, _, _)) in enumerate(zip(wanted, results, strict=True)):
        assert_within(f"rank {rank}", combined, want)
    if sums:
        padded = [
            torch.cat((given, torch.zeros(len(want.row_tokens), shape.topk)))
            for want, (_, _, given, _) in zip(expected, results, strict=True)
            if given is not None
        ]
        for rank, want_sums in enumerate(reference_rows.sum_weights(padded, expected, tokens)):
            got = results[rank][3]
            assert got is not None
            assert_within(f"rank {rank}", got, want_sums)


def test_warmup_then_use(device: str) -> None:
    for shape in (POOL[7], POOL[6], PACKED):
        layer = RowsLayer(shape, device)
        layer.world.run(lambda world, layer=layer: layer.ranks[world.rank].warmup())
        routing = some(shape, range(shape.ranks), 9)
        layer.verify(routing, layer.round_trip(routing))
        layer.destroy()


def soak(device: str, shape: RowsShape, pairs: int) -> None:
    """Back-to-back pairs, every other one by a handle, with random delays per rank and no host synchronisation; every
    result equals the first.
    """
    layer = RowsLayer(shape, device)
    routings = [
        some(shape, [(7 * rank + 5 * step) % 25 for rank in range(shape.ranks)], step, ["uniform", "free"][step % 2])
        for step in range(4)
    ]
    golden = [layer.round_trip(routing) for routing in routings]
    for routing, results in zip(routings, golden, strict=True):
        layer.verify(routing, results)

    def work(world: RankWorld) -> int:
        rank = layer.ranks[world.rank]
        generator = torch.Generator().manual_seed(world.rank)
        inputs = [layer.inputs(routing, world.rank) for routing in routings]
        wanted = [results[world.rank].combined.to(device) for results in golden]
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        layer.step(world)
        for step in range(pairs):
            delay(device, generator)
            part = inputs[step % 4]
            received = rank.dispatch(part.x, part.ids, part.weights)
            if step % 2:
                received = rank.dispatch(part.x, handle=received.handle)
            combined, _ = rank.combine(expert_outputs(received), received.handle)
            wrong += (combined != wanted[step % 4]).sum()
        rank.synchronize()
        return int(wrong)

    assert layer.world.run(work) == [0] * shape.ranks
    layer.destroy()


SOAKED = pytest.mark.parametrize("shape", [TOKEN, PACKED, POOL[7]], ids=str)


@SOAKED
def test_back_to_back_30(device: str, shape: RowsShape) -> None:
    soak(device, shape, 30)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@SOAKED
def test_back_to_back_1000(device: str, shape: RowsShape) -> None:
    soak(device, shape, 1000)


BIG = replace(TOKEN, max_tokens=512)
"""Three objects hold more than 100 MB."""


def make_and_destroy(device: str, cycles: int) -> None:
    """After a few, more of them take nothing. What the allocator of a process keeps for its threads goes up and down by
    as much as a few objects hold, but does not grow each time.
    """
    world = moegen.LocalWorld(BIG.ranks, device)

    def held() -> int:
        gc.collect()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            return total - free
        ctypes.CDLL(None).malloc_trim(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cycle() -> None:
        layer = RowsLayer(BIG, device, world=world)
        routing = some(BIG, (40, 7, 0), 1)
        layer.round_trip(routing)
        layer.destroy()

    for _ in range(4):
        cycle()
    files = sorted(os.listdir("/dev/shm"))
    allowed = 2 << 20 if device == "cuda" else 64 << 20
    grown: list[int] = []
    while len(grown) < 4 and min(grown, default=allowed) >= allowed:
        before = held()
        for _ in range(cycles):
            cycle()
        grown.append(held() - before)
    assert min(grown) < allowed, f"{grown} bytes"
    assert [name for name in os.listdir("/dev/shm") if name.startswith("moegen-") and name not in files] == []


def test_20_objects_leave_no_memory_behind(device: str) -> None:
    make_and_destroy(device, 20)


@pytest.mark.slow
def test_200_objects_leave_no_memory_behind(device: str) -> None:
    make_and_destroy(device, 200)


def test_two_objects_in_two_threads(device: str) -> None:
    """Each with ranks of its own; on a GPU few blocks leave room for the other's."""
    pair = [RowsLayer(shape, device, num_sms=4) for shape in (replace(TOKEN, hidden=2880), PACKED.other_mode)]
    failures: list[BaseException] = []
    for each in pair:  # torch loads its kernels while nobody waits
        each.round_trip(some(each.shape, (1, 2, 3), 0))

    def use(layer: RowsLayer) -> None:
        try:
            for step in range(10):
                routing = some(layer.shape, (step, 30 - step, 3 * step), step, "free")
                layer.verify(routing, layer.round_trip(routing))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(layer,)) for layer in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for layer in pair:
        layer.destroy()


def test_two_objects_on_the_same_ranks(device: str) -> None:
    """Their calls take turns; each has its own epochs and buffers."""
    world = moegen.LocalWorld(3, device)
    pair = [RowsLayer(shape, device, world=world) for shape in (TOKEN, PACKED)]
    routings = [some(layer.shape, (20, 0, 7), 4, "free") for layer in pair]
    wanted = [layer.round_trip(routing) for layer, routing in zip(pair, routings, strict=True)]

    def work(rank: RankWorld) -> list[list[RowsResult]]:
        inputs = [layer.inputs(routing, rank.rank) for layer, routing in zip(pair, routings, strict=True)]
        results = []
        for _ in range(3):
            received = []
            for layer, part in zip(pair, inputs, strict=True):
                layer.step(rank)
                received.append(layer.ranks[rank.rank].dispatch(part.x, part.ids, part.weights))
            results.append([layer.finish(rank, got) for layer, got in zip(pair, received, strict=True)][::-1])
        return results

    got = world.run(work)
    for turn in range(3):
        for number in range(2):
            assert_same_results([of_rank[turn][1 - number] for of_rank in got], wanted[number])
    for layer in pair:
        layer.destroy()
