# SPDX-License-Identifier: Apache-2.0
"""`moegen show STEM`: a kernel's source, PTX, machine code, or resources."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Annotated

import typer

from moegen import leftovers

if TYPE_CHECKING:
    from moegen.codegen.render import Source
    from moegen.compile.target import Target

app = typer.Typer(add_completion=False)


@app.command()
def show(
    stem: Annotated[str, typer.Argument(metavar="STEM", help="The kernel, by name.")],
    source: Annotated[bool, typer.Option("--source", help="The exact text that is compiled (default).")] = False,
    ptx: Annotated[bool, typer.Option("--ptx", help="Its PTX.")] = False,
    sass: Annotated[bool, typer.Option("--sass", help="Its machine code.")] = False,
    resources: Annotated[bool, typer.Option("--resources", help="Registers, shared memory, spills, digest.")] = False,
    arch: Annotated[str, typer.Option(help="Target of PTX, machine code and resources.")] = "sm90",
) -> None:
    """Print what a kernel is made of."""
    from moegen.cli import common
    from moegen.compile.target import Target

    (kernel,) = common.sources([stem])
    target = Target.parse(arch)
    if source or not (ptx or sass or resources):
        typer.echo(kernel.text, nl=False)
    if ptx:
        typer.echo(_ptx(kernel, target))
    if resources:
        _print_resources(kernel, target)
    if sass:
        typer.echo(_sass(kernel, target))


def _ptx(kernel: Source, target: Target) -> str:
    from moegen.compile import nvrtc

    _need_gpu_target(target, "PTX")
    return nvrtc.ptx(nvrtc.recipe(kernel, target))


def _print_resources(kernel: Source, target: Target) -> None:
    from moegen.compile.binary import obtain

    made = obtain(kernel, target)
    typer.echo(f"stem       {made.stem}")
    typer.echo(f"target     {made.target} ({made.target.arch})")
    typer.echo(f"text       sha256 {kernel.digest}")
    typer.echo(f"binary     sha256 {made.sha256}, {made.bytes} bytes, from {made.origin}")
    for name, value in (made.resources.to_json() if made.resources else {}).items():
        typer.echo(f"{name.removesuffix('_bytes'):10} {value}{' bytes' if name.endswith('_bytes') else ''}")


def _sass(kernel: Source, target: Target) -> str:
    from moegen.compile.binary import obtain, read

    _need_gpu_target(target, "machine code")
    command = _disassembler()
    with leftovers.folder("sass") as folder:
        cubin = folder / f"{kernel.stem}.cubin"
        cubin.write_bytes(read(obtain(kernel, target)))
        return subprocess.run([*command, str(cubin)], check=True, capture_output=True, text=True).stdout


def _disassembler() -> tuple[str, ...]:
    """The command that disassembles a cubin: nvdisasm or cuobjdump, from PATH or from their PyPI packages.

    Raises:
        UnsupportedPlatformError: there is neither.
    """
    from moegen.errors import UnsupportedPlatformError

    for name, options in (("nvdisasm", ("-c",)), ("cuobjdump", ("-sass",))):
        if (found := _tool(name)) is not None:
            return (found, *options)
    raise UnsupportedPlatformError(
        "machine code needs nvdisasm or cuobjdump: pip install nvidia-cuda-nvdisasm, or a CUDA toolkit on PATH"
    )


def _tool(name: str) -> str | None:
    try:
        from cuda import pathfinder

        return pathfinder.find_nvidia_binary_utility(name) or shutil.which(name)
    except (ImportError, AttributeError, RuntimeError):
        return shutil.which(name)


def _need_gpu_target(target: Target, what: str) -> None:
    from moegen.errors import InputError

    if target.is_host:
        raise InputError(f"the host target has no {what}; choose a GPU target, e.g. --arch sm90")
