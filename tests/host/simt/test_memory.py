# SPDX-License-Identifier: Apache-2.0
"""Memory operations between blocks and between launches that run at once, waits and clocks."""

from __future__ import annotations

import functools
import mmap
import os
import time

import numpy as np
import pytest
from simt_harness import Kernels, aligned_bytes, at_once, words


@pytest.mark.parametrize("seed", [0, 1])
def test_atomics_across_blocks(kernels: Kernels, seed: int) -> None:
    out = words(11)
    out[4] = 0xFFFFFFFF
    wide, real = np.zeros(1, np.uint64), np.zeros(1, np.float32)
    kernels.launch("atomics", 4, 64, out=out, a=wide, b=real, seed=seed)
    owner = out[7]
    assert 1 <= owner <= 256
    assert out.tolist() == [256, 255, 2**32 - 255, 2**32 - 1, 0, 512, 768, owner, 1, 1, 1]
    assert wide[0] == 256 << 32
    assert real[0] == 128


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_messages_between_two_launches(kernels: Kernels, seed: int) -> None:
    out, payload = words(3), words(64)
    launch = functools.partial(kernels.launch, block=64, out=out, a=payload, n=200)
    at_once(
        lambda: launch("receive_messages", seed=seed),
        lambda: launch("send_messages", seed=seed and seed + 100),
    )
    assert out.tolist() == [200, 200, 0]


def test_whole_accesses_are_never_torn(kernels: Kernels) -> None:
    out, word = words(2), aligned_bytes(16)
    at_once(
        lambda: kernels.launch("read_whole", block=1, out=out, a=word, n=50_000),
        lambda: kernels.launch("write_whole", block=1, out=out, a=word),
    )
    assert out[1] == 0, "a word was seen in halves"


@pytest.mark.parametrize("seed", [0, 9])
def test_four_ranks_wait_for_each_other(kernels: Kernels, seed: int) -> None:
    out = words(256)
    launches = [
        functools.partial(kernels.launch, "all_ranks_meet", 2, 64, out=out, n=100, flag=rank, seed=seed)
        for rank in range(4)
    ]
    start = time.perf_counter()
    at_once(*launches)
    print(f"100 rounds of 4 ranks x 2 blocks: {(time.perf_counter() - start) * 1e3:.1f} ms")
    assert (out.reshape(4, 64)[:, :8] == 100).all()


def test_four_processes_wait_for_each_other(kernels: Kernels) -> None:
    """Forked ones: a child has none of the OS threads that its parent keeps for blocks."""
    kernels.launch("thread_ids", 2, 32, out=words(128))
    memory = mmap.mmap(-1, 1024)
    out = np.frombuffer(memory, np.uint32)
    children = []
    for rank in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                kernels.launch("all_ranks_meet", 2, 64, out=out, n=100, flag=rank)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert (out.reshape(4, 64)[:, :8] == 100).all()


def test_waiting_by_vote_sleeps(kernels: Kernels) -> None:
    out = words(96)
    kernels.launch("thread_ids", 2, 32, out=words(128))  # its OS threads are there
    waited = time.perf_counter(), time.process_time()

    def set_late() -> None:
        time.sleep(0.5)
        kernels.launch("set_words_late", out=out, n=100)

    at_once(lambda: kernels.launch("poll_by_vote", out=out), set_late)
    elapsed, used = time.perf_counter() - waited[0], time.process_time() - waited[1]
    assert (out[64:] == np.arange(1, 33)).all()
    assert used < elapsed / 2, "a block that only waits must leave the processor to others"


def test_timer(kernels: Kernels) -> None:
    out = words(2)
    kernels.launch("timer", block=1, out=out)
    assert 2_000_000 <= out[0] < 500_000_000
    assert out[1] > 0


def test_unaligned_word(kernels: Kernels) -> None:
    assert "not a multiple of its size" in kernels.error("unaligned_word", a=words(4))


def test_speed(kernels: Kernels) -> None:
    """Printed, not judged: run with -s."""

    def microseconds(kernel: str, grid: int, block: int, n: int) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            kernels.launch(kernel, grid, block, n=n)
            times.append(time.perf_counter() - start)
        return min(times) * 1e6

    for grid, block in ((1, 1), (1, 32), (2, 256), (2, 1024)):
        print(f"launch of {grid} x {block} threads: {microseconds('many_syncs', grid, block, 0):.0f} us")
    pair = microseconds("many_warp_syncs", 1, 2, 1_000_000) / 1e6 * 1e3
    print(f"__syncwarp of 2 lanes, 1 switch: {pair:.1f} ns")
    print(
        f"__syncwarp of 32 lanes: {microseconds('many_warp_syncs', 1, 32, 100_000) / 100_000 * 1e3 / 32:.1f} ns a lane"
    )
    print(f"__syncthreads of 1024: {microseconds('many_syncs', 1, 1024, 1000) / 1000 * 1e3 / 1024:.1f} ns a thread")
