# SPDX-License-Identifier: Apache-2.0
"""`moegen bench a2a`: what every rank does. The result is plain data, ready for JSON, the same on every rank; its
tables are those of `ll`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from moegen.bench.a2a_case import Inputs, OneSidedCase
from moegen.bench.a2a_config import OneSidedConfig
from moegen.bench.barrier import DeviceBarrier
from moegen.bench.eager import measure_eager
from moegen.bench.exchange import measure_calls, padding
from moegen.bench.inputs import Batch
from moegen.bench.link import measure_link
from moegen.bench.ll import SCHEMA, nodes_of, row_of, seed_of, time_case, world_of
from moegen.bench.machine import machine, versions
from moegen.bench.stats import over_ranks
from moegen.bench.timing import OpClock, meet
from moegen.one_sided import OneSided
from moegen.runtime.worlds import RankWorld

log = logging.getLogger(__name__)

Json = dict[str, Any]


def measure(world: RankWorld, config: OneSidedConfig) -> Json:
    """Runs everything that `config` asks for. Collective.

    Raises:
        BenchError: a result was wrong, or memory was allocated where it must not be.
    """
    nodes = nodes_of(world)
    barrier = DeviceBarrier(world, config.timeout)
    clock = OpClock(world, barrier, config.ops, config.replays)
    link = measure_link(world, barrier, config.link)
    cases: list[Json] = []
    eager: list[Json] = []
    for tokens in config.tokens:
        for row in _measure_tokens(world, config, clock, tokens, nodes):
            (eager if row["op"].startswith("eager") else cases).append(row)
            if world.rank == 0:
                log.info("%s, %d tokens, %s: measured", row["op"], tokens, row["routing"])
    barrier.check()
    meet(world)
    barrier.destroy()
    return {
        "bench": "coll" if config.path == "collective" else "a2a",
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": config.command,
        "machine": machine(world.device),
        "versions": versions(),
        "world": world_of(world, config, nodes),
        "config": asdict(config),
        "stems": sorted({*link["stems"], barrier.spec.stem, *(stem for case in cases for stem in case["stems"])}),
        "link": link,
        "cases": cases,
        "eager": eager,
    }


def _measure_tokens(
    world: RankWorld, config: OneSidedConfig, clock: OpClock, tokens: int, nodes: list[int]
) -> Iterator[Json]:
    with ExitStack() as stack:
        exchanges = ("padded", *(config.exchanges if config.path == "collective" else ()))
        layers = {each: stack.enter_context(_layer(world, config, tokens, each)) for each in dict.fromkeys(exchanges)}
        layer = layers["padded"]
        inputs = Inputs(world, config, tokens)
        meet(world)
        for routing in config.routings:
            about = {
                "tokens": tokens,
                "max_tokens": tokens,
                "routing": routing,
                "rotation": asdict(inputs.rotation) | {"note": inputs.rotation.note},
                "stems": sorted(spec.stem for spec in layer.specs),
            }
            made: dict[str, OneSidedCase] = {}
            for op in config.ops_timed:
                seed = seed_of(config.seed, tokens, routing, op.removesuffix("_of_exchanges"))
                batch = Batch.draw(world, config, tokens, routing, seed)
                made[op] = OneSidedCase(layer, config, op, inputs, batch)
                timed = time_case(world, config, clock, made[op])
                row = row_of(world, config, made[op], op, batch, timed, nodes) | about
                if op == "pair" and config.path == "collective":
                    row["padding"] = padding(layer.problem, config, tokens, row["bytes"]["unique_remote"])
                yield row
            called = {"tokens": tokens, "routing": routing, "calls": config.calls}
            if config.path == "collective":
                batch = Batch.draw(world, config, tokens, routing, seed_of(config.seed, tokens, routing, "eager"))
                for exchange in config.exchanges:
                    case = OneSidedCase(layers[exchange], config, "pair", inputs, batch)
                    yield {"op": f"eager_{exchange}"} | called | measure_calls(world, case, config)
                continue
            mine = measure_eager(world, made["pair"], made["combine"], config.calls)
            layer.check()
            answers = world.exchange(mine)
            yield (
                {"op": "eager", "ranks": answers}
                | called
                | {name: over_ranks([answer[name] for answer in answers]) for name in mine}
            )
        meet(world)


def _layer(world: RankWorld, config: OneSidedConfig, tokens: int, exchange: str) -> OneSided:
    return OneSided(
        world,
        num_experts=config.num_experts,
        num_topk=config.num_topk,
        max_tokens_per_rank=tokens,
        payload_bytes=config.dispatch_row_bytes,
        hidden=config.hidden,
        payloads=config.payloads,
        expert_rows=config.path == "ipc",
        path=config.path,
        exchange=exchange,
        timeout=config.timeout,
    )
