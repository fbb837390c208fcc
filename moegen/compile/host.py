# SPDX-License-Identifier: Apache-2.0
"""Kernel text -> shared library for the CPU, by the system's C++20 compiler.

A kernel's library holds the unmodified text and one entry, `moegen_launch`; what it calls is found in the runtime's
library, which is built once and loaded first (templates/host/).
"""

from __future__ import annotations

import functools
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from moegen import env, leftovers
from moegen.codegen.files import host_files, host_headers
from moegen.codegen.render import Source
from moegen.compile import elf, failure
from moegen.compile.recipe import Compiled, Recipe, reachable
from moegen.compile.target import Target
from moegen.errors import CompileError, UnsupportedPlatformError

log = logging.getLogger(__name__)

RUNTIME = "host_runtime"
"""Stem of the runtime's library."""

LONGEST_SECONDS = 120.0
"""A run of the compiler that takes longer is ended: a kernel takes it about one second, a sanitized one ten."""

_WRAPPER = """#include "{stem}.cu"
#include <moegen/entry.hpp>
MOEGEN_HOST_ENTRY(moegen_{stem}, Params);
"""


def headers(source: Source) -> tuple[tuple[str, bytes], ...]:
    """(name, content) of the headers that a kernel and its wrapper open; for the runtime, its sources too."""
    if source.stem != RUNTIME:
        return reachable(source.text + _WRAPPER.format(stem=source.stem), host_headers())
    sources = host_files("*.cpp")
    text = "".join(content.decode() for content in sources.values())
    return (*reachable(text, host_headers()), *sorted(sources.items()))


def recipe(source: Source, target: Target) -> Recipe:
    """What a kernel, or the runtime, is compiled from for the host.

    Raises:
        UnsupportedPlatformError: there is no C++ compiler; the text says what to install.
    """
    return Recipe(source.stem, target, source.text, headers(source), flags(), identity())


def runtime_source() -> Source:
    """The runtime, as something that the ladder can look up; its text is the list of its files."""
    return Source(RUNTIME, "".join(f"{name}\n" for name in sorted(host_files("*.cpp"))))


@functools.cache
def flags() -> tuple[str, ...]:
    """The compiler's flags, as templates/host/flags.txt lists them."""
    lines = host_files("flags.txt")["flags.txt"].decode().splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))


def compiler() -> tuple[str, ...]:
    """The C++ compiler's command: MOEGEN_CXX, else the first of c++, g++ and clang++ that there is.

    Raises:
        UnsupportedPlatformError: there is none, or this system is not Linux.
    """
    return _compiler(env.cxx())


def identity() -> str:
    """Exact identity of the C++ compiler: its version text and the machine that it compiles for."""
    return _identity(compiler())


def compile(recipe: Recipe) -> Compiled:
    """The shared library of a kernel or of the runtime.

    Raises:
        CompileError: the compiler refused it, did not end within LONGEST_SECONDS, or its output is not sound;
            `folder` reproduces it.
    """
    started = time.perf_counter()
    with leftovers.folder("cxx") as folder:
        for path, content in _files(recipe).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        ok, text = _build(recipe, folder)
        content = _output(folder) if ok else b""
    if ok:  # or so the compiler says
        symbol = "moegen" if recipe.stem == RUNTIME else "moegen_launch"
        defect = elf.defect(content, symbol, machine=elf.machine_of(Path("/proc/self/exe")), shared=True)
        ok, text = not defect, f"{text}\n{defect}"
    if not ok:
        raise _failed(recipe, text)
    seconds = time.perf_counter() - started
    log.info("event=compiled stem=%s target=host seconds=%.3f bytes=%d", recipe.stem, seconds, len(content))
    return Compiled(content, seconds)


def _output(folder: Path) -> bytes:
    try:
        return (folder / "kernel.so").read_bytes()
    except OSError:
        return b""


def _files(recipe: Recipe) -> dict[str, bytes]:
    """The folder that is compiled in, by relative path: no path of this machine reaches the compiler."""
    files = {f"include/{name}" if "/" in name else name: content for name, content in recipe.headers}
    if recipe.stem != RUNTIME:
        files["wrapper.cpp"] = _WRAPPER.format(stem=recipe.stem).encode()
        files[f"{recipe.stem}.cu"] = recipe.text.encode()
    return files


def _units(recipe: Recipe) -> list[str]:
    return recipe.text.split() if recipe.stem == RUNTIME else ["wrapper.cpp"]


def _build(recipe: Recipe, folder: Path) -> tuple[bool, str]:
    units = _units(recipe)
    common = [*compiler(), *recipe.options, "-Iinclude", "-I."]
    if len(units) == 1:
        return _run([*common, "-shared", units[0], "-o", "kernel.so"], folder)
    objects = [f"{unit}.o" for unit in units]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [[*common, "-c", unit, "-o", made] for unit, made in zip(units, objects, strict=True)]
        results = list(pool.map(lambda command: _run(command, folder), commands))
    if all(ok for ok, _ in results):
        results.append(_run([*common, "-shared", *objects, "-o", "kernel.so"], folder))
    return all(ok for ok, _ in results), "".join(text for _, text in results)


def _run(command: list[str], folder: Path) -> tuple[bool, str]:
    # English messages, whatever the user's language: they end up in bug reports.
    environment = {**os.environ, "LC_ALL": "C"}
    output = subprocess.PIPE
    # A group of its own, because what a compiler starts does the work, and has to end with it.
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    except OSError as error:
        return False, f"{command[0]} does not start: {error}"
    with process:
        try:
            parts = process.communicate(timeout=LONGEST_SECONDS)
        except subprocess.TimeoutExpired:
            _end(process)
            said = b"".join(process.communicate()).decode(errors="replace")
            return False, f"{said}{shlex.join(command)} did not end within {LONGEST_SECONDS:g} s, and was ended"
        except BaseException:
            _end(process)
            raise
    return process.returncode == 0, b"".join(parts).decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _failed(recipe: Recipe, text: str) -> CompileError:
    command = shlex.join([*recipe.options, "-Iinclude", "-I.", "-shared", *_units(recipe), "-o", "/dev/null"])
    script = f'#!/bin/sh\ncd "$(dirname "$0")" || exit 2\nexec ${{MOEGEN_CXX:-{shlex.join(compiler())}}} {command}\n'
    folder = failure.keep(recipe, {**_files(recipe), "log.txt": text.encode()}, script)
    return CompileError(recipe.stem, recipe.target.name, recipe.options, text, folder)


@functools.cache
def _compiler(asked: str) -> tuple[str, ...]:
    if sys.platform != "linux":
        raise UnsupportedPlatformError(f"kernels are compiled on Linux only; this is {sys.platform}")
    for command in [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(command[0])
        if found is not None:
            return (found, *command[1:])
    if asked:
        raise UnsupportedPlatformError(f"MOEGEN_CXX={asked!r} is no program here; name a C++20 compiler")
    raise UnsupportedPlatformError("no C++ compiler for the host target: install g++ >= 11, or name one in MOEGEN_CXX")


@functools.cache
def _identity(command: tuple[str, ...]) -> str:
    texts = []
    for question in ("--version", "-dumpmachine"):
        try:
            done = subprocess.run([*command, question], capture_output=True, text=True, check=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as error:
            raise UnsupportedPlatformError(f"{shlex.join(command)} {question} fails: {error}") from error
        # clang says where it is installed, which does not change what it makes.
        texts += [line for line in done.stdout.splitlines() if not line.startswith("InstalledDir")]
    return "\n".join(texts)
