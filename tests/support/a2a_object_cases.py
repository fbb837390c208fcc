# SPDX-License-Identifier: Apache-2.0
"""Objects of `OneSided`: many of them, and at the far ends of the domain; on every device."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import moegen
from moegen import reference
from moegen.runtime.worlds import MAX_CONNECTIONS, RankWorld
from support.a2a_cases import BOTH, KINDS, PULLED, PUSHED, one_thread_per_rank  # noqa: F401
from support.a2a_data import DTYPES, Batch, How, PayloadShape, expected_of, outputs_of, random_batch
from support.a2a_layer import PayloadLayer

EDGES = (
    PayloadShape(16, 384, 8, 64, "layer", "pulled", max_tokens=8),
    PayloadShape(33, 70, 4, 16, "small", "pushed", "fp16", max_tokens=4),
    PayloadShape(64, 64, 3, 8, "bool", "pulled", "fp32", max_tokens=2),
    PayloadShape(2, 64, 32, 64, "sixteen", "pushed", max_tokens=8),
    PayloadShape(1, 1024, 32, 8, "layer", "pushed", max_tokens=300),
    PayloadShape(2, 8, 2, 32768, "layer", "pushed", max_tokens=20),
    PayloadShape(2, 8, 2, 16384, "fp8", "pushed", "fp32", max_tokens=20),
    PayloadShape(2, 16, 8, 16, "small", "pushed", max_tokens=1500),
)
"""Ranks, experts, top-k, the longest rows (64 KiB), many tokens."""


@pytest.mark.slow
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges_of_the_domain(shape: PayloadShape, device: str) -> None:
    if device == "cuda" and shape.ranks > MAX_CONNECTIONS:
        pytest.skip(f"a GPU has {MAX_CONNECTIONS} queues at most: no room for {shape.ranks} virtual ranks")
    layer = PayloadLayer(shape, device)
    for seed, kind in enumerate(("uniform", "free", "one")):
        tokens = [(shape.max_tokens + 3 * rank * seed) % (shape.max_tokens + 1) for rank in range(shape.ranks)]
        layer.round_trip(random_batch(shape, tokens, seed, kind))
    layer.destroy()


@st.composite
def shapes(draw: Any) -> PayloadShape:
    ranks = draw(st.integers(1, 9))
    experts = draw(st.integers(ranks, 384))
    return PayloadShape(
        ranks,
        experts,
        draw(st.integers(1, min(16, experts))),
        16 * draw(st.integers(1, 200)),
        draw(st.sampled_from(["bool", "small", "layer", "fp8", "sixteen"])),
        draw(st.sampled_from(["pushed", "pulled"])),
        draw(st.sampled_from(list(DTYPES))),
        draw(st.sampled_from([None, "bf16", "fp16", "fp32"])),
        draw(st.integers(1, 70)),
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes(), seed=st.integers(0, 2**31 - 1), sms=st.sampled_from([None, 1, 3]))
def test_drawn_shapes(device: str, shape: PayloadShape, seed: int, sms: int | None) -> None:
    layer = PayloadLayer(shape, device, num_sms=sms)
    tokens = [(seed // (rank + 1)) % (min(shape.max_tokens, 30) + 1) for rank in range(shape.ranks)]
    layer.round_trip(random_batch(shape, tokens, seed, "free"))
    layer.destroy()


@BOTH
@pytest.mark.parametrize("sms", [1, 2])
def test_few_blocks(shape: PayloadShape, device: str, sms: int) -> None:
    layer = PayloadLayer(shape, device, num_sms=sms)
    for seed, kind in enumerate(KINDS):
        layer.round_trip(random_batch(shape, [(31 * rank + 7 * seed) % 25 for rank in range(shape.ranks)], seed, kind))
    layer.destroy()


@BOTH
def test_epoch_wraps(shape: PayloadShape, device: str) -> None:
    """Of dispatch after a few rounds, for a round trip here dispatches three times; of combine later."""
    layer = PayloadLayer(shape, device, first_epoch=0xFFFFFFF0)
    for step in range(20):
        batch = random_batch(shape, [(step + 5 * rank) % 25 for rank in range(shape.ranks)], step, KINDS[step % 2])
        layer.round_trip(batch, How(max_tokens=24 - step % 3 * 8 if max(batch.tokens) <= 8 else None))
    layer.destroy()


def test_warmup_then_use(device: str) -> None:
    for shape in (PULLED, PUSHED):
        layer = PayloadLayer(shape, device)
        layer.world.run(lambda world, layer=layer: layer.ranks[world.rank].warmup())
        layer.round_trip(random_batch(shape, list(range(shape.ranks)), 9))
        layer.destroy()


@BOTH
def test_what_an_object_says_of_itself(shape: PayloadShape, device: str) -> None:
    layer = PayloadLayer(shape, device)
    for number, rank in enumerate(layer.ranks):
        assert (rank.rank, rank.num_ranks) == (number, shape.ranks)
        assert rank.local_experts == reference.expert_ranges(shape.experts, shape.ranks)[number]
        assert rank.device.type == device
    layer.destroy()


# ---- many -----------------------------------------------------------------------------------------

BIG = replace(PUSHED, max_tokens=320)
"""Three objects hold more than 64 MiB."""


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

    batch, how = random_batch(BIG, [9, 0, 7, 1, 3], 1), How(max_tokens=9)
    expected = expected_of(BIG, batch, how)

    def cycle() -> None:
        layer = PayloadLayer(BIG, device, world=world)
        assert sum(rank.buffer_bytes for rank in layer.ranks) > 22 << 20
        layer.world.run(used_once, layer, batch, how, expected)
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


def used_once(world: RankWorld, layer: PayloadLayer, batch: Batch, how: How, expected: Any) -> None:
    received, _ = layer.dispatch(world, batch, how, poisoned=False)  # type: ignore[misc]
    layer.combine(world, outputs_of(layer.shape, expected[world.rank], 1), received.handle, how)


def test_20_objects_leave_no_memory_behind(device: str) -> None:
    make_and_destroy(device, 20)


@pytest.mark.slow
def test_200_objects_leave_no_memory_behind(device: str) -> None:
    make_and_destroy(device, 200)


def test_two_objects_in_two_threads(device: str) -> None:
    """Each with ranks of its own; on a GPU few blocks leave room for the other's."""
    pair = [PayloadLayer(shape, device, num_sms=4) for shape in (PULLED, PUSHED)]
    failures: list[BaseException] = []
    for each in pair:  # torch loads its kernels while nobody waits
        each.round_trip(random_batch(each.shape, [1] * each.shape.ranks, 0))

    def use(layer: PayloadLayer) -> None:
        try:
            for step in range(6):
                counts = [(5 * step + 11 * rank) % 25 for rank in range(layer.shape.ranks)]
                layer.round_trip(random_batch(layer.shape, counts, step, "free"))
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
    world = moegen.LocalWorld(PULLED.ranks, device)
    other = replace(PULLED, payloads="layer", rows="pushed")
    pair = [PayloadLayer(shape, device, world=world) for shape in (PULLED, other)]
    batches = [random_batch(layer.shape, [20, 0, 7, 3], 4 + index, "free") for index, layer in enumerate(pair)]
    expected = [expected_of(layer.shape, batch, How()) for layer, batch in zip(pair, batches, strict=True)]

    def work(rank: RankWorld) -> list[torch.Tensor]:
        results = []
        for _ in range(3):
            made = [layer.dispatch(rank, batch, How()) for layer, batch in zip(pair, batches, strict=True)]
            for index in (1, 0):
                y = outputs_of(pair[index].shape, expected[index][rank.rank], batches[index].seed + rank.rank)
                results.append(pair[index].combine(rank, y, made[index][0].handle, How()))  # type: ignore[index]
        return results

    wanted = [layer.round_trip(batch) for layer, batch in zip(pair, batches, strict=True)]
    for rank, results in enumerate(world.run(work)):
        for turn, combined in enumerate(results):
            assert torch.equal(combined, wanted[1 - turn % 2][rank].combined)  # type: ignore[union-attr, arg-type]
    for layer in pair:
        layer.destroy()
