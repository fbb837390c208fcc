# SPDX-License-Identifier: Apache-2.0
"""`moegen cache`: what the disk cache holds, and making it smaller."""

from __future__ import annotations

import re
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Look at the kernel cache, or make it smaller.")

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@app.command()
def info() -> None:
    """Where the cache is and what it holds."""
    from moegen.compile import cache

    store = cache.store()
    found = list(store.entries())
    typer.echo(f"folder   {store.root}")
    typer.echo(f"kernels  {len(found)}")
    typer.echo(f"bytes    {cache.size(store.root) if store.root.is_dir() else 0}")
    for target in sorted({entry.meta["target"] for entry in found}):
        typer.echo(f"  {target:6} {sum(entry.meta['target'] == target for entry in found)}")


@app.command()
def prune(
    older_than: Annotated[str, typer.Option("--older-than", help="Age, e.g. 12h or 30d.")] = "30d",
) -> None:
    """Remove kernels that were compiled longer ago than an age."""
    from moegen.compile import cache

    removed, freed = cache.store().prune(_seconds(older_than))
    typer.echo(f"removed {removed} kernels, {freed} bytes")


@app.command()
def clear() -> None:
    """Remove every kernel."""
    from moegen.compile import cache

    removed, freed = cache.store().clear()
    typer.echo(f"removed {removed} kernels, {freed} bytes")


def _seconds(age: str) -> float:
    from moegen.errors import InputError

    match = re.fullmatch(r"(\d+)([smhd])", age)
    if match is None:
        raise InputError(f"an age is a number and one of s, m, h, d, e.g. 30d; got {age!r}")
    return float(int(match[1]) * _UNITS[match[2]])
