# SPDX-License-Identifier: Apache-2.0
"""Tests of `OneSided` that run on every device; tests/host and tests/gpu collect them with their own `device`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moegen.errors import PeerTimeoutError
from moegen.runtime.worlds import RankWorld
from support.a2a_build import build
from support.a2a_data import (
    DTYPES,
    MEMORIES,
    Got,
    How,
    PayloadShape,
    expected_of,
    outputs_of,
    random_batch,
    verify_combine,
    verify_dispatch,
)
from support.a2a_layer import PayloadLayer

POOL = (
    PayloadShape(1, 5, 1, 8, "small", "pushed", "bf16", "fp16"),
    PayloadShape(1, 384, 16, 128, "layer", "pulled", "fp32", "fp32"),
    PayloadShape(1, 33, 3, 512, "fp8", "pulled", "fp8"),
    PayloadShape(1, 8, 8, 2880, "sixteen", "pushed", "fp16", "fp32"),
    PayloadShape(2, 6, 2, 24, "bool", "pulled", "fp16"),
    PayloadShape(2, 9, 8, 16, "layer", "pushed", "fp8"),
    PayloadShape(2, 384, 1, 2880, "fp8", "pulled", "fp32", "bf16"),
    PayloadShape(2, 13, 11, 512, "sixteen", "pulled", "bf16", "fp32"),
    PayloadShape(3, 11, 4, 2880, "layer", "pulled", "bf16"),
    PayloadShape(4, 16, 10, 8, "fp8", "pulled", "fp16", "fp32"),
    PayloadShape(5, 384, 6, 512, "small", "pushed", "fp32"),
    PayloadShape(5, 33, 1, 64, "sixteen", "pulled", "fp8", "fp16"),
    PayloadShape(6, 12, 1, 512, "layer", "pushed", "fp16", "bf16"),
    PayloadShape(7, 21, 5, 64, "fp8", "pushed", "bf16", "fp16"),
    PayloadShape(8, 27, 13, 2880, "small", "pushed", "fp8", "fp32"),
    PayloadShape(9, 384, 2, 8, "sixteen", "pulled", "fp32"),
)
PULLED, PUSHED = POOL[9], POOL[10]
"""Of most tests below; the kernels are those of the pool."""
BOTH = pytest.mark.parametrize("shape", [PULLED, PUSHED], ids=str)


def levels(shape: PayloadShape) -> dict[str, object]:
    """What of a shape the pool covers pairwise."""

    def at(value: int, *ends: int) -> int:
        return sum(value > end for end in ends)

    return {
        "ranks": at(shape.ranks, 1, 2, 5),
        "experts": 2 if shape.experts == 384 else int(shape.experts % max(shape.ranks, 2) != 0),
        "topk": at(shape.topk, 1, 4, 8),
        "payloads": "small" if shape.payloads == "bool" else shape.payloads,
        "hidden": at(shape.hidden, 16, 128, 512),
        "rows": shape.rows,
        "dtype": shape.dtype,
        "out": shape.out if shape.out in (None, "fp32") else "narrow",
    }


@pytest.mark.parametrize(
    "of",
    [("ranks", "experts", "topk", "payloads", "hidden"), ("ranks", "hidden", "rows", "dtype", "out")],
    ids=["dispatch", "combine"],
)
def test_the_pool_covers_every_pair(of: tuple[str, ...]) -> None:
    seen = [levels(shape) for shape in POOL]
    for one, two in combinations(of, 2):
        pairs = {(each[one], each[two]) for each in seen}
        wanted = {(a[one], b[two]) for a in seen for b in seen}
        assert pairs == wanted, f"{one} and {two}: {sorted(wanted - pairs, key=str)}"


@pytest.fixture(scope="module", autouse=True)
def one_thread_per_rank() -> Iterator[None]:
    """Ranks are threads already; torch's own would only get in their way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def layers(device: str) -> Iterator[dict[PayloadShape, PayloadLayer]]:
    """One layer per shape, made when first used. NVRTC is slow, so a GPU's kernels are compiled all at once; on a CPU
    several test processes would then compile the same ones at the same time.
    """
    if device == "cuda":
        build(POOL, device)
    made: dict[PayloadShape, PayloadLayer] = {}

    class Layers(dict[PayloadShape, PayloadLayer]):
        def __missing__(self, shape: PayloadShape) -> PayloadLayer:
            if shape in POOL:
                build((shape,), device)
            made[shape] = self[shape] = PayloadLayer(shape, device)
            return made[shape]

        def __repr__(self) -> str:
            return "layers"

    yield Layers()
    for layer in made.values():
        layer.destroy()


Layers = dict[PayloadShape, PayloadLayer]
KINDS = ("uniform", "free", "one", "none")
DRAWN = settings(
    max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def tokens(draw: Any, shape: PayloadShape, largest: int) -> list[int]:
    """Per rank: uneven, and none on one, on several, on all but one, on all."""
    counts = [draw(st.sampled_from([0, 1, largest]) | st.integers(0, largest)) for _ in range(shape.ranks)]
    idle = draw(st.sampled_from(["nobody", "somebody", "all but one", "everybody"]))
    if idle == "nobody":
        return counts
    busy = {"somebody": st.sets(st.integers(0, shape.ranks - 1)), "all but one": st.just({counts[0] % shape.ranks})}
    still = draw(busy[idle]) if idle in busy else set()
    return [count if rank in still else 0 for rank, count in enumerate(counts)]


@st.composite
def hows(draw: Any, shape: PayloadShape) -> How:
    slots = draw(st.none() | st.integers(1, shape.max_tokens))
    ids = [index for index, (_, dtype) in enumerate(shape.columns) if dtype == torch.int32]
    return How(
        max_tokens=slots,
        narrow=draw(st.booleans()),
        memory=draw(st.sampled_from(MEMORIES)),
        told=draw(st.none() | st.tuples(*[st.integers(-1, shape.max_tokens + 3)] * shape.ranks)),
        unused_ids=(draw(st.sampled_from(ids)), draw(st.sampled_from([-1, 0, 384, 2**31 - 1]))) if ids else None,
        stats=draw(st.sampled_from([0, 0, 1, 7, 384])),
        given_out=draw(st.booleans()),
    )


EXCHANGED = PayloadShape(3, 11, 4, 64, "sixteen", "exchanged", "fp8", "fp16")


@pytest.mark.parametrize("shape", [*POOL, EXCHANGED], ids=str)
@DRAWN
@given(data=st.data())
def test_round_trip_equals_reference(shape: PayloadShape, layers: Layers, data: Any) -> None:
    how = data.draw(hows(shape))
    counts = data.draw(tokens(shape, how.max_tokens or shape.max_tokens))
    batch = random_batch(shape, counts, data.draw(st.integers(0, 2**31 - 1)), data.draw(st.sampled_from(KINDS)))
    layers[shape].round_trip(batch, how)


@BOTH
def test_full_capacity(shape: PayloadShape, layers: Layers) -> None:
    for kind in KINDS:
        layers[shape].round_trip(random_batch(shape, [shape.max_tokens] * shape.ranks, 1, kind))


@BOTH
@pytest.mark.parametrize("pattern", [[0], [1, 3], [0, 1, 2], "all"], ids=str)
def test_ranks_without_tokens(shape: PayloadShape, layers: Layers, pattern: Any) -> None:
    """They still get others' tokens and send back what became of them; and have tokens again in the next call."""
    idle = range(shape.ranks) if pattern == "all" else pattern
    for seed in range(3):
        counts = [0 if seed != 1 and rank in idle else (7 * rank + 5 * seed) % 25 for rank in range(shape.ranks)]
        layers[shape].round_trip(random_batch(shape, counts, seed))


@BOTH
@DRAWN
@given(data=st.data())
def test_calls_in_any_order(shape: PayloadShape, layers: Layers, data: Any) -> None:
    """Several dispatches before a combine, several combines by one handle, other slots each time; ranks are late."""
    layer = layers[shape]
    number = data.draw(st.integers(1, 3))
    how = [How(max_tokens=data.draw(st.integers(1, shape.max_tokens))) for _ in range(number)]
    batches = [
        random_batch(shape, data.draw(tokens(shape, how[index].max_tokens or 0)), index, KINDS[index % 2])
        for index in range(number)
    ]
    calls = data.draw(st.lists(st.tuples(st.booleans(), st.integers(0, number - 1)), min_size=2, max_size=7))
    expected = [expected_of(shape, *pair) for pair in zip(batches, how, strict=True)]

    def work(world: RankWorld) -> list[Got]:
        handles: dict[int, tuple[Any, Got]] = {}
        results = []
        for dispatches, index in calls:
            if dispatches or index not in handles:
                handles[index] = layer.dispatch(world, batches[index], how[index], poisoned=False)
                results.append(handles[index][1])
                continue
            received, got = handles[index]
            y = outputs_of(shape, expected[index][world.rank], len(results))
            results.append(replace(got, y=y, combined=layer.combine(world, y, received.handle, how[index])))
        return results

    results = layer.world.run(work)
    seen: set[int] = set()
    for step, (dispatches, index) in enumerate(calls):
        of_step = [of_rank[step] for of_rank in results]
        for rank, got in enumerate(of_step):
            verify_dispatch(f"rank {rank}", expected[index][rank], got, how[index], poisoned=False)
        if not dispatches and index in seen:
            verify_combine(shape, batches[index], how[index], expected[index], of_step)
        seen.add(index)


BULK = (PayloadShape(3, 11, 4, 2880, "sixteen", max_tokens=70), PayloadShape(2, 9, 8, 1024, "layer"))


@pytest.mark.parametrize("warp_groups", ["3x1", "1x2"])
@pytest.mark.parametrize("shape", BULK, ids=str)
def test_rows_that_travel_by_bulk_copies(shape: PayloadShape, warp_groups: str, device: str) -> None:
    """More tokens to a block than a warp plans at once, and fewer than teams; other payloads go through registers."""
    layer = PayloadLayer(shape, device, copy="bulk", warp_groups=warp_groups, num_sms=2)
    assert any(spec.dynamic_shared_bytes for spec in layer.ranks[0].specs)
    for seed, kind in enumerate(KINDS):
        counts = [(shape.max_tokens - 31 * rank * seed) % (shape.max_tokens + 1) for rank in range(shape.ranks)]
        layer.round_trip(random_batch(shape, counts, seed, kind))
    layer.destroy()


def test_bulk_copies_of_a_call_that_gives_up(device: str) -> None:
    """A rank's first rows are on their way into its shared memory when it learns that a peer is not ready for them."""
    shape = BULK[1]
    layer = PayloadLayer(shape, device, copy="bulk", warp_groups="3x1", num_sms=2, timeout=0.5)
    batch = random_batch(shape, [5, 5], 1)
    layer.world.run(layer.dispatch, batch, How())

    def alone(world: RankWorld) -> None:
        if world.rank == 0:
            layer.call(world, layer.given(batch, How(), 0))
            layer.ranks[0].synchronize()

    with pytest.raises(PeerTimeoutError, match="reading of the rows before of rank 1"):
        layer.world.run(alone)
    layer.destroy()


@pytest.mark.parametrize("rows", ["pulled", "pushed"])
def test_payloads_of_a_byte_in_no_more_room_than_they_need(device: str, rows: str) -> None:
    """Sixteen of them; what comes behind their buffers is whole, too."""
    columns = ((1, torch.uint8),) * 16
    shape = PayloadShape(3, 9, 2, 8, "bool", rows, max_tokens=5)
    layer = PayloadLayer(shape, device, payloads=columns, payload_bytes=16)
    for seed in range(4):
        layer.round_trip(random_batch(shape, [5, 5, seed], seed, "one", columns))
    layer.destroy()


@pytest.mark.parametrize("shape", [PUSHED, POOL[6]], ids=str)
def test_other_dtypes_and_payloads_than_foreseen(shape: PayloadShape, device: str) -> None:
    """Their kernels are loaded when they are first used. Rows that are shorter go where longer ones do."""
    assert shape.dtype == "fp32"
    layer = PayloadLayer(shape, device)
    calls = (("fp8", "fp32"), ("bf16", None), ("fp32", shape.out), ("fp8", "fp32"), ("bf16", None))
    columns = (shape.columns, shape.columns[:1], shape.columns[::-1])
    batches = [
        random_batch(shape, [(5 * r + 3 * step) % 25 for r in range(shape.ranks)], step, "free", columns[step % 3])
        for step in range(len(calls))
    ]
    expected = [expected_of(shape, batch, How()) for batch in batches]
    cases = [
        (DTYPES[dtype], None if out is None else DTYPES[out], batch, wanted)
        for (dtype, out), batch, wanted in zip(calls, batches, expected, strict=True)
    ]

    def work(world: RankWorld) -> list[Got]:
        results = []
        for dtype, out, batch, wanted in cases:
            received, got = layer.dispatch(world, batch, How())  # type: ignore[misc]
            y = outputs_of(shape, wanted[world.rank], batch.seed, dtype)
            combined = layer.combine(world, y, received.handle, How(), out_dtype=out)
            results.append(replace(got, y=y, combined=combined))
        return results

    results = layer.world.run(work)
    for step, (_, out, batch, wanted) in enumerate(cases):
        of_step = [of_rank[step] for of_rank in results]
        for rank, got in enumerate(of_step):
            verify_dispatch(f"rank {rank}", wanted[rank], got, How())
        verify_combine(replace(shape, out=None), batch, How(), wanted, of_step, out)
    layer.destroy()


def test_sums_beyond_the_largest_number(layers: Layers) -> None:
    """Float16 ends at 65504: what two rows of 60000 add up to is infinite there, and is not in float32."""
    layer, how = layers[POOL[4]], How()
    shape = layer.shape
    assert (shape.ranks, shape.dtype) == (2, "fp16")
    batch = random_batch(shape, [2, 1], 1)
    batch.ids[0][0] = torch.tensor([0, shape.experts - 1])
    batch.ids[0][1] = -1
    expected = expected_of(shape, batch, how)

    def work(world: RankWorld) -> list[torch.Tensor]:
        received, _ = layer.dispatch(world, batch, how)  # type: ignore[misc]
        y = torch.full_like(outputs_of(shape, expected[world.rank], 1), 60000.0)
        outs = (torch.float16, torch.float32)
        return [layer.combine(world, y, received.handle, how, out_dtype=out) for out in outs]

    half, single = layer.world.run(work)[0]
    assert (half[0] == float("inf")).all()
    assert (single[0] == 120000.0).all()
    assert (half[1] == 0).all()
