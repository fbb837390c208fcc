# SPDX-License-Identifier: Apache-2.0
"""Bulk copies: right, no earlier than they must be, and strict about their rules."""

from __future__ import annotations

import numpy as np
import pytest
from simt_harness import Kernels, aligned_bytes, words


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_pipeline(kernels: Kernels, seed: int) -> None:
    out, source, target = words(1), aligned_bytes(8192), aligned_bytes(8192)
    source.view(np.uint32)[:] = np.arange(2048)
    kernels.launch("bulk_pipeline", block=64, out=out, a=source, b=target, n=8, seed=seed)
    assert (target.view(np.uint32) == np.arange(1, 2049)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_static_shared_memory(kernels: Kernels, seed: int) -> None:
    out, source = words(65), aligned_bytes(256)
    source.view(np.uint32)[:] = np.arange(64)
    kernels.launch("bulk_through_fixed_memory", block=64, out=out, a=source, seed=seed)
    assert out.tolist() == [*range(32, 64), *range(32), 0]


def test_a_load_happens_as_late_as_its_wait(kernels: Kernels) -> None:
    out = words(1)
    kernels.launch("load_is_late", block=1, out=out, a=aligned_bytes(16), n=100)
    assert out[0] == 2


def test_a_seeded_load_happens_at_some_moment(kernels: Kernels) -> None:
    seen = set()
    for seed in range(1, 40):
        out = words(1)
        kernels.launch("load_is_late", block=1, out=out, a=aligned_bytes(16), n=3, seed=seed)
        seen.add(int(out[0]))
    assert seen == {1, 2}


def test_reuse_before_the_read_was_waited_for_corrupts(kernels: Kernels) -> None:
    out, target = words(1), aligned_bytes(16)
    kernels.launch("store_is_late", block=1, out=out, a=target)
    assert (out[0], target.view(np.uint32)[0]) == (0, 2)


def test_reuse_after_bulk_wait_read_is_right_and_the_write_still_late(kernels: Kernels) -> None:
    out, target = words(1), aligned_bytes(16)
    kernels.launch("store_is_late", block=1, out=out, a=target, flag=1)
    assert (out[0], target.view(np.uint32)[0]) == (0, 1)


def test_bulk_wait_leaves_the_newest_groups(kernels: Kernels) -> None:
    out, target = words(4), aligned_bytes(64)
    kernels.launch("groups_in_order", block=1, out=out, a=target)
    assert out.tolist() == [1, 2, 0, 0]
    assert target.view(np.uint32)[::4].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("seed", [0, 4])
def test_mbarrier_phases(kernels: Kernels, seed: int) -> None:
    out = words(7)
    kernels.launch("phases", block=64, out=out, n=7, seed=seed)
    assert (out == 64).all()


@pytest.mark.parametrize("flag", [0, 1])
def test_load_after_an_acquire_without_fence(kernels: Kernels, flag: int) -> None:
    text = kernels.error("load_without_fence", out=words(1), a=aligned_bytes(16), flag=flag)
    assert "thread 0: bulk load after an acquire without fence_proxy_async, bulk.cu:" in text


def test_load_after_an_acquire_with_fence(kernels: Kernels) -> None:
    kernels.launch("load_without_fence", out=words(1), a=aligned_bytes(16), flag=2)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "bulk_load from or to an address that is not a multiple of 16"),
        (1, "bulk_load from or to an address that is not a multiple of 16"),
        (2, "bulk_load of 24 bytes"),
        (3, "bulk_store from or to an address that is not a multiple of 16"),
        (4, "bulk_store does not lie within the block's shared memory"),
    ],
)
def test_rules_of_bulk_copies(kernels: Kernels, n: int, text: str) -> None:
    assert text in kernels.error("misaligned_bulk", block=1, a=aligned_bytes(64), b=aligned_bytes(64), n=n)


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "uses an mbarrier before mbarrier_init"),
        (1, "in use"),
        (2, "more arrivals in a phase"),
        (3, "1 to 1024 arrivals"),
        (4, "ended while bulk loads were under way"),
    ],
)
def test_misuse_of_mbarriers(kernels: Kernels, n: int, text: str) -> None:
    assert text in kernels.error("mbarrier_misuse", block=1, a=aligned_bytes(64), n=n)


@pytest.mark.parametrize(("n", "text"), [(0, "was not committed"), (1, "was not waited for")])
def test_exit_with_a_store_under_way(kernels: Kernels, n: int, text: str) -> None:
    assert text in kernels.error("unfinished_store", block=1, a=aligned_bytes(64), n=n)
