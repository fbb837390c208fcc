# SPDX-License-Identifier: Apache-2.0
"""`moegen demo`: a real MoE layer across ranks, compared with the same layer in one process."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    ranks: Annotated[int, typer.Option(min=0, help="0: one per GPU if there are several, else 4.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; empty: cuda if there is a GPU.")] = "",
    preset: Annotated[str, typer.Option(help="Empty: tiny on CPUs and small GPUs, else deepseek-v3.")] = "",
    tokens: Annotated[int, typer.Option(min=0, help="Per rank and step; 0: 64.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="How often the layer runs.")] = 5,
) -> None:
    """Run an MoE layer on real text across ranks; exit status 1 if it differs from the dense layer or does not fit."""
    from moegen.cli import common
    from moegen.demo import dense, memory, plan, report
    from moegen.demo import ranks as across

    console = common.console()
    chosen = plan.make_plan(ranks, device, preset, tokens, steps)
    need, there = memory.check(chosen)
    report.print_plan(console, chosen, need, there, plan.build(chosen))
    results = across.run(chosen)
    verdict = dense.compare(chosen, results)
    report.print_result(console, chosen, results, verdict)
    raise typer.Exit(0 if verdict.ok else 1)
