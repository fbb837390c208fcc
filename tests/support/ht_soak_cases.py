# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput` again and again: back to back, made and destroyed, two objects at once."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import moegen
from moegen.runtime.worlds import RankWorld
from support.ht_cases import PACKED, POOL, TOKEN, some
from support.ht_layer import (
    RowsLayer,
    RowsResult,
    RowsShape,
    assert_same_results,
    expert_outputs,
)
from support.ll_cases import delay


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
            if "PYTEST_XDIST_WORKER" in os.environ:  # other processes use this GPU: only what torch holds is ours
                return torch.cuda.memory_reserved()
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
