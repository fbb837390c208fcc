# SPDX-License-Identifier: Apache-2.0
"""A result of `moegen bench --suite node` as tables: the summary first, then each part's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from moegen.bench import ht_report, report

Json = dict[str, Any]


def parts(result: Json) -> Iterator[RenderableType]:
    """Everything, for a file."""
    yield from overview(result)
    for name, part in result["parts"].items():
        if part["result"] and "cases" in part["result"]:
            yield f"---- {name} ----"
            tables = ht_report.parts if part["result"]["bench"] == "ht" else report.tables
            yield from tables(part["result"])


def overview(result: Json) -> Iterator[RenderableType]:
    """What a terminal shows."""
    yield "\n".join([*report.origin(result), result["command"]])
    yield _summary(result["summary"])
    yield _parts(result)
    links = [part["result"]["link"] for part in result["parts"].values() if part["result"] and "link" in part["result"]]
    yield from map(report.link_line, links[:1])
    yield from (f"FAILED {name}: {error}" for name, part in result["parts"].items() for error in part["errors"])


def _summary(rows: list[Json]) -> Table:
    table = report.titled(
        "medians of the slowest rank; GB/s of unique remote rows, of the rank that sends or receives most, and its "
        "share of the link's limit; GB/s of all (token, expert) selections, as others count"
    )
    report.columns(table, ("part", "op", "layout", "tokens sent as", "routing"), left=5)
    report.columns(table, ("tokens", "us", "GB/s", "of push", "selections GB/s", "target", "published, us"), left=0)
    for row in rows:
        table.add_row(
            *(row[name] for name in ("part", "op", "layout", "sent", "routing")),
            str(row["tokens"]),
            *report.figures([row["us"], row["gbps"]], 1),
            "-" if row["of_push"] is None else f"{row['of_push']:.0%}",
            *report.figures([row["gbps_selections"]], 1),
            target_words(row["target"]),
            "; ".join(f"{one['us']:g} ({one['who']})" for one in row["published"]) or "-",
        )
    return table


def target_words(target: Json | None) -> str:
    """As "55 us: met" or "90% of push: missed"; "-" where nothing is aimed at."""
    if target is None:
        return "-"
    aim = f"{target['us']:g} us" if "us" in target else f"{target['share']:.0%} of push"
    return f"{aim}: {'met' if target['met'] else 'missed'}"


def _parts(result: Json) -> Table:
    table = report.titled("seconds that the parts took")
    report.columns(table, ("part", "outcome", "seconds"), left=2)
    for name, part in result["parts"].items():
        done = _origins(part["result"]) if name == "kernels" and part["result"] else "done"
        table.add_row(name, "failed" if part["errors"] else done, f"{part['seconds']:.1f}")
    estimate = result["estimate_seconds"]
    table.add_row("all", "" if estimate is None else f"estimated {estimate:.0f}", f"{result['seconds']:.1f}")
    return table


def _origins(kernels: Json) -> str:
    return ", ".join(f"{count} from {origin}" for origin, count in kernels["origins"].items()).replace(
        "from compiled", "compiled"
    )
