# SPDX-License-Identifier: Apache-2.0
"""`moegen build`: compiles kernels beforehand, into the cache and, if asked, into a pack."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moegen.codegen.render import Source
    from moegen.compile.binary import Binary
    from moegen.compile.target import Target

app = typer.Typer(add_completion=False)


@app.command()
def build(
    stems: Annotated[list[str] | None, typer.Argument(metavar="STEM...", help="Kernels by name.")] = None,
    arch: Annotated[str, typer.Option(help="Targets, e.g. sm90,sm100,host.")] = "sm90",
    preset: Annotated[str, typer.Option(help="All kernels of a published model, e.g. deepseek-v3.")] = "",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks for the preset.")] = "2,4,8",
    family: Annotated[str, typer.Option(help="Only this family of the preset.")] = "",
    catalog: Annotated[bool, typer.Option("--catalog", help="The kernels of generated/.")] = False,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=0, help="Processes; 0: as many as cores.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write a pack (FILE.moepack).")] = None,
) -> None:
    """Compile kernels beforehand. Needs no GPU."""
    from moegen.cli import common
    from moegen.compile import ninja_build

    wanted = [
        pair
        for target in common.targets(arch)
        for pair in _wanted(target, stems or [], preset, common.numbers(ranks), family, catalog)
    ]
    with common.progress("compiling") as progress:
        report = ninja_build.build(wanted, jobs or None, progress)
    _print_table(report.binaries)
    if out is not None:
        report.write_pack(out)
        typer.echo(f"wrote {out} ({out.stat().st_size} bytes); use it with MOEGEN_PACK={out}")
    typer.echo(f"compiled {report.compiled}, up to date {report.up_to_date}")


def _wanted(
    target: Target, stems: list[str], preset: str, ranks: list[int], family: str, catalog: bool
) -> list[tuple[Source, Target]]:
    from moegen.cli import common
    from moegen.codegen.catalog import catalog as all_specs
    from moegen.codegen.catalog import preset_specs
    from moegen.codegen.render import render
    from moegen.errors import InputError

    if not (stems or preset or catalog):
        raise InputError("what to build? Name stems (see `moegen list`), a --preset, or --catalog")
    if family and not preset:
        raise InputError("--family chooses among a preset's kernels; give a --preset")
    specs = [common.parse(stem) for stem in stems]
    specs += preset_specs(preset, ranks, family or None, target.name) if preset else []
    specs += all_specs() if catalog else []
    return [(render(spec), target) for spec in dict.fromkeys(specs)]


def _print_table(binaries: tuple[Binary, ...]) -> None:
    from rich.table import Table

    from moegen.cli import common

    table = Table(box=None, pad_edge=False)
    table.add_column("target")
    table.add_column("stem", no_wrap=True)
    for name in ("seconds", "registers", "shared", "spills", "bytes"):
        table.add_column(name, justify="right")
    for made in binaries:
        used = made.resources
        numbers = [used.registers, used.shared_bytes, used.spill_bytes] if used else ["-", "-", "-"]
        table.add_row(made.target.name, made.stem, f"{made.seconds:.2f}", *map(str, numbers), str(made.bytes))
    common.console().print(table)
