# SPDX-License-Identifier: Apache-2.0
"""The low-latency kernels under ThreadSanitizer and AddressSanitizer: clean as they are, and every order that they rest
on is missed where it is taken away.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from host.sanitize.build import KERNEL, Edit, kernels_of, weakened, without
from host.sanitize.edits import REPORT, barrier_before, entering, relaxed_load, relaxed_store
from host.sanitize.ll_kernels import Variant, headers, variant
from host.sanitize.running import ASAN, FIXED, SEEDED, TSAN, built_once, race_in, run

from moegen.kernels.spec import WarpGroups

RIGHT = [
    variant("inline", "atdispatch", WarpGroups(2, 1)),
    variant("inline", "atcombine", WarpGroups(1, 2)),
    variant("row", "atdispatch", WarpGroups(2, 1)),
    variant("row", "atcombine", WarpGroups(2, 1)),
    variant("row", "atdispatch", WarpGroups(1, 2)),
    variant("row", "atcombine", WarpGroups(2, 2)),
    variant("row", "atcombine", WarpGroups(2, 2), "masked"),
]
"""Together: both wire formats, both times of weights, each of a team's three kinds of barrier, with and without ranks
that may be missing; at most 1,920 fibers."""

ROW = RIGHT[2]
QUICK = [RIGHT[0], ROW]
"""Of both wire formats; the others' orders are for `make tsan`."""

MASKED = RIGHT[-1]


ORDERS = {
    "tag_load": relaxed_load("tag"),
    "consumed_store": relaxed_store(r"consumed_at\("),
    "consumed_load": relaxed_load("word"),
    "entering": entering("__ATOMIC_RELAXED"),
}
"""What wire format `row` rests on, by name, and how to take it away. `inline` has no such order: its payload crosses in
relaxed 16-byte atomics, which are no data race.
"""
TAG = r"tag_at\("
OF_DISPATCH = {
    "tag_store": relaxed_store(TAG),
    "tag_barrier": barrier_before(rf"store_release_sys\({TAG}", "team_sync"),
}
OF_COMBINE = {
    "tag_store": relaxed_store("tag, "),
    "tag_barrier": barrier_before(r"\}\s*announce\(sent", "team_sync"),
}

WEAKENED = [
    *without(ROW, "dispatch", ORDERS | OF_DISPATCH),
    *without(ROW, "combine", ORDERS | OF_COMBINE),
    weakened(ROW, "dispatch", "entering_release", entering("__ATOMIC_ACQUIRE")),
    weakened(ROW, "dispatch", "entering_acquire", entering("__ATOMIC_RELEASE")),
]
UNORDERED_REPORT = weakened(ROW, "dispatch", "report", REPORT)
BEYOND = weakened(ROW, "dispatch", "beyond", Edit(KERNEL, r"(p\.topk_weights\[[^]]*\+ team_thread\(\))\]", r"\1 + 1]"))


@pytest.fixture(scope="session")
def tsan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    variants = [*RIGHT, *WEAKENED, UNORDERED_REPORT]
    return built_once(tmp_path_factory, "ll", "ll_driver.cpp", TSAN, headers(variants), kernels_of(variants))


@pytest.fixture(scope="session")
def asan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    variants = [*RIGHT, BEYOND]
    return built_once(tmp_path_factory, "ll", "ll_driver.cpp", ASAN, headers(variants), kernels_of(variants))


def name_of(variant: Variant) -> str:
    return variant.name


@pytest.mark.tsan
@pytest.mark.parametrize(
    "variant", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in RIGHT], ids=name_of
)
def test_kernels_have_no_race(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant.name, SEEDED)
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("variant", [pytest.param(RIGHT[0], marks=pytest.mark.slow), ROW], ids=name_of)
def test_kernels_have_no_race_in_fixed_order(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant.name, FIXED)
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("variant", [RIGHT[0], ROW, MASKED], ids=name_of)
def test_missing_peer_is_no_race(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant.name, FIXED, "absent")
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("variant", WEAKENED, ids=name_of)
def test_missing_order_is_a_race(tsan: Path, variant: Variant) -> None:
    assert race_in(tsan, variant.name)


@pytest.mark.tsan
def test_unordered_report_is_a_race(tsan: Path) -> None:
    assert race_in(tsan, UNORDERED_REPORT.name, "absent")


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
