# SPDX-License-Identifier: Apache-2.0
"""`moegen bench ht`: what every rank does. The result is plain data, ready for JSON, the same on every rank."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from moegen.bench.barrier import DeviceBarrier
from moegen.bench.ht_case import Inputs, RowsCase
from moegen.bench.ht_config import OPS, HighThroughputConfig
from moegen.bench.inputs import Batch
from moegen.bench.link import measure_link
from moegen.bench.ll import nodes_of, seed_of, world_of
from moegen.bench.machine import machine, versions
from moegen.bench.stats import over_ranks, quantile, quantiles, slowest
from moegen.bench.timing import OpClock, meet
from moegen.bench.traffic import bandwidths, byte_summary, matrices, traffic_of
from moegen.high_throughput import HighThroughput
from moegen.runtime.worlds import RankWorld

log = logging.getLogger(__name__)

SCHEMA = 1
"""Number of the layout of the JSON."""

Json = dict[str, Any]


def measure(world: RankWorld, config: HighThroughputConfig) -> Json:
    """Runs everything that `config` asks for. Collective.

    Raises:
        BenchError: a result was wrong, or memory was allocated where it must not be.
    """
    barrier = DeviceBarrier(world, config.timeout)
    clock = OpClock(world, barrier, config.ops, config.replays)
    link = measure_link(world, barrier, config.link)
    cases: list[Json] = []
    for tokens in config.tokens:
        for dtype in config.dtypes:
            inputs = Inputs(world, config, tokens, dtype)
            for layout in config.layouts:
                for case in _measure_layout(world, config, clock, inputs, dtype, layout):
                    cases.append(case)
                    if world.rank == 0:
                        log.info("%s: %.1f us", _words(case), case["us_over_ranks"]["max"])
    barrier.check()
    meet(world)
    barrier.destroy()
    nodes = nodes_of(world)
    return {
        "bench": "ht",
        "schema": SCHEMA,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": config.command,
        "machine": machine(world.device),
        "versions": versions(),
        "world": world_of(world, config, nodes),
        "config": asdict(config),
        "stems": sorted({*link["stems"], barrier.spec.stem, *(stem for case in cases for stem in case["stems"])}),
        "link": link,
        "cases": [case for case in cases if case["op"] != "exact"],
        "exact": [case for case in cases if case["op"] == "exact"],
    }


def _words(case: Json) -> str:
    return " ".join(f"{name}={case[name]}" for name in ("op", "tokens", "dtype", "layout", "num_sms", "routing"))


def _measure_layout(
    world: RankWorld, config: HighThroughputConfig, clock: OpClock, inputs: Inputs, dtype: str, layout: str
) -> Iterator[Json]:
    first = inputs.tokens == config.tokens[0]
    for num_sms in config.num_sms if first else (0,):
        options: dict[str, Any] = {
            "num_experts": config.num_experts,
            "num_topk": config.num_topk,
            "hidden": config.hidden,
            "max_tokens_per_rank": inputs.tokens,
            "layout": layout,
            "alignment": config.alignment if layout == "packed" else 1,
            "num_sms": num_sms or None,
            "timeout": config.timeout,
            **config.options(dtype),
        }
        about = {"tokens": inputs.tokens, "dtype": dtype, "layout": layout, "num_sms": num_sms}
        with HighThroughput(world, **options) as layer:
            layer.warmup()
            meet(world)
            for routing in config.routings if not num_sms else config.routings[:1]:
                for op in OPS if dtype == "bf16" else OPS[:2]:
                    seed = seed_of(config.seed, inputs.tokens, routing, op)
                    batch = Batch.draw(world, config, inputs.tokens, routing, seed)
                    case = RowsCase(layer, config, op, inputs, batch)
                    yield about | {"routing": routing} | _time(world, config, clock, case, batch, dtype)
            meet(world)
        if not num_sms:
            with HighThroughput(world, mode="exact", **options) as layer:
                layer.warmup()
                routing = config.routings[0]
                batch = Batch.draw(world, config, inputs.tokens, routing, seed_of(config.seed, inputs.tokens, routing))
                yield about | {"op": "exact", "routing": routing} | _time_exact(world, config, layer, inputs, batch)


def _time(
    world: RankWorld, config: HighThroughputConfig, clock: OpClock, case: RowsCase, batch: Batch, dtype: str
) -> Json:
    """The figures of one recording, from all ranks' times; verified before and after."""
    recording = clock.record(case.steps())
    case.poison()
    recording.replay()
    case.verify()
    case.poison()
    times, barrier_us = clock.time(recording)
    case.verify()
    answers = world.exchange((times, barrier_us, case.worst))
    medians = [quantile(answer[0], 0.5) for answer in answers]
    over = over_ranks(medians)
    op = "combine" if case.op == "combine" else "dispatch"
    traffic = traffic_of(op, matrices(batch.ids, config.num_experts), config.moved_bytes(dtype), config.row_bytes,
        nodes_of(world))  # fmt: skip
    return {
        "op": case.op,
        "us": quantiles(slowest([answer[0] for answer in answers])),
        "us_over_ranks": over,
        "barrier_us": over_ranks([answer[1] for answer in answers]),
        "gbps": bandwidths(traffic, over),
        "bytes": byte_summary(traffic),
        "ranks": [
            {"rank": rank, "us": quantiles(answer[0]), "send": asdict(own.send), "receive": asdict(own.receive)}
            for rank, (answer, own) in enumerate(zip(answers, traffic, strict=True))
        ],
        "verified": {"before_and_after": True, "worst_error_over_bound": max(answer[2] for answer in answers)},
        "stems": [case.stem],
    }


def _time_exact(
    world: RankWorld, config: HighThroughputConfig, layer: HighThroughput, inputs: Inputs, batch: Batch
) -> Json:
    """Mode exact, called from Python: the whole call until its rows are there, and until the host knows the counts."""
    whole, host = [], []
    for number in range(config.calls + 2):
        meet(world)
        start = time.perf_counter()
        layer.dispatch(inputs.x[number % inputs.count], batch.own_ids, batch.own_weights)
        host.append((time.perf_counter() - start) * 1e6)
        layer.synchronize()
        whole.append((time.perf_counter() - start) * 1e6)
    answers = world.exchange((quantile(whole[2:], 0.5), quantile(host[2:], 0.5)))
    return {
        "us_over_ranks": over_ranks([answer[0] for answer in answers]),
        "host_us_over_ranks": over_ranks([answer[1] for answer in answers]),
        "stems": [layer.selection.dispatch.in_phase(phase).stem for phase in ("plan", "rows")],
    }
