# SPDX-License-Identifier: Apache-2.0
"""Tests of `HighThroughput` that run on every device; tests/host and tests/gpu collect them with their own `device`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moegen.codegen.render import render
from moegen.compile.binary import obtain_many
from moegen.compile.target import Target
from moegen.kernels.ht import CHUNK
from moegen.row_checks import problem
from moegen.runtime.worlds import MAX_CONNECTIONS
from moegen.select import select_rows
from support.ht_layer import (
    OPTIONS,
    RowsLayer,
    RowsShape,
    assert_same_results,
)
from support.layer import Routing, random_routing

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
    if device == "cuda" and shape.ranks > MAX_CONNECTIONS:
        pytest.skip(f"a GPU has {MAX_CONNECTIONS} queues at most: no room for {shape.ranks} virtual ranks")
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
