# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput` between processes: gloo groups on the CPU, and on all GPUs of the machine (two ranks share a single one)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.ht_layer import (
    RowsResult,
    RowsShape,
    expected_of,
    expert_outputs,
    inputs_of,
    make,
    on_cpu,
    row_weights,
    verify_combine,
    verify_dispatch,
)
from support.layer import random_routing
from support.processes import Processes, devices, ranks_on

SHAPES = (
    RowsShape(4, 16, 4, 512, "token", "fp8_ue8m0", max_tokens=150, mode="exact"),
    RowsShape(4, 256, 8, 1024, "packed", "given", max_tokens=64, alignment=4),
)
"""With the kernels of two of `support.ht_cases.POOL`, which need not be compiled again on a CPU."""


@pytest.fixture(scope="module", params=devices())
def group(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(ranks_on(request.param), request.param)
    yield processes
    processes.stop()


def on_each_rank(group: Processes, shape: RowsShape) -> RowsShape:
    return replace(shape, ranks=group.size)


def round_trips(rank: int, device: str, shape: RowsShape, rounds: int) -> str:
    """Pairs with zero tokens now and then, fresh and by a handle, all verified."""
    torch.set_num_threads(1)
    with make(torch.distributed.group.WORLD, shape, device=device) as layer:
        for seed in range(rounds):
            tokens = [0 if (r + seed) % 3 == 0 else (29 * r + 41 * seed) % (shape.max_tokens + 1)
                      for r in range(shape.ranks)]  # fmt: skip
            routing = random_routing(shape, tokens, seed, kind=("uniform", "free", "one")[seed % 3])
            mine = inputs_of(shape, routing, rank, device, biases=seed % 3)
            expected = expected_of(shape, routing)
            received = layer.dispatch(mine.x, mine.ids, mine.weights)
            again = layer.dispatch(mine.x, handle=received.handle)
            y = expert_outputs(again)
            weights = row_weights(received) if shape.layout == "token" else None
            combined, sums = layer.combine(y, again.handle, weights, bias=mine.biases)
            layer.synchronize()
            verify_dispatch(rank, shape, expected[rank], on_cpu(received))
            verify_dispatch(rank, shape, expected[rank], on_cpu(again), by_handle=True)
            cpu = [None if part is None else part.cpu() for part in (y, weights, combined, sums)]
            results = [RowsResult({}, *parts) for parts in layer.world.exchange(cpu)]
            verify_combine(shape, routing, expected, results, biases=seed % 3)
    return "ok"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trips_equal_reference(group: Processes, shape: RowsShape) -> None:
    assert group.call(round_trips, on_each_rank(group, shape), 6) == ["ok"] * group.size


def fifty_pairs(rank: int, device: str, shape: RowsShape) -> int:
    """No rank waits for another but in kernels; every result equals the first."""
    with make(torch.distributed.group.WORLD, shape, device=device) as layer:
        routing = random_routing(shape, [(17 * r + 9) % 40 for r in range(shape.ranks)], 1, kind="free")
        mine = inputs_of(shape, routing, rank, device)
        wrong, wanted = torch.zeros((), dtype=torch.int64, device=device), None
        for _ in range(50 if device == "cpu" else 10):  # two processes on one GPU take turns, milliseconds each
            received = layer.dispatch(mine.x, mine.ids, mine.weights)
            combined, _ = layer.combine(expert_outputs(received), received.handle)
            wanted = combined if wanted is None else wanted
            wrong += (combined != wanted).sum()
        layer.synchronize()
        return int(wrong)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_back_to_back_between_processes(group: Processes, shape: RowsShape) -> None:
    assert group.call(fifty_pairs, on_each_rank(group, shape)) == [0] * group.size


def made_and_destroyed(rank: int, device: str, shape: RowsShape, cycles: int) -> tuple[int, int, int]:
    """By how many bytes and open files the process, and by how many bytes its GPU, grows."""

    def held() -> tuple[int, int, int]:
        gc.collect()
        torch.distributed.barrier()  # they may share a GPU
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        if device == "cpu":
            return pages * os.sysconf("SC_PAGE_SIZE"), files, 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return 0, 0, total - free

    def cycle() -> None:
        with make(torch.distributed.group.WORLD, shape, device=device) as layer:
            layer.warmup()
            assert layer.buffer_bytes > 8 << 20
            torch.distributed.barrier()

    for _ in range(4):
        cycle()
    before = held()
    for _ in range(cycles):
        cycle()
    bytes_held, files, on_gpu = (after - first for after, first in zip(held(), before, strict=True))
    return bytes_held, files, on_gpu


def leaves_nothing(group: Processes, cycles: int) -> None:
    """Twenty objects that stayed would hold more than 160 MB in each process."""
    shape = replace(on_each_rank(group, SHAPES[0]), max_tokens=4096)
    for bytes_held, files, on_gpu in group.call(made_and_destroyed, shape, cycles):
        assert bytes_held < 64 << 20
        assert files <= 0
        assert on_gpu < 2 << 20
    assert [name for name in os.listdir("/dev/shm") if name.startswith("moegen-")] == []


def test_20_objects_leave_nothing_behind(group: Processes) -> None:
    leaves_nothing(group, 20)


@pytest.mark.slow
def test_200_objects_leave_nothing_behind(group: Processes) -> None:
    leaves_nothing(group, 200)


def missing(rank: int, device: str, shape: RowsShape) -> str:
    """The last rank does not come; what the others say of it."""
    with make(torch.distributed.group.WORLD, shape, device=device, timeout=1.0) as layer:
        said = ""
        if rank != shape.ranks - 1:
            routing = random_routing(shape, [5] * shape.ranks, 1)
            mine = inputs_of(shape, routing, rank, device)
            try:
                layer.dispatch(mine.x, mine.ids, mine.weights)
                layer.synchronize()
            except Exception as error:
                said = str(error)
        layer.world.barrier()
        return said


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_missing_process(group: Processes, shape: RowsShape) -> None:
    *others, absent = group.call(missing, on_each_rank(group, shape))
    assert absent == ""
    for said in others:
        assert f"rank {group.size - 1}" in said
        assert "how many rows it sends" in said
