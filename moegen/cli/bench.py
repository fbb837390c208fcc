# SPDX-License-Identifier: Apache-2.0
"""`moegen bench FAMILY`: times what a family does, beside the limit of the link, and keeps the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moegen.bench.config import LowLatencyConfig

app = typer.Typer(add_completion=False, no_args_is_help=True)

RESULTS = Path("bench/results")
_DEFAULT_PRESET = "deepseek-v3"
_GPU_COUNTS = (50, 100, 100)
_HOST_COUNTS = (2, 3, 2)
"""Ops in a recording, replays, calls in a loop."""


@app.callback()
def root() -> None:
    """Measure dispatch and combine; every result is verified, and a bench that cannot run fails."""


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
        routings=tuple(word.strip() for word in routing.split(",") if word.strip()),
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
