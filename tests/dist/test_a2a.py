# SPDX-License-Identifier: Apache-2.0
"""`OneSided` between processes: gloo groups on the CPU; all GPUs of the machine (two ranks share a single one)."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.a2a_data import DTYPES, How, PayloadShape, random_batch
from support.a2a_layer import given_of, make
from support.a2a_process_cases import back_to_back, round_trips
from support.processes import Processes, devices, ranks_on

SHAPES = (
    PayloadShape(4, 16, 10, 8, "fp8", "pulled", "fp16", "fp32"),
    PayloadShape(4, 16, 2, 512, "sixteen", "pushed", "bf16", max_tokens=150),
)
"""The first has kernels of `support.a2a_cases.POOL`, which need not be compiled again on a CPU."""


@pytest.fixture(scope="module", params=devices())
def group(request: pytest.FixtureRequest, processes: Any) -> Processes:
    kept: Processes = processes(ranks_on(request.param), request.param)
    return kept


def on_each_rank(group: Processes, shape: PayloadShape) -> PayloadShape:
    return replace(shape, ranks=group.size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trips_equal_reference(group: Processes, shape: PayloadShape) -> None:
    assert group.call(round_trips, on_each_rank(group, shape), 8) == ["ok"] * group.size


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_back_to_back_between_processes(group: Processes, shape: PayloadShape) -> None:
    pairs = 10 if group.take_turns else 50
    assert group.call(back_to_back, on_each_rank(group, shape), pairs) == [0] * group.size


def made_and_destroyed(rank: int, device: str, shape: PayloadShape, cycles: int) -> tuple[int, int, int]:
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
    shape = replace(on_each_rank(group, SHAPES[1]), max_tokens=2048)
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


def missing(rank: int, device: str, shape: PayloadShape) -> str:
    """The last rank does not come; what the others say of it."""
    with make(torch.distributed.group.WORLD, shape, device=device, timeout=1.0) as layer:
        said = ""
        if rank != shape.ranks - 1:
            given = given_of(shape, random_batch(shape, [5] * shape.ranks, 1), How(), rank, device)
            try:
                layer.dispatch(given.ids, given.payloads)
                layer.synchronize()
            except Exception as error:
                said = str(error)
        layer.world.barrier()
        return said


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_missing_process(group: Processes, shape: PayloadShape) -> None:
    *others, absent = group.call(missing, on_each_rank(group, shape))
    assert absent == ""
    for said in others:
        assert f"rank {group.size - 1}" in said
        assert "how many rows it sends" in said


def left_out(rank: int, device: str, shape: PayloadShape) -> tuple[list[int], list[float]]:
    """The first rank makes no calls, and nobody misses it; how many rows come from each, and what the sums are."""
    with make(torch.distributed.group.WORLD, shape, device=device) as layer:
        counts, sums = torch.zeros(0), torch.zeros(0)
        if rank != 0:
            mask = (1 << shape.ranks) - 2
            ids = torch.full((5, shape.topk), shape.experts - 1, device=device)  # the last rank's
            given = given_of(shape, random_batch(shape, [5] * shape.ranks, 1), How(), rank, device)
            for _ in range(3):
                received = layer.dispatch(ids, given.payloads, active_ranks=mask)
                y = torch.ones(*received.payloads[0].shape[:2], shape.hidden, device=device).to(DTYPES[shape.dtype])
                combined = layer.combine(y, received.handle, active_ranks=mask)
            layer.synchronize()
            counts, sums = received.counts.cpu(), combined.unique().float().cpu()
        layer.world.barrier()
        return counts.tolist(), sums.tolist()


def test_a_process_that_is_left_out(group: Processes) -> None:
    shape = on_each_rank(group, SHAPES[0])
    counts, sums = zip(*group.call(left_out, shape), strict=True)
    others = group.size - 1
    assert list(counts) == [[], *[[0] * group.size] * (others - 1), [0, *[5] * others]]
    assert list(sums) == [[], *[[1.0]] * others]
