# SPDX-License-Identifier: Apache-2.0
"""A result of `moegen bench ht` as tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from moegen.bench.report import columns, figures, head, link_line, titled

Json = dict[str, Any]


def parts(result: Json) -> Iterator[RenderableType]:
    yield "\n".join(head(result, ", ".join(result["config"]["dtypes"])))
    yield _ranks(result["cases"])
    yield _exact(result["exact"])
    yield _times(result)
    yield link_line(result["link"])
    yield (
        "mode capacity, everything that a user waits for; results verified before and after timing\n"
        "kernels: " + ", ".join(result["stems"])
    )


def _times(result: Json) -> Table:
    limit = result["link"]["gbps"]["push"]
    table = titled("time of an op: quantiles of the slowest rank; bandwidth of unique remote rows")
    columns(table, ("op", "layout", "tokens sent as", "routing"), left=4)
    columns(table, ("tokens", "blocks", "p50 us", "p90", "p99", "avg", "MB remote", "GB/s avg", "busiest"), left=0)
    columns(table, ("of push", "err/bound"), left=0)
    for case in result["cases"]:
        us, gbps = case["us"], case["gbps"]
        exact = case["op"] != "combine"
        table.add_row(
            *_names(case),
            str(case["tokens"]),
            str(case["num_sms"] or "all"),
            *figures([us["p50"], us["p90"], us["p99"], case["us_over_ranks"]["avg"]], 1),
            *figures([case["bytes"]["unique_remote"] / 1e6, gbps["from_avg"], gbps["busiest"]], 1),
            f"{gbps['busiest'] / limit:.0%}" if limit else "-",
            "exact" if exact else f"{case['verified']['worst_error_over_bound']:.2f}",
        )
    return table


def _ranks(cases: list[Json]) -> Table:
    table = titled("per rank: unique remote rows, and what stays here too")
    columns(table, ("op", "layout", "tokens sent as", "routing"), left=4)
    columns(table, ("tokens", "blocks", "rank", "p50 us", "sends MB", "with self", "selections", "receives MB"), left=0)
    for case in cases:
        for rank in case["ranks"]:
            names = ("unique_remote", "unique_with_self", "selections")
            moved = [rank["send"][name] / 1e6 for name in names] + [rank["receive"]["unique_remote"] / 1e6]
            table.add_row(
                *_names(case),
                str(case["tokens"]),
                str(case["num_sms"] or "all"),
                str(rank["rank"]),
                *figures([rank["us"]["p50"], *moved], 1),
            )
    return table


def _exact(rows: list[Json]) -> Table:
    table = titled("mode exact, called from Python: until the rows are there, and until the call returns")
    columns(table, ("op", "layout", "tokens sent as", "routing"), left=4)
    columns(table, ("tokens", "whole us, avg of ranks", "host us"), left=0)
    for row in rows:
        times = [row["us_over_ranks"]["avg"], row["host_us_over_ranks"]["avg"]]
        table.add_row(*_names(row), str(row["tokens"]), *figures(times, 1))
    return table


def _names(case: Json) -> tuple[str, str, str, str]:
    sent = "bf16" if case["op"] == "combine" else case["dtype"]
    return case["op"], case["layout"], sent, case["routing"]
