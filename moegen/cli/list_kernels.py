# SPDX-License-Identifier: Apache-2.0
"""`moegen list`: the kernels by name."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def list_kernels(
    preset: Annotated[str, typer.Option(help="A model's kernels instead of the catalog's.")] = "",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks for the preset.")] = "2,4,8",
    arch: Annotated[str, typer.Option(help="Target that the preset's kernels are chosen for.")] = "sm90",
    cached: Annotated[bool, typer.Option("--cached", help="What the cache holds, with its targets.")] = False,
) -> None:
    """List kernels: the catalog's, a preset's, or those in the cache. One stem per line."""
    from moegen.cli import common
    from moegen.codegen.catalog import catalog, preset_specs

    if cached:
        _list_cached()
        return
    specs = catalog()
    if preset:
        specs = [s for t in common.targets(arch) for s in preset_specs(preset, common.numbers(ranks), None, t.name)]
    for spec in dict.fromkeys(specs):
        typer.echo(spec.stem)


def _list_cached() -> None:
    from moegen.compile import cache

    for entry in cache.store().entries():
        typer.echo(f"{entry.meta['target']} {entry.meta['stem']} {entry.folder}")
