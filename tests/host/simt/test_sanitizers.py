# SPDX-License-Identifier: Apache-2.0
"""One executable of runtime, kernels and driver under ThreadSanitizer and AddressSanitizer: right kernels are clean,
wrong ones are found.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from host.sanitize.running import ASAN, TSAN, Sanitizer, runtime_once, started
from simt_harness import HERE, KERNELS, Toolchain


def build(factory: pytest.TempPathFactory, sanitizer: Sanitizer) -> Path:
    runtime = runtime_once(factory, sanitizer)
    tools = Toolchain(factory.mktemp("sanitized"), ["-g1"])
    kernels = tools.wrapper("kernels", KERNELS)
    tools.run(sanitizer.option, kernels, HERE / "kernels" / "driver.cpp", *runtime, "-o", tools.folder / "driver")
    return tools.folder / "driver"


@pytest.fixture(scope="session")
def thread_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, TSAN)


@pytest.fixture(scope="session")
def address_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory, ASAN)


def run(driver: Path, name: str) -> tuple[int, str]:
    done = subprocess.run([*started(driver), name], capture_output=True, text=True, timeout=120)
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
