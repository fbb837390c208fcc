# SPDX-License-Identifier: Apache-2.0
"""`moegen doctor`: what is on this machine, and what to install. Never fails: each line guards itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shlex
from collections.abc import Callable, Iterator

import typer

app = typer.Typer(add_completion=False)

Line = tuple[str, str]
"""A label and what was found. A line of advice has the label `->`."""

ADVICE = "->"


@app.command()
def doctor() -> None:
    """Report versions, compilers, GPUs, symmetric memory and the cache, and say what to install."""
    for probe in PROBES:
        for label, text in _guarded(probe):
            typer.echo(f"{label:18} {text}")


def versions() -> Iterator[Line]:
    yield "moegen", _version("moegen", "not installed (source tree)")
    yield "python", f"{platform.python_version()} on {platform.platform()} ({platform.machine()})"
    for package in ("torch", "cuda-bindings", "jinja2", "ninja"):
        yield package, _version(package, "not installed")


def nvrtc() -> Iterator[Line]:
    from moegen.compile import nvrtc as compiler
    from moegen.errors import UnsupportedPlatformError

    try:
        yield "NVRTC", f"{compiler.identity()} ({compiler.library()})"
    except UnsupportedPlatformError as error:
        yield "NVRTC", "none: GPU kernels come from packs only"
        yield ADVICE, str(error)


def driver() -> Iterator[Line]:
    from moegen.compile import nvrtc as compiler
    from moegen.errors import UnsupportedPlatformError

    number = _driver_version()
    if number is None:
        yield "driver", "none: GPU kernels can be compiled here, not run"
        return
    yield "driver", f"CUDA {number // 1000}.{number % 1000 // 10}"
    try:
        compiler.check_driver(number)
    except UnsupportedPlatformError as error:
        yield ADVICE, str(error)


def cxx() -> Iterator[Line]:
    from moegen.compile import host
    from moegen.errors import UnsupportedPlatformError

    try:
        yield "C++ compiler", f"{shlex.join(host.compiler())}: {host.identity().splitlines()[0]}"
    except UnsupportedPlatformError as error:
        yield "C++ compiler", "none: the host target cannot be compiled"
        yield ADVICE, str(error)


def gpus() -> Iterator[Line]:
    if importlib.util.find_spec("torch") is None:
        yield "GPUs", "unknown without torch"
        yield ADVICE, "pip install torch"
        return
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        yield "GPUs", "none" if built else "none that this torch can use: it is built for the CPU only"
        return
    count = torch.cuda.device_count()
    for index in range(count):
        yield f"GPU {index}", _describe_gpu(torch.cuda.get_device_properties(index))
    for a in range(count):
        reach = ["." if a == b or torch.cuda.can_device_access_peer(a, b) else "-" for b in range(count)]
        yield f"P2P {a}", f"{' '.join(reach)}   (. mapped, - not)"


def symmetric_memory() -> Iterator[Line]:
    if importlib.util.find_spec("torch") is None:
        yield "symmetric memory", "unknown without torch"
        return
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield "symmetric memory", "none: this torch is built without torch.distributed"
    elif importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        yield "symmetric memory", "none: torch is too old"
        yield ADVICE, "pip install 'torch>=2.10'"
    elif not torch.cuda.is_available():
        yield "symmetric memory", "in torch, but there is no GPU to use it on"
    else:
        import torch.distributed._symmetric_memory as symm_mem

        ask = getattr(symm_mem, "is_nvshmem_available", None)
        yield "symmetric memory", f"in torch; NVSHMEM {'usable' if ask is not None and ask() else 'not usable'}"


def cache() -> Iterator[Line]:
    from moegen import env
    from moegen.compile import cache as disk

    wanted, store = env.cache_dir(), disk.store()
    if store.root != wanted:
        yield "cache", f"{wanted} is unusable, {store.root} takes its place (see the warning)"
        yield ADVICE, "name a folder of your own in MOEGEN_CACHE_DIR"
        return
    yield "cache", f"{wanted}: {len(list(store.entries()))} kernels"


def packs() -> Iterator[Line]:
    from moegen import env
    from moegen.compile import pack
    from moegen.errors import CacheError

    for path in env.packs():
        try:
            yield "pack", f"{path}: {len(pack.load(path).items)} kernels"
        except CacheError as error:
            yield "pack", f"{path} is unusable"
            yield ADVICE, str(error)


def environment() -> Iterator[Line]:
    from moegen import env

    for name in env.VARIABLES:
        value = env.raw(name)
        if value:
            yield name, value


PROBES: tuple[Callable[[], Iterator[Line]], ...] = (
    versions,
    nvrtc,
    driver,
    cxx,
    gpus,
    symmetric_memory,
    cache,
    packs,
    environment,
)


def _guarded(probe: Callable[[], Iterator[Line]]) -> list[Line]:
    """A probe's lines; what it could not find out is a line too. A broken installation is what a doctor is for."""
    found: list[Line] = []
    try:
        found.extend(probe())
    except Exception as error:
        found.append((probe.__name__, f"cannot be told: {type(error).__name__}: {error}"))
    return found


def _version(package: str, otherwise: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return otherwise


def _driver_version() -> int | None:
    """As cuDriverGetVersion says it, without starting CUDA; None without a driver."""
    try:
        from cuda import pathfinder

        pathfinder.load_nvidia_dynamic_lib("cuda")
        from cuda.bindings import driver as api
    except (ImportError, RuntimeError, OSError):
        return None
    status, number = api.cuDriverGetVersion()
    return int(number) if status == api.CUresult.CUDA_SUCCESS and number else None


def _describe_gpu(properties: object) -> str:
    from moegen.compile.target import Target
    from moegen.errors import UnsupportedPlatformError

    major, minor = getattr(properties, "major", 0), getattr(properties, "minor", 0)
    try:
        target = f"target {Target.for_capability(major, minor)}"
    except UnsupportedPlatformError:
        target = "no target"
    memory = getattr(properties, "total_memory", 0) / 2**30
    processors = getattr(properties, "multi_processor_count", 0)
    name = getattr(properties, "name", "?")
    return f"{name}, compute capability {major}.{minor} ({target}), {processors} SMs, {memory:.0f} GiB"
