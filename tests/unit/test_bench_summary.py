# SPDX-License-Identifier: Apache-2.0
"""The summary of a suite: percent of the link's limit, targets, and what others published beside what was measured."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from moegen.bench import node_report
from moegen.bench.node_summary import summary
from moegen.bench.published import PUBLISHED, SHAPE, TARGETS

LIMIT = 400.0


def case(op: str, us: float, **more: Any) -> dict[str, Any]:
    sizes = {"busiest": 100e6, "selections": 200e6}
    return {
        "op": op,
        "tokens": 128,
        "routing": "uniform",
        "us": {"p50": us},
        "gbps": {"busiest": sizes["busiest"] / us / 1e3},
        "bytes": sizes,
        **more,
    }


def part(bench: str, *cases: dict[str, Any], **config: Any) -> dict[str, Any]:
    result = {
        "bench": bench,
        "config": {**SHAPE, "quantize": "", **config},
        "link": {"gbps": {"push": LIMIT}},
        "cases": list(cases),
    }
    return {"seconds": 1.0, "errors": [], "result": result}


def rows(ranks: int = 8, kind: str = "processes", **parts: dict[str, Any]) -> list[dict[str, Any]]:
    kernels = {"seconds": 1.0, "errors": [], "result": {"kernels": 3, "origins": {"cache": 3}}}
    failed = {"seconds": 1.0, "errors": ["rank 1: no"], "result": None}
    world = {"ranks": ranks, "kind": kind}
    return summary({"world": world, "parts": {"kernels": kernels, "failed": failed, **parts}})


def test_percent_of_the_link_and_both_bandwidths() -> None:
    (row,) = rows(ll=part("ll", case("dispatch", 500.0)))
    assert (row["part"], row["op"], row["layout"], row["sent"], row["us"]) == (
        "ll",
        "dispatch",
        "expert",
        "bf16",
        500.0,
    )
    assert row["gbps"] == pytest.approx(200.0) and row["of_push"] == pytest.approx(0.5)
    assert row["gbps_selections"] == pytest.approx(400.0)


def test_nothing_over_the_link_is_no_share_of_it() -> None:
    nothing = case("dispatch_receive", 5.0, bytes={"busiest": 0.0, "selections": 1e6})
    (row,) = rows(ll=part("ll", nothing))
    assert row["of_push"] is None


def test_published_figures_and_targets_stand_beside_their_op() -> None:
    bf16, fp8 = part("ll", case("dispatch", 60.0)), part("ll", case("pair", 54.0), case("pair", 56.0), quantize="fp8")
    dispatch, met, missed = rows(ll=bf16, ll_fp8=fp8)
    assert dispatch["published"] == [{"who": "NCCL EP, H100", "us": 65.0}] and dispatch["target"] is None
    assert met["target"] == {"us": 55.0, "met": True} and missed["target"] == {"us": 55.0, "met": False}


def test_a_share_of_the_link_as_target() -> None:
    many = {"tokens": 4096, "layout": "token", "dtype": "fp8_given"}
    fast, slow = rows(ht=part("ht", case("dispatch", 270.0, **many), case("dispatch", 280.0, **many)))
    assert fast["sent"] == "fp8" and fast["published"] == [{"who": "UCCL-EP, H200", "us": 500.0}]
    assert fast["target"] == {"share": 0.9, "met": True} and slow["target"] == {"share": 0.9, "met": False}
    assert node_report.target_words(slow["target"]) == "90% of push: missed"


@pytest.mark.parametrize(
    "other",
    [
        {"ranks": 4},
        {"kind": "virtual"},
        {"ll": part("ll", case("dispatch", 60.0, routing="zipf"))},
        {"ll": part("ll", case("dispatch", 60.0), hidden=4096)},
        {"ll": part("ll", case("dispatch", 60.0, tokens=512))},
        {"ll": part("coll", case("dispatch", 60.0), path="collective")},
    ],
)
def test_no_figure_stands_beside_what_it_was_not_measured_for(other: dict[str, Any]) -> None:
    (row,) = rows(**{"ll": part("ll", case("dispatch", 60.0)), **other})
    assert row["published"] == [] and row["target"] is None


def test_every_figure_is_reached_by_some_part() -> None:
    family = {"expert": "ll", "token": "ht", "packed": "ht", "rank": "a2a"}
    for figure in (*PUBLISHED, *TARGETS):
        op = figure.of
        more = {"layout": op.layout, "dtype": op.sent} if family[op.layout] == "ht" else {}
        measured = case(op.op, 50.0, tokens=op.tokens, **more)
        quantize = op.sent if op.layout == "expert" and op.sent == "fp8" else ""
        (row,) = rows(op.ranks, part=part(family[op.layout], measured, quantize=quantize))
        assert row["published"] or row["target"], figure


def test_the_table_says_it_all() -> None:
    parts = {
        "ll": part("ll", case("dispatch", 60.0)),
        "ht": {"seconds": 2.5, "errors": ["rank 3: lost"], "result": None},
    }
    link = {"what": "link", "bytes_per_rank": 1 << 20, "blocks": 1, "threads": 2}
    link |= {"gbps": {"push": LIMIT}, "gbps_aggregate": {"push": 8 * LIMIT}, "gbps_of_ranks": {"push": [LIMIT] * 8}}
    parts["ll"]["result"]["link"] = link
    result = {
        "bench": "node",
        "date": "2026-11-26",
        "command": "moegen bench --suite node",
        "machine": {"name": "GPU", "gpus": 8, "cpu": "CPU", "cores": 4},
        "versions": {"moegen": "0"},
        "world": {"ranks": 8, "kind": "processes", "description": "8 processes", "timing": "graphs", "notes": []},
        "parts": parts,
        "seconds": 9.0,
        "estimate_seconds": 8.0,
    }
    result["summary"] = summary(result)
    stream = io.StringIO()
    for shown in node_report.overview(result):
        Console(file=stream, width=180).print(shown)
    text = stream.getvalue()
    for word in ("60.0", "65 (NCCL EP, H100)", "all together: push 3,200.0", "estimated 8", "FAILED ht: rank 3: lost"):
        assert word in text, word
