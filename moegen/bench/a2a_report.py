# SPDX-License-Identifier: Apache-2.0
"""A result of `moegen bench a2a` as tables: those of `ll`, and on path collective padding and stages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from moegen.bench.report import columns, figures, tables, titled

Json = dict[str, Any]


def parts(result: Json) -> Iterator[RenderableType]:
    if result["bench"] == "coll":
        yield _padding(result["cases"])
        yield _stages(result["eager"])
    yield from tables(result)


def _padding(cases: list[Json]) -> Table:
    """The aim is a pair within 1.25 times the raw exchanges and 20 us."""
    table = titled(
        "a padded pair: MB that a rank sends to the others, on average; beside two raw all-to-alls of what is needed"
    )
    columns(table, ("tokens", "routing"), left=2)
    columns(table, ("sent", "needed", "padding", "of sent", "expected padding", "auto takes"), left=0)
    columns(table, ("pair p50 us", "raw p50 us", "pair - 1.25 raw"), left=0)
    pairs, raw = ([case for case in cases if case["op"] == op] for op in ("pair", "pair_of_exchanges"))
    for case, exchanges in zip(pairs, raw, strict=True):
        sizes, us, raw_us = case["padding"], case["us"]["p50"], exchanges["us"]["p50"]
        table.add_row(
            str(case["tokens"]),
            case["routing"],
            *figures([sizes[name] / 1e6 for name in ("padded", "needed", "wasted")], 3),
            f"{sizes['wasted'] / sizes['padded']:.0%}" if sizes["padded"] else "-",
            *figures([sizes["expected_waste"] / 1e6], 3),
            "exact" if sizes["takes_exact"] else "padded",
            *figures([us, raw_us, us - 1.25 * raw_us], 1),
        )
    return table


def _stages(rows: list[Json]) -> Table:
    """A column for each stage of any call."""
    names = list(dict.fromkeys(name for row in rows for name in row["stages_us"]))
    names.sort(key=lambda name: name.startswith("combine"))
    table = titled("stages of calls from Python, microseconds on the device, average over ranks")
    columns(table, ("", "tokens", "routing", *(name.replace("_", " ") for name in names)))
    for row in rows:
        stages = row["stages_us"]
        cells = (figures([stages[name]["avg"]], 1)[0] if name in stages else "-" for name in names)
        table.add_row(row["op"], str(row["tokens"]), row["routing"], *cells)
    return table
