# SPDX-License-Identifier: Apache-2.0
"""Kernel text -> cubin through NVRTC, with headers in memory. Needs no GPU, no driver and no toolkit."""

from __future__ import annotations

import functools
import logging
import sys
import time
from pathlib import Path
from typing import Any

from moegen import env
from moegen.codegen.files import device_headers
from moegen.codegen.render import Source
from moegen.compile import elf, failure, resources
from moegen.compile.recipe import Compiled, Recipe, reachable
from moegen.compile.target import Target
from moegen.errors import CompileError, UnsupportedPlatformError

log = logging.getLogger(__name__)

# 12.8 and 13.0 refuse the option (ran), 13.5 knows it. With those `_run` turns a warning in the log into a failure.
_KNOWS_WERROR = (13, 5)


def recipe(source: Source, target: Target) -> Recipe:
    """What `source` is compiled from for a GPU target.

    Raises:
        UnsupportedPlatformError: there is no NVRTC; the text says what to install.
    """
    return Recipe(source.stem, target, source.text, headers(source), options(target), identity())


def headers(source: Source) -> tuple[tuple[str, bytes], ...]:
    """(name, content) of the headers that a kernel opens."""
    return reachable(source.text, device_headers())


def options(target: Target) -> tuple[str, ...]:
    """NVRTC's options. None holds a path."""
    chosen = [f"--gpu-architecture={target.arch}", "--std=c++20", "--ptxas-options=-v", "--no-source-include"]
    if version() >= _KNOWS_WERROR:
        chosen.append("-Werror=all-warnings")
    if env.lineinfo():
        chosen.append("--generate-line-info")
    return tuple(chosen)


@functools.cache
def identity() -> str:
    """Exact identity of the NVRTC in use: its version and the build-id of the loaded library."""
    major, minor = version()
    return f"nvrtc {major}.{minor} {elf.identity(library())}"


@functools.cache
def version() -> tuple[int, int]:
    """(major, minor) of the NVRTC in use."""
    api = _api()
    major, minor = _check(api, api.nvrtcVersion())
    return int(major), int(minor)


@functools.cache
def library() -> Path:
    """The file of the loaded libnvrtc.

    A process that had loaded one before (torch brings its own) keeps that one; it is the one that compiles.
    """
    version()
    loaded = _mapped("libnvrtc.so")
    if loaded is not None:
        return loaded
    from cuda import pathfinder

    path = pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path
    if path is None:
        raise UnsupportedPlatformError("NVRTC is loaded, but its file cannot be found; reinstall nvidia-cuda-nvrtc")
    return Path(path)


def check_driver(driver_version: int) -> None:
    """Refuses an NVRTC that is newer than the driver.

    Args:
        driver_version: as cuDriverGetVersion says it, e.g. 12080 for CUDA 12.8.

    Raises:
        UnsupportedPlatformError: NVRTC's major version exceeds the driver's; the text names the extra to install.
    """
    driver_major = driver_version // 1000
    major, minor = version()
    if major > driver_major:
        raise UnsupportedPlatformError(
            f"NVRTC {major}.{minor} makes code that this driver (CUDA {driver_major}.{driver_version % 1000 // 10}) "
            f"cannot load. Install the matching one: pip install 'moegen[cu{driver_major}]', or update the driver."
        )


def compile(recipe: Recipe) -> Compiled:
    """The cubin of a recipe.

    Raises:
        CompileError: NVRTC or ptxas refused it; `folder` reproduces it.
    """
    started = time.perf_counter()
    ok, text, content = _run(recipe, recipe.options, "CUBIN")
    seconds = time.perf_counter() - started
    if ok and (defect := elf.defect(content, "", machine=elf.EM_CUDA, shared=False)):
        ok, text = False, f"{text}\n{defect}"
    if not ok:
        raise _failed(recipe, text)
    log.info("event=compiled stem=%s target=%s seconds=%.3f", recipe.stem, recipe.target, seconds)
    return Compiled(content, seconds, resources.parse(text))


def ptx(recipe: Recipe) -> str:
    """The PTX of a recipe.

    Raises:
        CompileError: NVRTC refused it.
    """
    ok, text, content = _run(recipe, _ptx_options(recipe), "PTX")
    if not ok:
        raise _failed(recipe, text)
    return content.rstrip(b"\0").decode()


def attempt(recipe: Recipe) -> tuple[bool, str]:
    """Whether the recipe compiles, and the compiler's log; keeps nothing."""
    ok, text, _ = _run(recipe, recipe.options, "CUBIN")
    return ok, text


def _failed(recipe: Recipe, text: str) -> CompileError:
    """Keeps what reproduces the failure. ptxas names lines of its PTX only, so the PTX is kept too."""
    files = {"log.txt": text.encode()}
    if "ptxas" in text:
        made, _, content = _run(recipe, _ptx_options(recipe), "PTX")
        if made:
            files["kernel.ptx"] = content.rstrip(b"\0")
    folder = failure.keep(recipe, files)
    return CompileError(recipe.stem, recipe.target.name, recipe.options, text, folder)


def _ptx_options(recipe: Recipe) -> tuple[str, ...]:
    """The same options for the virtual architecture, where ptxas does not run."""
    virtual = f"--gpu-architecture={recipe.target.arch.replace('sm_', 'compute_')}"
    return (virtual, *(option for option in recipe.options[1:] if not option.startswith("--ptxas-options")))


def _run(recipe: Recipe, options: tuple[str, ...], kind: str) -> tuple[bool, str, bytes]:
    """(whether it compiled, log, content of `kind`); raises only on misuse of NVRTC itself."""
    api = _api()
    names = [name.encode() for name, _ in recipe.headers]
    contents = [content for _, content in recipe.headers]
    # Absolute and the same everywhere: with line info the name is part of the cubin.
    name = f"/moegen/{recipe.stem}.cu".encode()
    program = _check(api, api.nvrtcCreateProgram(recipe.text.encode(), name, len(names), contents, names))
    try:
        encoded = [option.encode() for option in options]
        (status,) = api.nvrtcCompileProgram(program, len(encoded), encoded)
        text = _get(api, program, "ProgramLog").rstrip(b"\0 \n").decode(errors="replace")
        if status == api.nvrtcResult.NVRTC_SUCCESS:
            return not resources.has_warning(text), text, _get(api, program, kind)
        return False, text or f"NVRTC says {status.name} and nothing else", b""
    finally:
        api.nvrtcDestroyProgram(program)


def _get(api: Any, program: Any, what: str) -> bytes:
    content = bytes(_check(api, getattr(api, f"nvrtcGet{what}Size")(program)))
    _check(api, getattr(api, f"nvrtcGet{what}")(program, content))
    return content


def _check(api: Any, answer: tuple[Any, ...]) -> Any:
    status, *values = answer
    if status != api.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def _api() -> Any:
    """cuda.bindings.nvrtc, imported and found to have its library."""
    if sys.platform != "linux":
        raise UnsupportedPlatformError(f"GPU kernels are compiled on Linux only; this is {sys.platform}")
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise UnsupportedPlatformError(
            "no NVRTC, the compiler of GPU kernels: pip install 'moegen[cu13]' (or 'moegen[cu12]' for a driver of "
            f"CUDA 12). Cause: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        ) from error
    return nvrtc


def _mapped(library: str) -> Path | None:
    """The file of a library that this process has mapped."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.partition("/")[2]
        if path and Path(path).name.startswith(library):
            return Path(f"/{path}")
    return None
