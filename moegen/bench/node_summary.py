# SPDX-License-Identifier: Apache-2.0
"""The figures of all parts of a run side by side, beside the link's limit, targets and what others published."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moegen.bench.published import SHAPE, Op, published, target
from moegen.bench.stats import gigabytes_per_second

Json = dict[str, Any]


def summary(result: Json) -> list[Json]:
    """One row for each op that was measured.

    Args:
        result: of `moegen.bench.node.measure`, with the parts that there are.

    Returns:
        Rows of `part`, `op`, `layout`, `sent`, `tokens`, `routing`; `us`: the median of the slowest rank; `gbps`: of
        the rank that sends or receives most, unique remote rows; `of_push`: that over the limit measured in the same
        part, None if there is none; `gbps_selections`: all (token, expert) selections of a rank over `us`, as NCCL EP
        and DeepEP state theirs; `target`: {"us" or "share", "met"} or None; `published`: [{"who", "us"}].
    """
    return [
        _row(name, part["result"], case, result["world"])
        for name, part in result["parts"].items()
        if part["result"] and "cases" in part["result"]
        for case in part["result"]["cases"]
    ]


def _row(name: str, of_part: Json, case: Json, world: Json) -> Json:
    config, limit = of_part["config"], of_part["link"]["gbps"]["push"]
    op = Op(
        world["ranks"],
        case.get("layout") or ("expert" if of_part["bench"] == "ll" else "rank"),
        _sent(case, config),
        case["op"],
        case["tokens"],
    )
    us, gbps = case["us"]["p50"], case["gbps"]["busiest"]
    of_push = gbps / limit if limit and case["bytes"]["busiest"] else None
    # What a figure is for: this shape, GPUs of their own, no exchange over collectives.
    compared = (
        case["routing"] == "uniform"
        and world["kind"] == "processes"
        and config.get("path", "ipc") == "ipc"
        and all(config[field] == value for field, value in SHAPE.items())
    )
    return {
        "part": name,
        "op": case["op"],
        "layout": op.layout,
        "sent": op.sent,
        "tokens": case["tokens"],
        "routing": case["routing"],
        "us": us,
        "gbps": gbps,
        "of_push": of_push,
        "gbps_selections": gigabytes_per_second(case["bytes"]["selections"], us),
        "target": _judged(op, us, of_push) if compared else None,
        "published": [{"who": one.who, "us": one.us} for one in published(op)] if compared else [],
    }


def _sent(case: Json, config: Json) -> str:
    """How tokens travelled in the op, or in the layer's dispatch where it is not known of the op alone."""
    sent = case.get("dtype") or config["quantize"] or "bf16"
    return "fp8" if sent.startswith("fp8") else sent


def _judged(op: Op, us: float, of_push: float | None) -> Json | None:
    aim = target(op)
    if aim is None:
        return None
    met = us <= aim.us if aim.us is not None else of_push is not None and aim.share is not None and of_push >= aim.share
    return {key: value for key, value in asdict(aim).items() if key != "of" and value is not None} | {"met": met}
