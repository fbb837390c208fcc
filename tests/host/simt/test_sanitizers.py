# SPDX-License-Identifier: Apache-2.0
"""One executable of runtime, kernels and driver under ThreadSanitizer and AddressSanitizer: right kernels are clean,
wrong ones are found.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from simt_harness import HERE, KERNELS, Toolchain, runtime_sources


def build(folder: Path, option: str, runtime_options: list[str]) -> Path:
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    tools = Toolchain(folder, ["-g1"])
    try:
        tools.run(option, probe, "-o", folder / "probe")
        subprocess.run([folder / "probe"], check=True)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the compiler cannot build with {option}: {error}")
    jobs = [(source, runtime_options) for source in runtime_sources()]
    jobs += [(tools.wrapper("kernels", KERNELS), [option]), (HERE / "kernels" / "driver.cpp", [option])]
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(lambda job: tools.compile(job[0], *job[1]), jobs))
    tools.run(option, *parts, "-o", folder / "driver")
    return folder / "driver"


@pytest.fixture(scope="session")
def thread_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runtime itself is not instrumented: what CUDA does not order, its lists must not order either."""
    return build(tmp_path_factory.mktemp("tsan"), "-fsanitize=thread", ["-DMOEGEN_HOST_TSAN=1"])


@pytest.fixture(scope="session")
def address_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("asan"), "-fsanitize=address", ["-fsanitize=address"])


def run(driver: Path, name: str) -> tuple[int, str]:
    # The sanitizers of some compilers do not start under full address space randomisation.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*fixed, str(driver), name], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.tsan
@pytest.mark.parametrize("name", ["messages", "neighbours", "lanes", "bulk", "ranks", "whole", "deadlock"])
def test_right_kernels_have_no_race(thread_sanitizer: Path, name: str) -> None:
    code, output = run(thread_sanitizer, name)
    assert code == 0, output


@pytest.mark.tsan
@pytest.mark.parametrize("name", ["messages_wrong", "neighbours_wrong", "lanes_wrong"])
def test_missing_order_is_a_race(thread_sanitizer: Path, name: str) -> None:
    code, output = run(thread_sanitizer, name)
    assert code != 0
    assert "WARNING: ThreadSanitizer: data race" in output


@pytest.mark.asan
@pytest.mark.parametrize("name", ["messages", "neighbours", "bulk", "ranks", "whole", "deadlock"])
def test_right_kernels_stay_within_memory(address_sanitizer: Path, name: str) -> None:
    code, output = run(address_sanitizer, name)
    assert code == 0, output


@pytest.mark.asan
def test_access_beyond_memory_is_found(address_sanitizer: Path) -> None:
    code, output = run(address_sanitizer, "beyond_wrong")
    assert code != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output
