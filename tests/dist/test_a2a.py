# SPDX-License-Identifier: Apache-2.0
"""`OneSided` between processes: gloo groups on the CPU, and on all GPUs of the machine (two ranks share a single one)."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.a2a_data import DTYPES, How, PayloadShape, expected_of, outputs_of, random_batch, verify_combine, verify_dispatch
from support.a2a_layer import Got, copied, given_of, make
from support.processes import Processes, devices, ranks_on

SHAPES = (
    PayloadShape(4, 16, 10, 8, "fp8", "pulled", "fp16", "fp32"),
    PayloadShape(4, 16, 2, 512, "sixteen", "pushed", "bf16", max_tokens=150),
)
"""The first has kernels of `support.a2a_cases.POOL`, which need not be compiled again on a CPU."""


@pytest.fixture(scope="module", params=devices())
def group(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(ranks_on(request.param), request.param)
    yield processes
    processes.stop()


def on_each_rank(group: Processes, shape: PayloadShape) -> PayloadShape:
    return replace(shape, ranks=group.size)


def hows(shape: PayloadShape, rounds: int) -> list[How]:
    """Slots per source change; ids are filled in, statistics gathered, and tokens counted on the device in some."""
    ids = next(index for index, (_, dtype) in enumerate(shape.columns) if dtype == torch.int32)
    return [
        How(
            max_tokens=(None, 24, shape.max_tokens // 2)[step % 3],
            narrow=step % 2 == 1,
            unused_ids=(ids, -1) if step % 2 else None,
            stats=7 * (step % 3),
            told=tuple(3 * rank for rank in range(shape.ranks)) if step % 4 == 3 else None,
        )
        for step in range(rounds)
    ]


def round_trips(rank: int, device: str, shape: PayloadShape, rounds: int) -> str:
    """Pairs with zero tokens on some ranks, and once on all, each verified."""
    torch.set_num_threads(1)
    with make(torch.distributed.group.WORLD, shape, device=device) as layer:
        for seed, how in enumerate(hows(shape, rounds)):
            most = how.max_tokens or shape.max_tokens
            idle = [seed == 4 or (r + seed) % 3 == 0 for r in range(shape.ranks)]
            tokens = [0 if idle[r] else (29 * r + 41 * seed) % (most + 1) for r in range(shape.ranks)]
            batch = random_batch(shape, tokens, seed, ("uniform", "free", "one")[seed % 3])
            expected, given = expected_of(shape, batch, how), given_of(shape, batch, how, rank, device)
            received = layer.dispatch(given.ids, given.payloads, **given.options)
            planes = [copied(plane) for plane in received.payloads]
            y = outputs_of(shape, expected[rank], seed + rank)
            rows = y.to(device)
            if shape.rows == "pulled":
                rows = layer.expert_rows(y.shape[1]).copy_(rows)
            combined = layer.combine(rows, received.handle, out_dtype=shape.out_dtype)
            layer.synchronize()
            stats = None if received.stats is None else received.stats.cpu()
            mine = Got(planes, received.counts.cpu(), stats, y, combined.cpu())
            verify_dispatch(f"rank {rank}", expected[rank], mine, how, poisoned=False)
            sums = [Got([], mine.counts, None, *pair) for pair in layer.world.exchange((mine.y, mine.combined))]
            verify_combine(shape, batch, how, expected, sums)
    return "ok"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trips_equal_reference(group: Processes, shape: PayloadShape) -> None:
    assert group.call(round_trips, on_each_rank(group, shape), 8) == ["ok"] * group.size


def fifty_pairs(rank: int, device: str, shape: PayloadShape) -> int:
    """No rank waits for another but in kernels; every sum equals the first of its kind."""
    with make(torch.distributed.group.WORLD, shape, device=device) as layer:
        slots = (shape.max_tokens, 9)
        batches = [random_batch(shape, [(17 * r + 9) % (n + 1) for r in range(shape.ranks)], n, "free") for n in slots]
        given = [given_of(shape, batch, How(max_tokens=n), rank, device) for batch, n in zip(batches, slots, strict=True)]
        ys = [outputs_of(shape, expected_of(shape, batch, How(max_tokens=n))[rank], n).to(device)
              for batch, n in zip(batches, slots, strict=True)]  # fmt: skip
        wrong, wanted = torch.zeros((), dtype=torch.int64, device=device), {}
        for step in range(50 if device == "cpu" else 10):  # two processes on one GPU take turns, milliseconds each
            now = step % 2
            received = layer.dispatch(given[now].ids, given[now].payloads, **given[now].options)
            rows = ys[now]
            if shape.rows == "pulled":
                rows = layer.expert_rows(rows.shape[1]).copy_(rows)
            combined = layer.combine(rows, received.handle, out_dtype=shape.out_dtype)
            wrong += (combined != wanted.setdefault(now, combined)).sum()
        layer.synchronize()
        return int(wrong)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_back_to_back_between_processes(group: Processes, shape: PayloadShape) -> None:
    assert group.call(fifty_pairs, on_each_rank(group, shape)) == [0] * group.size


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
