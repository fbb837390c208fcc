# SPDX-License-Identifier: Apache-2.0
"""The low-latency kernels under ThreadSanitizer and AddressSanitizer: clean as they are, and every order that they rest
on is missed where it is taken away.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from host.sanitize.build import KERNEL, LAUNCH, SIGNAL, Edit, relaxed_store
from host.sanitize.ll_kernels import Variant, headers, kernels_of, variant, weakened
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
MASKED = RIGHT[-1]


def entering(order: str) -> Edit:
    pattern = r"atomic_add_acq_rel_gpu\((&control->blocks_entered), 1\)"
    return Edit(LAUNCH, pattern, rf"__atomic_fetch_add(\1, 1, {order})")


TAG = r"tag_at\("

ORDERS = {
    "tag_store": relaxed_store(TAG),
    "tag_load": Edit(KERNEL, r"load_acquire_sys\(tag\)", "host::load_word(tag, __ATOMIC_RELAXED, {})"),
    "tag_barrier": Edit(KERNEL, rf"team_sync\(\);(?=(?:(?!team_sync).){{,320}}store_release_sys\({TAG})", ""),
    "consumed_store": relaxed_store(r"consumed_at\("),
    "consumed_load": Edit(KERNEL, r"load_acquire_sys\(word\)", "load_relaxed_sys(word)"),
    "entering": entering("__ATOMIC_RELAXED"),
}
"""What wire format `row` rests on, by name, and how to take it away. `inline` has no such order: its payload crosses in
relaxed 16-byte atomics, which are no data race.
"""

WEAKENED = [
    *(weakened(ROW, op, name, edit) for op in ("dispatch", "combine") for name, edit in ORDERS.items()),
    weakened(ROW, "dispatch", "entering_release", entering("__ATOMIC_ACQUIRE")),
    weakened(ROW, "dispatch", "entering_acquire", entering("__ATOMIC_RELEASE")),
]
REPORT_STORE = Edit(SIGNAL, r"store_release_sys(?=\(&failure->valid)", "store_relaxed_sys")
REPORT = weakened(ROW, "dispatch", "report", REPORT_STORE)
BEYOND = weakened(ROW, "dispatch", "beyond", Edit(KERNEL, r"(p\.topk_weights\[[^]]*\+ team_thread\(\))\]", r"\1 + 1]"))


@pytest.fixture(scope="session")
def tsan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    variants = [*RIGHT, *WEAKENED, REPORT]
    return built_once(tmp_path_factory, "ll", "ll_driver.cpp", TSAN, headers(variants), kernels_of(variants))


@pytest.fixture(scope="session")
def asan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    variants = [*RIGHT, BEYOND]
    return built_once(tmp_path_factory, "ll", "ll_driver.cpp", ASAN, headers(variants), kernels_of(variants))


def name_of(variant: Variant) -> str:
    return variant.name


@pytest.mark.tsan
@pytest.mark.parametrize("variant", RIGHT, ids=name_of)
def test_kernels_have_no_race(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant.name, SEEDED)
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("variant", [RIGHT[0], ROW], ids=name_of)
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
    assert race_in(tsan, REPORT.name, "absent")


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
