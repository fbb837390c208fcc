# SPDX-License-Identifier: Apache-2.0
"""The low-latency kernels under ThreadSanitizer and AddressSanitizer: clean as they are, and every order that they rest
on is missed where it is taken away.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from host.sanitize.build import KERNEL, LAUNCH, SIGNAL, Edit, Variant, build, variant, weakened
from simt_harness import Toolchain

from moegen.kernels.spec import WarpGroups

DRIVER = Path(__file__).with_name("driver.cpp")
ROUNDS = 10  # 10 dispatches and 10 combines
FIXED, SEEDED = 0, 3  # the runtime's order of threads: always the same, or seeded and with pauses

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


RELAXED = "[](auto* to, auto word) { host::store_word(to, word, __ATOMIC_RELAXED, {}); }"


def relaxed_store(target: str) -> Edit:
    return Edit(KERNEL, rf"store_release_sys\((?={target})", f"{RELAXED}(")


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


def skip_without(option: str, folder: Path) -> None:
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    try:
        Toolchain(folder).run(option, probe, "-o", folder / "probe")
    except (RuntimeError, OSError) as error:
        pytest.skip(f"g++ cannot link with {option}: {error}")


def built_once(factory: pytest.TempPathFactory, option: str, runtime_option: str, variants: Sequence[Variant]) -> Path:
    """The executable; the workers of one test run share it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / option.lstrip("-").replace("=", "-")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / "driver"
        if not done.exists():
            skip_without(option, folder)
            build(folder, DRIVER, variants, option, [runtime_option])
        return done


@pytest.fixture(scope="session")
def tsan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime itself is not instrumented: what CUDA does not order, its lists must not order either."""
    return built_once(tmp_path_factory, "-fsanitize=thread", "-DMOEGEN_HOST_TSAN=1", [*RIGHT, *WEAKENED, REPORT])


@pytest.fixture(scope="session")
def asan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_once(tmp_path_factory, "-fsanitize=address", "-fsanitize=address", [*RIGHT, BEYOND])


def run(driver: Path, variant: Variant, seed: int, *more: str) -> tuple[int, str]:
    # The sanitizers of some compilers do not start under full address space randomisation.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    command = [*fixed, str(driver), variant.name, str(seed), str(ROUNDS), *more]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def name_of(variant: Variant) -> str:
    return variant.name


@pytest.mark.tsan
@pytest.mark.parametrize("variant", RIGHT, ids=name_of)
def test_kernels_have_no_race(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant, SEEDED)
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("variant", [RIGHT[0], ROW], ids=name_of)
def test_kernels_have_no_race_in_fixed_order(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant, FIXED)
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("variant", [RIGHT[0], ROW, MASKED], ids=name_of)
def test_missing_peer_is_no_race(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant, FIXED, "absent")
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("variant", WEAKENED, ids=name_of)
def test_missing_order_is_a_race(tsan: Path, variant: Variant) -> None:
    code, output = run(tsan, variant, FIXED)
    assert code != 0
    assert "WARNING: ThreadSanitizer: data race" in output


@pytest.mark.tsan
def test_unordered_report_is_a_race(tsan: Path) -> None:
    code, output = run(tsan, REPORT, FIXED, "absent")
    assert code != 0
    assert "WARNING: ThreadSanitizer: data race" in output


@pytest.mark.asan
@pytest.mark.parametrize("seed", [FIXED, SEEDED])
@pytest.mark.parametrize("variant", RIGHT, ids=name_of)
def test_kernels_stay_within_memory(asan: Path, variant: Variant, seed: int) -> None:
    code, output = run(asan, variant, seed)
    assert code == 0, output


@pytest.mark.asan
def test_access_beyond_memory_is_found(asan: Path) -> None:
    code, output = run(asan, BEYOND, FIXED)
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output
