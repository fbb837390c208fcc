# SPDX-License-Identifier: Apache-2.0
"""Builds the CPU runtime and the kernels of these tests, with the compiler called directly, and launches them."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
TEMPLATES = HERE.parents[2] / "templates"
KERNELS = ("threads", "warp", "memory", "bulk", "sanitized")


class LaunchError(Exception):
    """What the runtime said of a launch that failed."""


class Request(ctypes.Structure):
    """struct moegen_host_launch"""

    _fields_ = [
        ("params", ctypes.c_void_p),
        ("grid", ctypes.c_uint32),
        ("block", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("wait_ms", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("running", ctypes.c_void_p),
    ]


class Params(ctypes.Structure):
    """struct Params of kernels/params.cuh"""

    _fields_ = [
        ("out", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("n", ctypes.c_uint32),
        ("flag", ctypes.c_uint32),
    ]


class Toolchain:
    """Compiles and links as the project does, for one folder."""

    def __init__(self, folder: Path, options: Iterable[str] = ()) -> None:
        self.folder = folder
        lines = (TEMPLATES / "host" / "flags.txt").read_text().splitlines()
        self.flags = [line for line in lines if line and not line.startswith("#")] + list(options)
        includes = folder / "include" / "moegen"
        includes.mkdir(parents=True, exist_ok=True)
        for pattern in ("device/*.cuh", "host/*.cuh", "host/*.hpp"):
            for header in sorted(TEMPLATES.glob(pattern)):
                (includes / header.name).write_bytes(header.read_bytes())

    def run(self, *arguments: str | Path) -> None:
        command = ["g++", *self.flags, f"-I{self.folder / 'include'}", f"-I{HERE / 'kernels'}", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")

    def compile(self, source: Path, *options: str) -> Path:
        target = self.folder / f"{source.stem}.o"
        self.run(*options, "-c", source, "-o", target)
        return target

    def wrapper(self, name: str, sources: Iterable[str]) -> Path:
        """A source with the kernels of several files and an entry `<kernel>_launch` for each."""
        lines = [f'#include "{source}.cu"' for source in sources] + ["#include <moegen/entry.hpp>"]
        for source in sources:
            text = (HERE / "kernels" / f"{source}.cu").read_text()
            for kernel in re.findall(r'extern "C" __global__ void (\w+)', text):
                lines.append(f"MOEGEN_HOST_ENTRY_AS({kernel}_launch, {kernel}, Params);")
        path = self.folder / f"{name}.cpp"
        path.write_text("\n".join(lines) + "\n")
        return path


def runtime_sources() -> list[Path]:
    return sorted((TEMPLATES / "host").glob("*.cpp"))


class Kernels:
    """The kernels of one library, by name."""

    def __init__(self, runtime: Path, library: Path) -> None:
        self._runtime = ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))

    def launch(
        self,
        kernel: str,
        grid: int = 1,
        block: int = 32,
        *,
        out: np.ndarray | None = None,
        a: np.ndarray | None = None,
        b: np.ndarray | None = None,
        n: int = 0,
        flag: int = 0,
        shared: int = 2048,
        seed: int = 0,
    ) -> None:
        pointers = [None if array is None else array.ctypes.data for array in (out, a, b)]
        params = Params(*pointers, n, flag)
        request = Request(ctypes.addressof(params), grid, block, shared, 0, seed, None)
        entry = self._library[f"{kernel}_launch"]
        entry.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]
        error = ctypes.create_string_buffer(4000)
        if entry(ctypes.addressof(request), error, len(error)):
            raise LaunchError(error.value.decode())

    def error(self, kernel: str, grid: int = 1, block: int = 32, **arguments: object) -> str:
        """The text of a launch that has to fail."""
        with pytest.raises(LaunchError) as raised:
            self.launch(kernel, grid, block, **arguments)  # type: ignore[arg-type]
        return str(raised.value)

    def params_bytes(self, kernel: str) -> int:
        function = self._library[f"{kernel}_launch_params_bytes"]
        function.restype = ctypes.c_size_t
        return int(function())


def at_once(*calls: Callable[[], None]) -> None:
    """Runs the calls in threads of their own; raises the first error."""
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def words(count: int) -> np.ndarray:
    return np.zeros(count, np.uint32)


def aligned_bytes(count: int) -> np.ndarray:
    """Zeroed bytes that begin at a multiple of 128."""
    memory = np.zeros(count + 128, np.uint8)
    offset = -memory.ctypes.data % 128
    return memory[offset : offset + count]
