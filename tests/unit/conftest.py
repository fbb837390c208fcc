# SPDX-License-Identifier: Apache-2.0
"""What the unit tests share: an empty cache for each test, and two tiny kernels. Nothing here needs a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moegen import env
from moegen.codegen.render import Source
from moegen.compile import cache, nvrtc
from moegen.compile.target import Target
from moegen.errors import UnsupportedPlatformError

ROOT = Path(__file__).resolve().parents[2]

KERNEL = """#include <moegen/ptx.cuh>
struct Params {{
    uint32_t* out;
}};
extern "C" __global__ void moegen_{stem}(const __grid_constant__ Params p) {{ p.out[threadIdx.x] = {value}u; }}
"""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nvrtc: needs NVRTC (no GPU, no driver)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("nvrtc") for item in items):
        return
    try:
        nvrtc.version()
    except UnsupportedPlatformError as error:
        for item in items:
            if item.get_closest_marker("nvrtc"):
                item.add_marker(pytest.mark.skip(reason=str(error)))


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; no other variable of moegen is set, and no earlier test's warnings are remembered."""
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "cache"
    monkeypatch.setenv("MOEGEN_CACHE_DIR", str(root))
    for cached in (cache._unusable, cache._warn_once, cache._temporary_stores):
        cached.cache_clear()
    return root


@pytest.fixture
def kernel() -> Callable[..., Source]:
    """Makes the source of a tiny kernel: kernel(stem, value)."""

    def make(stem: str = "tiny_one", value: int = 1) -> Source:
        return Source(stem, KERNEL.format(stem=stem, value=value))

    return make


@pytest.fixture
def broken() -> Source:
    """A kernel that NVRTC accepts and ptxas refuses."""
    return Source("tiny_broken", 'extern "C" __global__ void k() { asm volatile("no.such.instruction;"); }\n')


@pytest.fixture
def sm90() -> Target:
    return Target("sm90")


@pytest.fixture
def python(cache_root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python code in a new process that finds this package: python(code, cwd=..., **environment)."""

    def run(code: str, cwd: Path | None = None, **extra: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **extra}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=cwd or cache_root.parent, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture
def moegen_command(cache_root: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a new process: moegen_command("build", ..., **environment)."""

    def run(*words: str, **extra: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **extra}
        command = [sys.executable, "-m", "moegen", *words]
        return subprocess.run(command, cwd=cache_root.parent, env=environment, capture_output=True, text=True)

    return run
