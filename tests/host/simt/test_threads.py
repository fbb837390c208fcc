# SPDX-License-Identifier: Apache-2.0
"""Threads of a block: who they are, how they meet, and what is said when they do not."""

from __future__ import annotations

import re

import numpy as np
import pytest
from simt_harness import Kernels, words


def test_thread_ids(kernels: Kernels) -> None:
    out = words(2 * 3 * 96)
    kernels.launch("thread_ids", 3, 96, out=out)
    threads = np.arange(96)
    pairs = out.reshape(3, 96, 2)
    for block in range(3):
        assert (pairs[block, :, 0] == (block << 16 | threads)).all()
        assert (pairs[block, :, 1] == (3 << 24 | threads // 32 << 16 | threads % 32)).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shared_memory_and_syncthreads(kernels: Kernels, seed: int) -> None:
    out = words(4 * 128)
    kernels.launch("shared_reverse", 4, 128, out=out, n=10, shared=512, seed=seed)
    expected = np.arange(4)[:, None] * 1000 + np.arange(128) + 10
    assert (out.reshape(4, 128) == expected).all()


def test_shared_memory_is_poisoned(kernels: Kernels) -> None:
    for _ in range(2):
        out = words(2)
        kernels.launch("shared_before_use", out=out, block=1)
        assert (out == 0x7FB77FB7).all()
        assert np.isnan(out.view(np.float32)).all()


def test_write_beyond_shared_memory(kernels: Kernels) -> None:
    assert "wrote beyond its dynamic shared memory" in kernels.error("beyond_shared", block=1, shared=100)


@pytest.mark.parametrize(("n", "any_"), [(5, 1), (100, 0)])
def test_syncthreads_votes(kernels: Kernels, n: int, any_: int) -> None:
    out = words(64)
    kernels.launch("sync_votes", block=64, out=out, n=n)
    assert (out == (any_ << 16 | (1 - any_) << 17 | min(n, 64))).all()


@pytest.mark.parametrize("seed", [0, 3])
def test_named_barriers(kernels: Kernels, seed: int) -> None:
    out = words(192)
    kernels.launch("named_barriers", block=192, out=out, n=4, seed=seed)
    assert (out[:64] == np.arange(64) + 8).all()
    assert (out[64:128] == out[:64]).all()
    assert (out[128:] == np.arange(128, 192)).all()


def test_threads_may_exit_early(kernels: Kernels) -> None:
    out = words(64)
    kernels.launch("early_exit", block=64, out=out)
    expected = np.arange(1, 65)
    expected[33] = 0
    expected[40:] = 0
    assert (out == expected).all()


def test_seeds_change_the_order_but_no_result(kernels: Kernels) -> None:
    orders = []
    for seed in (0, 0, 11, 11, 12):
        out = words(257)
        kernels.launch("order", block=256, out=out, seed=seed)
        assert sorted(out[:256]) == list(range(256))
        assert out[256] == 256
        orders.append(out.tobytes())
    assert orders[0] == orders[1]
    assert orders[2] == orders[3]
    assert len(set(orders)) == 3


def test_deadlock_says_who_waits_where(kernels: Kernels) -> None:
    text = kernels.error("deadlock", block=128)
    assert re.search(r"deadlock in block 0: ", text)
    assert re.search(r"threads 0-31 wait at __syncthreads \(32 of 128 threads came\), threads\.cu:\d+", text)
    assert re.search(r"threads 32-63 wait at barrier_sync 5 \(32 of 64 threads came\), threads\.cu:\d+", text)
    assert re.search(r"threads 64-93 wait in __syncwarp with mask 0xffffffff, threads\.cu:\d+", text)
    assert re.search(r"threads 94-95 wait at barrier_sync 6 \(2 of 64 threads came\)", text)
    assert "threads 96-127 exited" in text


def test_divergent_barrier(kernels: Kernels) -> None:
    assert re.search(r"thread 32: divergent barrier.*threads\.cu:\d+", kernels.error("divergent_barrier", block=64))


@pytest.mark.parametrize("faulty", [0, 3])
def test_an_error_in_one_block_stops_the_others(kernels: Kernels, faulty: int) -> None:
    memory = np.zeros(8, np.uint64)
    text = kernels.error("error_in_one_block", 4, 32, out=words(1), a=memory, n=faulty)
    assert re.search(rf"block {faulty}, thread 5: 16-byte load from an address that is not a multiple of 16", text)
    test_thread_ids(kernels)  # the same OS threads serve on


def test_poll_without_pause(kernels: Kernels) -> None:
    assert "without poll_pause" in kernels.error("poll_without_pause", out=words(1))


@pytest.mark.parametrize(
    ("grid", "block", "shared", "text"),
    [
        (0, 32, 0, "grid must be 1 to 256, not 0"),
        (257, 32, 0, "grid must be 1 to 256, not 257"),
        (1, 1025, 0, "block must be 1 to 1024"),
        (1, 32, 300_000, "shared_bytes must be 0 to 232448"),
    ],
)
def test_limits(kernels: Kernels, grid: int, block: int, shared: int, text: str) -> None:
    assert text in kernels.error("thread_ids", grid, block, shared=shared)


def test_size_of_the_parameters(kernels: Kernels) -> None:
    assert kernels.params_bytes("thread_ids") == 32


def test_a_launch_that_runs_on_is_waited_for_again(kernels: Kernels) -> None:
    out = words(32)
    begun = kernels.begin("poll_by_vote", 32, out, wait_ms=5)
    assert (begun.status, begun.runs) == (2, True)
    begun.wait(5)
    assert (begun.status, begun.runs) == (2, True)
    out[:] = 1
    assert begun.wait(5000) == ""
    assert (begun.status, begun.runs) == (0, False)
    done = kernels.begin("poll_by_vote", 32, out, wait_ms=5000)
    assert (done.status, done.runs) == (0, False)


def test_a_launch_is_stopped_where_its_threads_wait(kernels: Kernels) -> None:
    begun = kernels.begin("poll_by_vote", 32, words(32), wait_ms=5)
    begun.stop()
    assert begun.wait(5000) == "stopped by its caller"
    assert (begun.status, begun.runs) == (1, False)
