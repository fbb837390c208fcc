# SPDX-License-Identifier: Apache-2.0
"""`moegen bench --suite NAME`: several families in one run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from moegen.bench.config import LowLatencyConfig
    from moegen.bench.node_config import NodeConfig

SUITES = ("node",)


def run(
    suite: str,
    base: LowLatencyConfig,
    counts: tuple[int, int, int],
    most_tokens: int,
    parts: str,
    out: Path,
    list_stems: bool,
) -> None:
    """Runs the suite, or prints its kernels.

    Args:
        base: ranks, layer, routings and seed.
        counts: ops, replays and calls as given; 0: as `parts_of`.

    Raises:
        InputError: no such suite or part.
        BenchError: a part failed; the others' results are printed and kept.
    """
    from moegen.bench import launch, node, node_report, report
    from moegen.bench.failure import BenchError
    from moegen.cli import common

    config = _config(suite, base, counts, most_tokens, parts, out)
    if list_stems:
        typer.echo("\n".join(spec.stem for spec in config.specs))
        return
    if config.estimate_seconds is not None:
        typer.echo(f"about {config.estimate_seconds:.0f} s on {base.ranks} ranks, besides compiling")
    try:
        result = launch.run(node.measure, config)
    except BenchError as error:
        raise BenchError(f"{error}\nwhat the parts before had measured is in {out}") from None
    if result is None:
        return
    report.show(result, common.console(), node_report.overview)
    for path in report.save(result, out, node_report.parts):
        typer.echo(f"wrote {path}")
    failed = [name for name, part in result["parts"].items() if part["errors"]]
    if failed:
        first = result["parts"][failed[0]]["errors"][0]
        raise BenchError(f"{len(failed)} of {len(result['parts'])} parts failed ({', '.join(failed)}): {first}")


def _config(
    suite: str, base: LowLatencyConfig, counts: tuple[int, int, int], most_tokens: int, parts: str, out: Path
) -> NodeConfig:
    from moegen.bench.node_config import NodeConfig, parts_of
    from moegen.cli import common
    from moegen.errors import InputError

    if suite not in SUITES:
        raise InputError(f"suite is one of {', '.join(SUITES)}; got {suite!r}")
    chosen = parts_of(base, counts, most_tokens, tuple(common.words(parts)))
    ops, replays, calls = counts
    layer = "" if base.preset else f"--hidden {base.hidden} --experts {base.num_experts} --topk {base.num_topk} "
    command = (
        f"moegen bench --suite {suite} --ranks {base.ranks} --device {base.device} "
        f"--world {'processes' if base.processes else 'local'} {layer}--routing {','.join(base.routings)} "
        f"--parts {','.join(part.name for part in chosen)} "
        f"--most-tokens {most_tokens} --ops {ops} --replays {replays} --calls {calls} --seed {base.seed}"
    )
    return NodeConfig(base, chosen, str(out), command)
