# SPDX-License-Identifier: Apache-2.0
"""What the demo prints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from moegen.demo.dense import Verdict
from moegen.demo.memory import Need, gigabytes
from moegen.demo.plan import Built, Plan
from moegen.demo.ranks import OPS, RankResult


def print_plan(console: Console, plan: Plan, need: Need, there: int, built: Built) -> None:
    """What is about to run, in which memory, and what had to be compiled for it."""
    layer = plan.preset
    rows = [
        (
            "layer",
            f"{layer.name}: hidden {layer.hidden}, {layer.num_experts} experts, top-{layer.num_topk}, ffn {layer.ffn}",
        ),
        ("input", f"{plan.steps} steps of {plan.tokens} tokens on each of {plan.num_ranks} ranks"),
        ("target", str(built.target)),
        ("memory", f"{need} of {gigabytes(there)}"),
        ("path", plan.problem.path),
        *(("kernel", stem) for stem in built.stems),
    ]
    _print_pairs(console, rows)
    console.print(f"compiled {built.compiled}, from cache {built.cached}")


def print_result(console: Console, plan: Plan, results: Sequence[RankResult], verdict: Verdict) -> None:
    """Where it ran, how long its parts took, and how far it was from the dense layer."""
    _print_pairs(console, [("world", results[0].world)])
    # The slowest rank decides how long a step takes.
    seconds = torch.stack([result.seconds for result in results]).amax(dim=0)
    table = Table(box=None, pad_edge=False)
    table.add_column("milliseconds")
    for name in ("best", "median", "worst"):
        table.add_column(name, justify="right")
    for op, column in zip(OPS, seconds.T * 1e3, strict=True):
        table.add_row(op, *(f"{value:.3f}" for value in (column.min(), column.median(), column.max())))
    console.print(table)
    compared = f"{verdict.elements:,} values of up to {verdict.scale:.3f} compared"
    console.print(f"error    at most {verdict.error:.3e}; {compared}")
    judgement = "within the bound" if verdict.ok else "OVER THE BOUND"
    console.print(f"bound    error / bound is at most {verdict.worst:.3f}: {judgement}")


def _print_pairs(console: Console, rows: Sequence[tuple[str, str]]) -> None:
    for name, value in rows:
        console.print(f"{name:8} {value}", highlight=False)
