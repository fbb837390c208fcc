# SPDX-License-Identifier: Apache-2.0
"""A result as tables, and the files it is kept in."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from moegen.bench.machine import short_name
from moegen.kernels.presets import PRESETS

Json = dict[str, Any]
Parts = Callable[[Json], Iterator[RenderableType]]

FILE_WIDTH = 180
"""Columns of the tables in a file."""

_DEFAULT_PRESET = next(iter(PRESETS))


def file_stem(result: Json) -> str:
    """The name of a result's files: `ll_h100_virtual_r2`; another shape than the default one is named too."""
    config, world = result["config"], result["world"]
    shape = config["preset"] or f"h{config['hidden']}_k{config['num_topk']}_e{config['num_experts']}"
    words = [result["bench"], short_name(result["machine"]["name"]), world["kind"], f"r{world['ranks']}"]
    more = [shape] if shape != _DEFAULT_PRESET else []
    return "_".join(words + more + [word for word in (config["quantize"],) if word])


def save(result: Json, folder: Path, parts: Parts | None = None) -> tuple[Path, Path]:
    """Writes the result as JSON and as text; gives both paths."""
    data = save_json(result, folder)
    text = data.with_suffix(".txt")
    stream = io.StringIO()
    show(result, Console(file=stream, width=FILE_WIDTH), parts)
    text.write_text("\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n")
    return data, text


def save_json(result: Json, folder: Path) -> Path:
    """Writes the result as JSON alone, in the place of an older one; gives its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem(result)}.json"
    being_written = path.with_suffix(".tmp")
    being_written.write_text(json.dumps(result, indent=1) + "\n")
    being_written.replace(path)
    return path


def show(result: Json, console: Console, parts: Parts | None = None) -> None:
    """Prints the result; `parts`: what makes its tables, if not those of `ll`."""
    for part in (parts or tables)(result):
        console.print(part, highlight=False, markup=False) if isinstance(part, str) else console.print(part)
        console.print()


def tables(result: Json) -> Iterator[RenderableType]:
    """The most looked-at figures last: that is what a terminal, or the tail of a log, shows."""
    yield "\n".join(head(result, result["config"]["quantize"] or "bf16"))
    yield _ranks(result["cases"])
    yield _bytes(result["cases"])
    yield _eager(result["eager"])
    yield _times(result)
    yield link_line(result["link"])
    yield "\n".join(_foot(result))


def head(result: Json, dtype: str) -> Iterator[str]:
    config = result["config"]
    yield from origin(result)
    yield (
        f"hidden {config['hidden']}, top-{config['num_topk']} of {config['num_experts']} experts, "
        f"{dtype}; "
        f"{config['ops']} ops per recording, {config['replays']} replays"
    )
    yield result["command"]


def origin(result: Json) -> Iterator[str]:
    """When, on what and with what a result was measured."""
    at, world = result["machine"], result["world"]
    yield f"moegen bench {result['bench']}, {result['date']}"
    driver = f", driver {at['driver']}" if "driver" in at else ""
    yield f"{at['name']} (GPUs: {at['gpus']}{driver}), {at['cpu']}, {at['cores']} cores"
    yield ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    yield f"{world['description']}; {world['timing']}"
    yield from (f"NOTE: {note}" for note in world["notes"])


def link_line(link: Json) -> str:
    per_rank, together = (
        ", ".join(f"{name} {value:,.1f}" for name, value in link[key].items()) for key in ("gbps", "gbps_aggregate")
    )
    pushes = link["gbps_of_ranks"]["push"]
    return (
        f"limit measured in this run, all ranks at once, GB/s per rank and direction: {per_rank}\n"
        f"(push of single ranks {min(pushes):,.1f} to {max(pushes):,.1f}; all together: {together}; {link['what']}; "
        f"{link['bytes_per_rank'] / 2**20:.1f} MiB per rank to all others, {link['blocks']} x {link['threads']})"
    )


def _times(result: Json) -> Table:
    limit = result["link"]["gbps"]["push"]
    table = titled(
        "time of an op: quantiles of the slowest rank, and medians over ranks; bandwidth of unique remote rows"
    )
    columns(table, ("op", "tokens", "routing", "p50 us", "p90", "p99", "min us", "avg", "max"))
    columns(table, ("GB/s avg", "GB/s max", "all ranks", "busiest", "of push", "barrier us", "err/bound"), left=0)
    for case in result["cases"]:
        us, over, gbps = case["us"], case["us_over_ranks"], case["gbps"]
        times = [us["p50"], us["p90"], us["p99"], over["min"], over["avg"], over["max"]]
        speeds = [gbps["from_avg"], gbps["from_max"], gbps["aggregate"], gbps["busiest"]]
        error = "exact" if case["op"].startswith("dispatch") else f"{case['verified']['worst_error_over_bound']:.2f}"
        # A pair's bytes are those of its dispatch and its combine together.
        table.add_row(
            *_names(case),
            *figures(times, 2),
            *(figures(speeds, 1) if case["bytes"]["busiest"] else ["-"] * len(speeds)),
            f"{gbps['busiest'] / limit:.0%}" if limit and case["bytes"]["busiest"] else "-",
            "-" if case["op"].startswith("pair") else f"{case['barrier_us']['max']:.2f}",
            error,
        )
    return table


def _bytes(cases: Sequence[Json]) -> Table:
    table = titled("bytes that a rank sends in an op, on average (MB; payload only), counted three ways")
    columns(table, ("op", "tokens", "routing", "unique remote", "unique with self", "selections"))
    columns(table, ("same node", "cross node", "busiest rank, one direction"), left=0)
    for case in cases:
        names = ("unique_remote", "unique_with_self", "selections", "same_node", "cross_node", "busiest")
        table.add_row(*_names(case), *figures([case["bytes"][name] / 1e6 for name in names], 3))
    return table


def _ranks(cases: Sequence[Json]) -> Table:
    table = titled("per rank: unique remote rows, total = same node + cross node")
    columns(table, ("op", "tokens", "routing", "rank", "p50 us", "p90", "p99", "sends MB", "same", "cross"))
    columns(table, ("GB/s", "receives MB", "same", "cross", "GB/s"), left=0)
    for case in cases:
        for rank in case["ranks"]:
            cells: list[str] = figures([rank["us"][name] for name in ("p50", "p90", "p99")], 2)
            for way in ("send", "receive"):
                moved = [rank[way][name] / 1e6 for name in ("unique_remote", "same_node", "cross_node")]
                cells += [*figures(moved, 3), f"{rank[f'{way}_gbps']:.1f}"]
            table.add_row(*_names(case), str(rank["rank"]), *cells)
    return table


def _eager(rows: Sequence[Json]) -> Table:
    table = titled("called from Python one by one, average over ranks; host time until the call returns")
    columns(table, ("", "tokens", "routing", "pair us", "dispatch host us", "combine host us", "x.add_(1) host us"))
    columns(table, ("dispatch / add_", "combine / add_"), left=0)
    for row in rows:
        times = [row[name]["avg"] for name in ("pair_us", "dispatch_host_us", "combine_host_us", "small_op_us")]
        ratios = [row[name]["avg"] for name in ("dispatch_in_small_ops", "combine_in_small_ops")]
        table.add_row(*_names(row), *figures(times + ratios, 2))
    return table


def _foot(result: Json) -> Iterator[str]:
    notes = {}
    for case in result["cases"]:
        notes[case["tokens"]] = (case["rotation"], case["verified"]["combine_columns"] or 0)
    for tokens, (rotation, columns) in notes.items():
        hint = f"; {rotation['note']}" if rotation["note"] else ""
        yield (
            f"{tokens} tokens: {rotation['tokens']} token buffers and {rotation['rows']} buffers of expert outputs in "
            f"turn ({rotation['token_bytes'] / 2**20:.1f} and {rotation['row_bytes'] / 2**20:.1f} MiB in use, L2 "
            f"{rotation['l2_bytes'] / 2**20:.0f} MiB){hint}; each check of combine: {columns} columns"
        )
    if result["config"]["halves"]:
        yield (
            f"halves (_send, _receive): {result['config']['halves']} sends in a recording, then as many receives in "
            "the next, when all has come; a receive moves nothing over the link"
        )
    yield "one routing per recording, drawn anew; results verified against the reference before and after timing"
    yield "kernels: " + ", ".join(result["stems"])


def titled(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))


def columns(table: Table, names: Sequence[str], left: int = 3) -> None:
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < left else "right", no_wrap=index < left)


def _names(case: Json) -> tuple[str, str, str]:
    return case["op"], str(case["tokens"]), case["routing"]


def figures(values: Sequence[float], digits: int) -> list[str]:
    return [f"{value:,.{digits}f}" for value in values]
