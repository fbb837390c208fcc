# SPDX-License-Identifier: Apache-2.0
"""`moegen bench FAMILY`: times what a family does, beside the limit of the link, and keeps the result.

`moegen bench --suite NAME` does so for several families in one run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moegen.bench.config import LowLatencyConfig
    from moegen.bench.tune import TuneConfig

app = typer.Typer(add_completion=False, no_args_is_help=True)

RESULTS = Path("bench/results")
_DEFAULT_PRESET = "deepseek-v3"
_GPU_COUNTS = (50, 100, 100)
_HOST_COUNTS = (2, 3, 2)
"""Ops in a recording, replays, calls in a loop."""
_HT_COUNTS = (20, 50, 20)
"""The same of `ht`, whose ops are longer."""
_TUNE_REPLAYS = 40


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    suite: Annotated[str, typer.Option(help="node: all families over the GPUs of this host, in one run.")] = "",
    parts: Annotated[str, typer.Option(help="Of a suite: ll, ll_fp8, ht, a2a, coll, coll_many; empty: all.")] = "",
    most_tokens: Annotated[
        int, typer.Option(min=0, help="Of a suite: larger cases are measured with so many; 0: what fits the device.")
    ] = 0,
    ranks: Annotated[int, typer.Option(min=0, help="Of a suite, as of a family; 0: one per GPU, else 2.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu; empty: cuda if there is a GPU.")] = "",
    world: Annotated[str, typer.Option(help="processes or local; empty: what fits.")] = "",
    hidden: Annotated[int, typer.Option(help="Instead of deepseek-v3: elements of a token,")] = 0,
    experts: Annotated[int, typer.Option(help="experts,")] = 0,
    topk: Annotated[int, typer.Option(help="and selections per token.")] = 0,
    routing: Annotated[str, typer.Option(help="uniform, zipf, hot.")] = "uniform,zipf,hot",
    ops: Annotated[int, typer.Option(min=0, help="Ops in a graph; 0: what fits the family.")] = 0,
    replays: Annotated[int, typer.Option(min=0, help="Timed replays of a graph; 0: 40, on a CPU 3.")] = 0,
    calls: Annotated[int, typer.Option(min=0, help="Calls in an eager loop; 0: what fits the family.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of all random inputs.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the table.")] = RESULTS,
    list_stems: Annotated[
        bool, typer.Option("--list-stems", help="Measure nothing; print the kernels, for `moegen build STEM... --out`.")
    ] = False,
) -> None:
    """Measure dispatch and combine; every result is verified, and a bench that cannot run fails.

    The options here are of --suite; a family has its own behind its name.
    """
    from moegen.cli import bench_suite
    from moegen.errors import InputError

    if bool(suite) == (context.invoked_subcommand is not None):
        raise InputError("give either a family (see `moegen bench --help`) with its options behind it, or --suite")
    if suite:
        shape, counts = ("", hidden, experts, topk), (ops, replays, calls)
        base = _config(ranks, device, world, shape, [1], routing, 0, counts, seed, "", 0)
        bench_suite.run(suite, base, counts, most_tokens, parts, out, list_stems)


@app.command()
def ll(
    ranks: Annotated[int, typer.Option(min=0, help="Ranks; 0: one per GPU, else 2.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu; empty: cuda if there is a GPU.")] = "",
    world: Annotated[
        str, typer.Option(help="processes (one per rank and GPU) or local (virtual ranks); empty: what fits.")
    ] = "",
    tokens: Annotated[str, typer.Option(help="Tokens per rank, one case each.")] = "1,8,32,128,512",
    preset: Annotated[str, typer.Option(help=f"A published model; default {_DEFAULT_PRESET}.")] = "",
    hidden: Annotated[int, typer.Option(help="Instead of a preset: elements of a token,")] = 0,
    experts: Annotated[int, typer.Option(help="experts,")] = 0,
    topk: Annotated[int, typer.Option(help="and selections per token.")] = 0,
    routing: Annotated[str, typer.Option(help="uniform, zipf, hot (one rank gets everything).")] = "uniform,zipf,hot",
    max_tokens: Annotated[int, typer.Option(min=0, help="Capacity per rank; 0: each case's tokens.")] = 0,
    quantize: Annotated[str, typer.Option(help="fp8, fp8_pow2 or fp8_ue8m0: dispatch sends FP8.")] = "",
    halves: Annotated[
        int, typer.Option(min=0, help="Also time sends and receives apart: this many in a row, 2 to 16; 0: do not.")
    ] = 0,
    ops: Annotated[int, typer.Option(min=0, help="Ops in a graph; 0: 50, on a CPU 2.")] = 0,
    replays: Annotated[int, typer.Option(min=0, help="Timed replays of a graph; 0: 100, on a CPU 3.")] = 0,
    calls: Annotated[int, typer.Option(min=0, help="Calls in an eager loop; 0: 100, on a CPU 2.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of all random inputs.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the table.")] = RESULTS,
) -> None:
    """Low-latency dispatch and combine: graphs, eager calls, and the link's limit in the same run."""
    from moegen.bench import launch, report
    from moegen.bench.ll import measure
    from moegen.cli import common

    config = _config(
        ranks, device, world, (preset, hidden, experts, topk), common.numbers(tokens), routing, max_tokens,
        (ops, replays, calls), seed, quantize, halves,
    )  # fmt: skip
    result = launch.run(measure, config)
    if result is None:
        return
    report.show(result, common.console())
    for path in report.save(result, out):
        typer.echo(f"wrote {path}")


@app.command()
def ht(
    ranks: Annotated[int, typer.Option(min=0, help="Ranks; 0: one per GPU, else 2.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu; empty: cuda if there is a GPU.")] = "",
    world: Annotated[
        str, typer.Option(help="processes (one per rank and GPU) or local (virtual ranks); empty: what fits.")
    ] = "",
    tokens: Annotated[str, typer.Option(help="Tokens per rank, one case each.")] = "4096,256,1024,8192,16384",
    preset: Annotated[str, typer.Option(help=f"A published model; default {_DEFAULT_PRESET}.")] = "",
    hidden: Annotated[int, typer.Option(help="Instead of a preset: elements of a token,")] = 0,
    experts: Annotated[int, typer.Option(help="experts,")] = 0,
    topk: Annotated[int, typer.Option(help="and selections per token.")] = 0,
    routing: Annotated[str, typer.Option(help="uniform, zipf, hot (one rank gets everything).")] = "uniform,zipf",
    layouts: Annotated[str, typer.Option(help="token, packed.")] = "token,packed",
    dtypes: Annotated[
        str, typer.Option(help="bf16, fp8 (quantised on the way), fp8_given. Combine is measured with bf16.")
    ] = "bf16,fp8,fp8_given",
    num_sms: Annotated[
        str, typer.Option(help="Blocks per launch, of the first number of tokens and routing; 0: all.")
    ] = "0,8,16,24,32,64",
    alignment: Annotated[int, typer.Option(min=1, help="Of experts in layout packed.")] = 128,
    ops: Annotated[int, typer.Option(min=0, help="Ops in a graph; 0: 20, on a CPU 2.")] = 0,
    replays: Annotated[int, typer.Option(min=0, help="Timed replays of a graph; 0: 50, on a CPU 3.")] = 0,
    calls: Annotated[int, typer.Option(min=0, help="Calls of mode exact; 0: 20, on a CPU 2.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of all random inputs.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the table.")] = RESULTS,
) -> None:
    """High-throughput dispatch and combine: graphs, and the link's limit in the same run."""
    from moegen.bench import ht_report, launch, report
    from moegen.bench.ht import measure
    from moegen.bench.ht_config import HighThroughputConfig
    from moegen.cli import common

    shape, counts = (preset, hidden, experts, topk), (ops, replays, calls)
    base = _config(ranks, device, world, shape, common.numbers(tokens), routing, 0, counts, seed, "", 0)
    if base.device == "cuda":
        usual_ops, usual_replays, usual_calls = _HT_COUNTS
        base = replace(base, ops=ops or usual_ops, replays=replays or usual_replays, calls=calls or usual_calls)
    config = HighThroughputConfig(
        **vars(base),
        layouts=tuple(common.words(layouts)),
        dtypes=tuple(common.words(dtypes)),
        num_sms=tuple(common.numbers(num_sms)),
        alignment=alignment,
    )
    result = launch.run(measure, config)
    if result is None:
        return
    report.show(result, common.console(), ht_report.parts)
    for path in report.save(result, out, ht_report.parts):
        typer.echo(f"wrote {path}")


@app.command()
def a2a(
    ranks: Annotated[int, typer.Option(min=0, help="Ranks; 0: one per GPU, else 2.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu; empty: cuda if there is a GPU.")] = "",
    world: Annotated[
        str, typer.Option(help="processes (one per rank and GPU) or local (virtual ranks); empty: what fits.")
    ] = "",
    tokens: Annotated[str, typer.Option(help="Tokens per rank, one case each.")] = "1,16,64,128,512,2048,4096",
    preset: Annotated[str, typer.Option(help=f"A published model; default {_DEFAULT_PRESET}.")] = "",
    hidden: Annotated[int, typer.Option(help="Instead of a preset: elements of a token,")] = 0,
    experts: Annotated[int, typer.Option(help="experts,")] = 0,
    topk: Annotated[int, typer.Option(help="and selections per token.")] = 0,
    routing: Annotated[str, typer.Option(help="uniform, zipf, hot (one rank gets everything).")] = "uniform,zipf,hot",
    path: Annotated[str, typer.Option(help="ipc or collective.")] = "ipc",
    exchange: Annotated[
        str, typer.Option(help="Of path collective, called from Python: padded, exact. Graphs hold padded calls.")
    ] = "padded,exact",
    ops: Annotated[int, typer.Option(min=0, help="Ops in a graph; 0: 50, on a CPU 2.")] = 0,
    replays: Annotated[int, typer.Option(min=0, help="Timed replays of a graph; 0: 100, on a CPU 3.")] = 0,
    calls: Annotated[int, typer.Option(min=0, help="Calls in an eager loop; 0: 100, on a CPU 2.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of all random inputs.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the JSON and the table.")] = RESULTS,
) -> None:
    """One-sided dispatch and combine, or the same over collectives: graphs, eager calls, and the link's limit."""
    from moegen.bench import a2a_report, launch, report
    from moegen.bench.a2a import measure
    from moegen.bench.a2a_config import OneSidedConfig
    from moegen.cli import common

    shape, counts = (preset, hidden, experts, topk), (ops, replays, calls)
    base = _config(ranks, device, world, shape, common.numbers(tokens), routing, 0, counts, seed, "", 0)
    config = OneSidedConfig(**vars(base), path=path, exchanges=tuple(common.words(exchange)))
    result = launch.run(measure, config)
    if result is None:
        return
    report.show(result, common.console(), a2a_report.parts)
    for file in report.save(result, out, a2a_report.parts):
        typer.echo(f"wrote {file}")


@app.command()
def tune(
    ranks: Annotated[int, typer.Option(min=0, help="Ranks; 0: one per GPU, else 2.")] = 0,
    device: Annotated[str, typer.Option(help="cuda or cpu; empty: cuda if there is a GPU.")] = "",
    world: Annotated[
        str, typer.Option(help="processes (one per rank and GPU) or local (virtual ranks); empty: what fits.")
    ] = "",
    tokens: Annotated[str, typer.Option(help="Capacities, all of them used.")] = "1,8,16,32,64,128,256,512,1024",
    preset: Annotated[str, typer.Option(help=f"A published model; default {_DEFAULT_PRESET}.")] = "",
    hidden: Annotated[int, typer.Option(help="Instead of a preset: elements of a token,")] = 0,
    experts: Annotated[int, typer.Option(help="experts,")] = 0,
    topk: Annotated[int, typer.Option(help="and selections per token.")] = 0,
    routing: Annotated[str, typer.Option(help="One of uniform, zipf, hot.")] = "uniform",
    dtypes: Annotated[str, typer.Option(help="Of dispatch: bf16, fp8. Combine is measured with bf16.")] = "bf16,fp8",
    wires: Annotated[str, typer.Option(help="Candidates; empty: all.")] = "",
    warp_groups: Annotated[str, typer.Option(help="Candidates, GROUPSxWARPS.")] = "1x4,1x8,1x16",
    num_sms: Annotated[str, typer.Option(help="Candidates: blocks at most; 0: as many as are useful.")] = "0",
    ops: Annotated[int, typer.Option(min=0, help="Ops in a graph; 0: 50, on a CPU 2.")] = 0,
    replays: Annotated[int, typer.Option(min=0, help="Timed replays of a graph; 0: 40, on a CPU 3.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of all random inputs.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="The table to write; without: the package's, if every rank had its own GPU.")
    ] = None,
    list_stems: Annotated[
        bool, typer.Option("--list-stems", help="Measure nothing; print the kernels, for `moegen build STEM... --out`.")
    ] = False,
) -> None:
    """Find the fastest wires and warps on this machine and write the table that chooses them."""
    from moegen.bench import choose, launch
    from moegen.bench.tune import measure
    from moegen.cli import common

    words = (dtypes, wires, warp_groups)
    config = _tune_config(
        ranks, device, world, (preset, hidden, experts, topk), common.numbers(tokens), routing, words,
        common.numbers(num_sms), (ops, replays), seed,
    )  # fmt: skip
    if list_stems:
        typer.echo("\n".join(config.stems))
        return
    result = launch.run(measure, config)
    if result is None:
        return
    for table in choose.tables(result):
        common.console().print(table)
        typer.echo()
    _write_table(result, out, config)


@app.command()
def tables(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail with what differs.")] = False,
    root: Annotated[Path, typer.Option(help="Folder of a clone, with README.md and bench/results.")] = Path(),
) -> None:
    """Write the published tables from the results under bench/results; measure nothing."""
    from moegen.cli import bench_tables

    bench_tables.run(root, check)


def _write_table(result: dict[str, Any], out: Path | None, config: TuneConfig) -> None:
    from moegen import tuning
    from moegen.bench import choose

    if out is None and (config.virtual or config.device != "cuda"):
        typer.echo("no table was written: ranks that share a device measure no link; name a file with --out")
        return
    path = out or tuning.path_of(result["arch"])
    before = tuning.parse(path.read_text()) if path.is_file() else tuning.table(result["arch"])
    path.write_text(tuning.text_of(choose.updated(before, result)))
    typer.echo(f"wrote {path}; kernels of generated/ may have changed: run `moegen generate --resources`")


def _tune_config(
    ranks: int,
    device: str,
    world: str,
    shape: tuple[str, int, int, int],
    tokens: list[int],
    routing: str,
    words: tuple[str, str, str],
    num_sms: list[int],
    counts: tuple[int, int],
    seed: int,
) -> TuneConfig:
    from moegen import tuning
    from moegen.bench.tune import TuneConfig
    from moegen.cli import common

    base = _config(ranks, device, world, shape, tokens, routing, 0, (counts[0], counts[1], 1), seed, "", 0)
    dtypes, wires, warp_groups = (tuple(common.words(given)) for given in words)
    if not counts[1] and base.device == "cuda":
        base = replace(base, replays=_TUNE_REPLAYS)
    return TuneConfig(
        **vars(base), dtypes=dtypes, wires=wires or tuning.WIRES, warp_groups=warp_groups, num_sms=tuple(num_sms)
    )


def _config(
    ranks: int,
    device: str,
    world: str,
    shape: tuple[str, int, int, int],
    tokens: list[int],
    routing: str,
    max_tokens: int,
    counts: tuple[int, int, int],
    seed: int,
    quantize: str,
    halves: int,
) -> LowLatencyConfig:
    from moegen.bench.config import GPU_LINK, HOST_LINK, LowLatencyConfig
    from moegen.cli import common

    device, ranks, processes = _places(device, ranks, world)
    name, hidden, experts, topk = _shape(*shape)
    on_gpu = device == "cuda"
    ops, replays, calls = (
        given or default for given, default in zip(counts, _GPU_COUNTS if on_gpu else _HOST_COUNTS, strict=True)
    )
    return LowLatencyConfig(
        ranks=ranks,
        device=device,
        processes=processes,
        preset=name,
        hidden=hidden,
        num_experts=experts,
        num_topk=topk,
        tokens=tuple(tokens),
        max_tokens=max_tokens,
        routings=tuple(common.words(routing)),
        ops=ops,
        replays=replays,
        calls=calls,
        link=GPU_LINK if on_gpu else HOST_LINK,
        seed=seed,
        quantize=quantize,
        halves=halves,
    )


def _places(device: str, ranks: int, world: str) -> tuple[str, int, bool]:
    """Device, number of ranks, and whether each is a process."""
    import torch

    from moegen.bench.launch import under_torchrun, world_size
    from moegen.errors import InputError

    gpus = torch.cuda.device_count()
    device = device or ("cuda" if gpus else "cpu")
    if device not in ("cuda", "cpu"):
        raise InputError(f"device is cuda or cpu; got {device!r}")
    if world not in ("", "local", "processes"):
        raise InputError(f"world is local or processes; got {world!r}")
    if under_torchrun():
        if ranks not in (0, world_size()) or world == "local":
            raise InputError(f"torchrun has started {world_size()} processes: leave --ranks and --world out")
        return device, world_size(), True
    ranks = ranks or (max(gpus, 2) if device == "cuda" else 2)
    return device, ranks, world == "processes" or (not world and device == "cuda" and 1 < ranks <= gpus)


def _shape(preset_name: str, hidden: int, experts: int, topk: int) -> tuple[str, int, int, int]:
    """Preset (or ""), hidden, experts, topk."""
    from moegen.errors import InputError
    from moegen.kernels.presets import preset

    numbers = (hidden, experts, topk)
    if any(numbers):
        if preset_name or not all(numbers):
            raise InputError("give either a --preset or all of --hidden, --experts and --topk")
        return "", hidden, experts, topk
    layer = preset(preset_name or _DEFAULT_PRESET)
    return layer.name, layer.hidden, layer.num_experts, layer.num_topk
