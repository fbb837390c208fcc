# SPDX-License-Identifier: Apache-2.0
"""`moegen generate`: writes or checks the committed folder generated/."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail with the diff if it differs.")] = False,
    resources: Annotated[
        bool, typer.Option("--resources", help="Also compile, for registers, spills and digests in the manifest.")
    ] = False,
) -> None:
    """Write generated/ from the catalog, or check that it is up to date."""
    from moegen.codegen import generated

    root = generated.folder()
    ok = _check_text(root) if check else _write_text(root)
    if resources:
        ok = (_check_resources(root) if check else _write_resources(root)) and ok
    raise typer.Exit(0 if ok else 1)


def _write_text(root: Path) -> bool:
    from moegen.codegen import generated

    for change in generated.write(root, generated.specs()):
        typer.echo(f"{'removed' if change.kind == 'orphaned' else 'wrote'} generated/{change.path}")
    typer.echo(f"generated/ holds {len(generated.specs())} kernels")
    return True


def _check_text(root: Path) -> bool:
    from moegen.codegen import generated

    found = generated.differences(root, generated.specs())
    for difference in found:
        typer.echo(f"{difference.kind}: generated/{difference.path}")
        typer.echo(difference.diff)
    if found:
        typer.echo(f"{len(found)} files differ; run `moegen generate` and commit the result")
        return False
    typer.echo(f"generated/ is up to date: {len(generated.specs())} kernels")
    return True


def _write_resources(root: Path) -> bool:
    from moegen.cli import common
    from moegen.codegen import generated
    from moegen.compile import manifest, nvrtc

    with common.progress("compiling") as progress:
        found = manifest.record(root, generated.specs(), progress)
    typer.echo(f"recorded the resources of {len(found)} kernels by {nvrtc.identity()}")
    return True


def _check_resources(root: Path) -> bool:
    from moegen.cli import common
    from moegen.codegen import generated
    from moegen.compile import manifest

    with common.progress("compiling") as progress:
        result = manifest.compare(root, generated.specs(), progress)
    if result.pinned is None:
        typer.echo("the manifest has no resources; run `moegen generate --resources`")
        return False
    if result.pinned != result.running:
        typer.echo(f"compiled, not compared: the manifest is from {result.pinned}, this is {result.running}")
        return True
    for line in result.differences:
        typer.echo(line)
    if result.differences:
        typer.echo("resources changed; if that is meant, run `moegen generate --resources` and commit the result")
        return False
    typer.echo(f"resources agree with the manifest ({result.running})")
    return True
