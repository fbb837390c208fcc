# SPDX-License-Identifier: Apache-2.0
"""Builds a family's executable once per test run, and runs it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from host.sanitize.build import Kernel, build, build_runtime
from simt_harness import Toolchain

ROUNDS = int(os.environ.get("SANITIZER_ROUNDS", "5"))  # dispatches and combines; from the third on memory is used again
FIXED, SEEDED = 0, 3  # the runtime's order of threads: always the same, or seeded and with pauses
RACE = "WARNING: ThreadSanitizer: data race"


class Sanitizer(NamedTuple):
    """What kernels and driver are compiled with, and what the runtime is."""

    option: str
    runtime_option: str


TSAN = Sanitizer("-fsanitize=thread", "-DMOEGEN_HOST_TSAN=1")
"""The runtime itself is not instrumented: what CUDA does not order, its lists must not order either."""

ASAN = Sanitizer("-fsanitize=address", "-fsanitize=address")


def skip_without(option: str, folder: Path) -> None:
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    try:
        Toolchain(folder).run(option, probe, "-o", folder / "probe")
    except (RuntimeError, OSError) as error:
        pytest.skip(f"g++ cannot link with {option}: {error}")


@contextmanager
def alone_in(factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder that the workers of one test run share, one at a time."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def runtime_once(factory: pytest.TempPathFactory, sanitizer: Sanitizer) -> list[Path]:
    """The runtime's objects, the same for all families."""
    with alone_in(factory, "runtime" + sanitizer.option.replace("=", "-")) as folder:
        made = folder / "made"
        if not made.exists():
            skip_without(sanitizer.option, folder)
            objects = build_runtime(folder, [sanitizer.runtime_option])
            made.write_text("\n".join(map(str, objects)))
        return [Path(line) for line in made.read_text().splitlines()]


def built_once(
    factory: pytest.TempPathFactory,
    name: str,
    driver: str,
    sanitizer: Sanitizer,
    headers: Mapping[str, str],
    kernels: Sequence[Kernel],
) -> Path:
    """The executable of this name; the workers of one test run share it."""
    runtime = runtime_once(factory, sanitizer)
    with alone_in(factory, name + sanitizer.option.replace("=", "-")) as folder:
        done = folder / "driver"
        if not done.exists():
            build(folder, Path(__file__).with_name(driver), headers, kernels, runtime, sanitizer.option)
        return done


def race_in(driver: Path, variant: str, *more: str) -> str:
    """What is printed of a race, in the first order of threads in which one shows; on a busy machine that may be the
    second: what would be read in the wrong order must be read soon after it was written. Else "".
    """
    for seed in (FIXED, SEEDED, SEEDED + 2, SEEDED + 4):
        code, output = run(driver, variant, seed, *more)
        if code != 0 and RACE in output:
            return output
    return ""


def started(driver: Path) -> list[str]:
    """A command: the sanitizers of some compilers do not start under full address space randomisation."""
    return [*(["setarch", "-R"] if shutil.which("setarch") else []), str(driver)]


def run(driver: Path, variant: str, seed: int, *more: str) -> tuple[int, str]:
    command = [*started(driver), variant, str(seed), str(ROUNDS), *more]
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr
