# SPDX-License-Identifier: Apache-2.0
"""`moegen bench tables`: writes the published tables from the committed results, or checks them."""

from __future__ import annotations

from pathlib import Path

import typer


def run(root: Path, check: bool) -> None:
    """Writes or checks; exits with status 1 if pages and results disagree.

    Raises:
        InputError: `root` is not the folder of a clone, or a table asks for a figure that no result has.
    """
    from moegen.bench import pages
    from moegen.bench.committed import Results
    from moegen.bench.page_readings import READINGS
    from moegen.bench.page_tables import TABLES

    results = Results(root)
    if not check:
        for page in pages.write(results, TABLES):
            typer.echo(f"wrote {page}")
    found = pages.problems(results, TABLES, READINGS)
    for problem in found:
        typer.echo(problem)
    if found:
        typer.echo("pages and committed results disagree; `moegen bench tables` writes tables, sentences are yours")
        raise typer.Exit(1)
    typer.echo(f"{len(TABLES)} tables and {len(READINGS)} sentences agree with the committed results")
