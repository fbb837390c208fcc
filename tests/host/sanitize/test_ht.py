# SPDX-License-Identifier: Apache-2.0
"""The high-throughput kernels under ThreadSanitizer and AddressSanitizer: clean as they are, and every order that they
rest on is missed where it is taken away.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from host.sanitize.build import KERNEL, Edit, kernels_of, weakened, without
from host.sanitize.edits import barrier_before, relaxed_load, relaxed_store
from host.sanitize.ht_kernels import Variant, headers, variant
from host.sanitize.running import ASAN, FIXED, SEEDED, TSAN, Sanitizer, built_once, race_in, run

RIGHT = [variant("bf16", "token", True), variant("bf16", "packed", True), variant("fp8pow2", "packed", False)]
"""Together: both layouts, every phase, rows that are read where they lie and rows that are staged for this rank itself,
blocks that have one role and blocks that have both; at most 576 fibers."""

TOKEN, PACKED, QUANTISED = RIGHT

TAG = r"tag_at\("


def finishing(order: str) -> Edit:
    pattern = r"atomic_add_acq_rel_gpu\((&p\.control->blocks_entered), 1\)"
    return Edit(KERNEL, pattern, rf"__atomic_fetch_add(\1, 1, {order})")


CONSUMED = {
    "consumed_store": relaxed_store(r"consumed_at\("),
    "consumed_load": relaxed_load("word"),
}
"""How ranks know that what they overwrite has been read."""

FINISHING = {
    "finishing_release": finishing("__ATOMIC_ACQUIRE"),
    "finishing_acquire": finishing("__ATOMIC_RELEASE"),
}
"""How the last block of a rank knows that all of them have."""

BARRIERS = {
    "opening_barrier": Edit(KERNEL, r"__syncthreads_and\(ready\) != 0", "ready"),
    "finishing_barrier": Edit(KERNEL, r"(__shared__ bool last;\s*)__syncthreads\(\);", r"\1"),
}
"""How the threads of a block share either."""

ROWS = {
    "tag_store": relaxed_store(TAG),
    "tag_barrier": barrier_before(rf"store_release_sys\({TAG}"),
}
"""How a warp announces a row."""

ARRIVALS = {
    "tag_load": relaxed_load("tag"),
    "tag_vote": Edit(KERNEL, r"__syncwarp\(\);(?=  // lane 0)", ""),
}
"""How a warp learns of one."""

PARTIALS = {
    "tag_load": relaxed_load("tag", after=r"Awaited what\{kPartial.{,200}?"),
    "tag_vote": Edit(KERNEL, r"__syncwarp\(\);(?=  // the lanes)", ""),
}
"""The same in combine, where a lane waits for each rank."""

CHUNKS = {
    "chunk_store": relaxed_store(r"p\.chunk_epochs"),
    "chunk_load": relaxed_load("epoch"),
    "chunk_barrier": barrier_before(r"store_release_sys\(p\.chunk_epochs", "__syncthreads"),
    "chunk_vote": Edit(KERNEL, r"__syncthreads_and\(came\) == 0", "!came"),
}
"""How blocks tell each other what the chunks of a plan count."""


WEAKENED = [
    *without(TOKEN, "whole", CONSUMED, FINISHING, ROWS, ARRIVALS, CHUNKS),
    *without(PACKED, "combine", ROWS, PARTIALS),
]
MORE = [
    *without(TOKEN, "whole", BARRIERS),
    *without(PACKED, "rows", CONSUMED, FINISHING, BARRIERS, ROWS, ARRIVALS),
    *without(TOKEN, "plan", FINISHING, CHUNKS),
    *without(PACKED, "combine", CONSUMED, FINISHING, BARRIERS),
]
"""The same orders in the other kernels, which have the same text.

Missing are CONSUMED and BARRIERS of `plan`: nothing but counts and entries crosses there, in relaxed 16-byte atomics,
which are no data race. What is overwritten too early shows in wrong results at most.
"""

BEYOND = weakened(TOKEN, "whole", "beyond", Edit(KERNEL, r"(p\.topk_weights\[[^]]*\+ k)\]", r"\1 + 1]"))


slow = pytest.mark.slow


@pytest.fixture(scope="session")
def tsan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "ht", TSAN, [*RIGHT, *WEAKENED])


@pytest.fixture(scope="session")
def tsan_more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "ht-more", TSAN, MORE)


@pytest.fixture(scope="session")
def asan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory, "ht", ASAN, [*RIGHT, BEYOND])


def built(factory: pytest.TempPathFactory, name: str, sanitizer: Sanitizer, variants: list[Variant]) -> Path:
    return built_once(factory, name, "ht_driver.cpp", sanitizer, headers(variants), kernels_of(variants))


def name_of(variant: Variant) -> str:
    return variant.name


@pytest.mark.tsan
@pytest.mark.parametrize("variant", [TOKEN, pytest.param(PACKED, marks=slow), QUANTISED], ids=name_of)
def test_kernels_have_no_race(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant.name, SEEDED)
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize(
    "variant", [pytest.param(TOKEN, marks=slow), pytest.param(PACKED, marks=slow), QUANTISED], ids=name_of
)
def test_kernels_have_no_race_in_fixed_order(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant.name, FIXED)
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("variant", [TOKEN, QUANTISED], ids=name_of)
def test_missing_peer_is_no_race(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant.name, FIXED, "absent")
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("variant", WEAKENED, ids=name_of)
def test_missing_order_is_a_race(tsan: Path, variant: Variant) -> None:
    assert race_in(tsan, variant.name)


@pytest.mark.slow
@pytest.mark.tsan
@pytest.mark.parametrize("variant", MORE, ids=name_of)
def test_missing_order_of_another_kernel_is_a_race(tsan_more: Path, variant: Variant) -> None:
    assert race_in(tsan_more, variant.name)


@pytest.mark.asan
@pytest.mark.parametrize("seed", [FIXED, SEEDED])
@pytest.mark.parametrize("variant", RIGHT, ids=name_of)
def test_kernels_stay_within_memory(asan: Path, variant: Variant, seed: int) -> None:
    code, output = run(asan, variant.name, seed)
    assert code == 0, output


@pytest.mark.asan
def test_access_beyond_memory_is_found(asan: Path) -> None:
    code, output = run(asan, BEYOND.name, FIXED)
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output
