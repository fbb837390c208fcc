# SPDX-License-Identifier: Apache-2.0
"""`moegen bench --suite node`: what every rank does. Families follow each other in the same processes; what one of them
found is kept when another fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from moegen.bench import report
from moegen.bench.ll import nodes_of, world_of
from moegen.bench.machine import machine, versions
from moegen.bench.node_config import NodeConfig
from moegen.bench.node_summary import summary
from moegen.bench.part_world import PartWorld, run_part
from moegen.codegen.render import render
from moegen.compile import binary
from moegen.compile.target import Target
from moegen.runtime.worlds import RankWorld

SCHEMA = 1
"""Number of the layout of the JSON."""

LAYER = ("preset", "hidden", "num_experts", "num_topk", "quantize", "routings", "seed")
"""What of a configuration is common to the parts; they keep the rest beside their results."""

Json = dict[str, Any]


def measure(world: RankWorld, config: NodeConfig) -> Json:
    """Runs every part, whatever becomes of the others, and keeps the JSON after each. Collective.

    Returns:
        `parts`: by name, {"seconds", "errors": one text per rank that failed, "result": the family's, or None};
        `summary`: see `moegen.bench.node_summary`; `complete`: whether all parts were run and none failed.
    """
    start = time.monotonic()
    result: Json = {
        "bench": "node",
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": config.command,
        "machine": machine(world.device),
        "versions": versions(),
        "world": world_of(world, config.base, nodes_of(world)),
        "config": {name: getattr(config.base, name) for name in LAYER},
        "estimate_seconds": config.estimate_seconds,
        "parts": {},
    }
    steps: dict[str, Callable[[PartWorld], Json | None]] = {"kernels": lambda within: prepare(within, config)}
    for part in config.parts:
        steps[part.name] = lambda within, part=part: part.measure(within, part.config)  # type: ignore[misc]
    for name, step in steps.items():
        result["parts"][name] = run_part(world, name, step)
        done = len(result["parts"]) == len(steps)
        result["seconds"] = time.monotonic() - start
        result["complete"] = done and not any(part["errors"] for part in result["parts"].values())
        result["summary"] = summary(result)
        if world.rank == 0:
            report.save_json(result, Path(config.folder))
    return result


def prepare(world: RankWorld, config: NodeConfig) -> Json:
    """Compiles, on rank 0 by as many processes as there are cores, what no pack and no cache has. Collective."""
    counts: dict[str, int] = {}
    if world.rank == 0:
        made = binary.obtain_many([render(spec) for spec in config.specs], _target(world.device))
        origins = [each.origin for each in made]
        counts = {origin: origins.count(origin) for origin in sorted(set(origins))}
    found: Json = {"kernels": len(config.specs), "origins": counts}
    return dict(world.exchange(found)[0])


def _target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target("host")
    return Target.for_capability(*torch.cuda.get_device_capability(device))
