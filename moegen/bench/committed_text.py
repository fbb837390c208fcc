# SPDX-License-Identifier: Apache-2.0
"""Committed results of which only the printed text was kept: summaries of a suite, and sweeps of `ll`."""

from __future__ import annotations

import ast
import re
from typing import Any

from moegen.errors import InputError

Json = dict[str, Any]

_SUMMARY = re.compile(
    r"(?P<part>ll|ll_fp8|ht|a2a) +(?P<op>\w+) +(?P<layout>\w+) +(?P<dtype>bf16|fp8) +(?P<routing>\w+) +"
    r"(?P<tokens>\d+) +(?P<us>[\d,.]+) +(?P<gbps>[\d,.]+) +(?P<share>\d+)% .*"
)
"""As `moegen.bench.node_report` prints a row."""
_SWEEP = re.compile(r"(?P<op>combine|dispatch) (?P<variant>.*?) +(?P<dtype>bf16|fp8) +(?P<us>\{.*\})")
"""An op, what was varied, and microseconds by tokens per rank; uniform routing."""
_COUNTS = {"one": 1, "two": 2, "four": 4, "eight": 8}
_MACHINE = re.compile(r"(?:\b(one|two|four|eight) )?(NVIDIA H\d00)(?:.*?GPUs: (\d+))?", re.IGNORECASE)


def parse(text: str, part: str, section: str) -> Json:
    """What the tables need of a result: `cases`, `machine`, `date`, and `link` if the text has it.

    Args:
        part: of a suite, whose cases alone are wanted; empty: all.
        section: the line above the rows; empty: the first rows.

    Raises:
        InputError: there are none.
    """
    lines = [line.strip() for line in text.splitlines()]
    below = lines[lines.index(section) + 1 :] if section in lines else lines if not section else []
    cases: list[Json] = []
    for line in below:
        rows = _cases(line)
        if cases and not rows:
            break
        cases += rows
    if not cases:
        raise InputError(f"the text must have rows of figures below {section!r}; it has none")
    return {"cases": [case for case in cases if not part or case.get("part") == part], **_origin(text)}


def _cases(line: str) -> list[Json]:
    if row := _SUMMARY.fullmatch(line):
        return [
            {
                **row.groupdict(),
                "tokens": int(row["tokens"]),
                "us": {"p50": _number(row["us"])},
                "gbps": {"busiest": _number(row["gbps"])},
                "share": int(row["share"]) / 100,
            }
        ]
    if row := _SWEEP.fullmatch(line):
        by_tokens: dict[int, float] = ast.literal_eval(row["us"])
        names = {"op": row["op"], "variant": row["variant"], "dtype": row["dtype"], "routing": "uniform"}
        return [{**names, "tokens": tokens, "us": {"p50": us}} for tokens, us in by_tokens.items()]
    return []


def _origin(text: str) -> Json:
    machine, date = _MACHINE.search(text), re.search(r"\d{4}-\d\d-\d\d", text)
    if machine is None or date is None:
        raise InputError("the text must say on which GPUs and when it was measured")
    gpus = int(machine[3]) if machine[3] else _COUNTS[(machine[1] or "one").lower()]
    push = re.search(r"direction: push ([\d,.]+),", text)
    return {
        "machine": {"name": machine[2], "gpus": gpus},
        "date": date[0],
        **({"link": {"gbps": {"push": _number(push[1])}}} if push else {}),
    }


def _number(text: str) -> float:
    return float(text.replace(",", ""))
