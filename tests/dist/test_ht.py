# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput` between processes: gloo groups on the CPU; all GPUs of the machine (two ranks share one)."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ht_layer import RowsShape, inputs_of, make
from support.ht_process_cases import back_to_back, round_trips
from support.layer import random_routing
from support.processes import Processes, devices, ranks_on

SHAPES = (
    RowsShape(4, 16, 4, 512, "token", "fp8_ue8m0", max_tokens=150, mode="exact"),
    RowsShape(4, 256, 8, 1024, "packed", "given", max_tokens=64, alignment=4),
)
"""With the kernels of two of `support.ht_cases.POOL`, which need not be compiled again on a CPU."""


@pytest.fixture(scope="module", params=devices())
def group(request: pytest.FixtureRequest, processes: Any) -> Processes:
    kept: Processes = processes(ranks_on(request.param), request.param)
    return kept


def on_each_rank(group: Processes, shape: RowsShape) -> RowsShape:
    return replace(shape, ranks=group.size)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trips_equal_reference(group: Processes, shape: RowsShape) -> None:
    assert group.call(round_trips, on_each_rank(group, shape), 6) == ["ok"] * group.size


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_back_to_back_between_processes(group: Processes, shape: RowsShape) -> None:
    pairs = 10 if group.take_turns else 50
    assert group.call(back_to_back, on_each_rank(group, shape), pairs) == [0] * group.size


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
