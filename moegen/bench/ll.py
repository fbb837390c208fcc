# SPDX-License-Identifier: Apache-2.0
"""`moegen bench ll`: what every rank does. The result is plain data, ready for JSON, the same on every rank."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from moegen.bench.barrier import DeviceBarrier
from moegen.bench.case import OPS, Case, TimedCase
from moegen.bench.config import LowLatencyConfig
from moegen.bench.eager import measure_eager
from moegen.bench.halves import HALVES, HalvesCase
from moegen.bench.inputs import Batch, Buffers
from moegen.bench.link import measure_link
from moegen.bench.machine import machine, versions
from moegen.bench.stats import gigabytes_per_second, over_ranks, quantile, quantiles, slowest
from moegen.bench.timing import OpClock, meet, record, time_replays
from moegen.bench.traffic import bandwidths, byte_summary, matrices, traffic_of
from moegen.expert_parallel import ExpertParallel
from moegen.runtime.worlds import RankWorld
from moegen.select import Selection

log = logging.getLogger(__name__)

SCHEMA = 1
"""Number of the layout of the JSON."""

Json = dict[str, Any]


def measure(world: RankWorld, config: LowLatencyConfig) -> Json:
    """Runs everything that `config` asks for. Collective.

    Raises:
        BenchError: a result was wrong, or memory was allocated where it must not be.
    """
    nodes = nodes_of(world)
    barrier = DeviceBarrier(world, config.timeout)
    clocks = _clocks(world, barrier, config)
    link = measure_link(world, barrier, config.link)
    cases: list[Json] = []
    eager: list[Json] = []
    for tokens in config.tokens:
        for row in _measure_tokens(world, config, clocks, tokens, nodes):
            (eager if row["op"] == "eager" else cases).append(row)
            if world.rank == 0:
                log.info("%s, %d tokens, %s: measured", row["op"], tokens, row["routing"])
    barrier.check()
    meet(world)
    barrier.destroy()
    return {
        "bench": "ll",
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


def _clocks(world: RankWorld, barrier: DeviceBarrier, config: LowLatencyConfig) -> tuple[OpClock, OpClock | None]:
    """Of ops, and of halves if these are to be timed: a recording of theirs holds fewer."""
    clock = OpClock(world, barrier, config.ops, config.replays)
    return clock, OpClock(world, barrier, config.halves, config.replays) if config.halves else None


def _measure_tokens(
    world: RankWorld,
    config: LowLatencyConfig,
    clocks: tuple[OpClock, OpClock | None],
    tokens: int,
    nodes: list[int],
) -> Iterator[Json]:
    clock, halves_clock = clocks
    max_tokens = config.max_tokens or tokens
    with ExpertParallel(
        world,
        num_experts=config.num_experts,
        num_topk=config.num_topk,
        hidden=config.hidden,
        max_tokens_per_rank=max_tokens,
        quantize=config.quantize or None,
        slots=max(config.halves, 1),
        timeout=config.timeout,
    ) as ep:
        ep.warmup()
        buffers = Buffers(world, config, tokens, max_tokens)
        meet(world)
        for routing in config.routings:
            about = {
                "tokens": tokens,
                "max_tokens": max_tokens,
                "routing": routing,
                "rotation": asdict(buffers.rotation) | {"note": buffers.rotation.note},
            }
            cases: dict[str, Case] = {}
            for op in OPS:
                batch = Batch.draw(world, config, tokens, routing, seed_of(config.seed, tokens, routing, op))
                cases[op] = Case(ep, op, buffers, batch, config.ops)
                timed = time_case(world, config, clock, cases[op])
                yield row_of(world, config, cases[op], op, batch, timed, nodes) | about | _stems(ep, op)
            if halves_clock is not None:
                for op in HALVES:
                    seed = seed_of(config.seed, tokens, routing, op, "halves")
                    batch = Batch.draw(world, config, tokens, routing, seed)
                    halves = HalvesCase(ep, op, buffers, batch, config.halves)
                    for half, timed in _time_halves(halves_clock, halves).items():
                        yield row_of(world, config, halves, half, batch, timed, nodes) | about | _stems(ep, half)
            mine = measure_eager(world, cases["pair"], cases["combine"], config.calls)
            ep.check()
            answers = world.exchange(mine)
            yield {"op": "eager", "tokens": tokens, "routing": routing, "ranks": answers, "calls": config.calls} | {
                name: over_ranks([answer[name] for answer in answers]) for name in mine
            }
        meet(world)


def time_case(world: RankWorld, config: LowLatencyConfig, clock: OpClock, case: TimedCase) -> tuple[list[float], float]:
    """An op's microseconds per replay, and the barrier's that were taken off; verified before and after."""
    steps = case.steps()
    paired = case.op.startswith("pair")
    recording = record(world, steps) if paired else clock.record(steps)
    case.poison()
    recording.replay()
    case.verify()
    case.poison()
    if paired:
        timed = [us / len(steps) for us in time_replays(world, recording, config.replays)], 0.0
    else:
        timed = clock.time(recording)
    case.verify()
    return timed


def _time_halves(clock: OpClock, case: HalvesCase) -> dict[str, tuple[list[float], float]]:
    """The same for the halves of an op, by name. Receives follow in a recording of their own, behind a barrier, so
    everything has come before the first of them starts.
    """
    recordings = clock.record(case.sends()), clock.record(case.receives())
    case.poison()
    for recording in recordings:
        recording.replay()
    case.verify()
    case.poison()
    times, barrier_us = clock.time_in_turn(recordings)
    case.verify()
    return {name: (own, barrier_us) for name, own in zip(HALVES[case.op], times, strict=True) if name}


def row_of(
    world: RankWorld,
    config: LowLatencyConfig,
    case: TimedCase,
    op: str,
    batch: Batch,
    timed: tuple[list[float], float],
    nodes: list[int],
) -> Json:
    """The figures of one recording, from all ranks' times."""
    answers = world.exchange((*timed, case.error_share))
    times = [answer[0] for answer in answers]
    moved = matrices(batch.ids, config.num_experts)
    traffic = traffic_of(op, moved, config.dispatch_row_bytes, config.combine_row_bytes, nodes)
    medians = [quantile(own, 0.5) for own in times]
    over = over_ranks(medians)
    return {
        "op": op,
        "us": quantiles(slowest(times)),
        "us_over_ranks": over,
        "barrier_us": over_ranks([answer[1] for answer in answers]),
        "gbps": bandwidths(traffic, over),
        "bytes": byte_summary(traffic),
        "ranks": [
            {"rank": rank, "us": quantiles(times[rank]), "send": asdict(own.send), "receive": asdict(own.receive)}
            | {"send_gbps": gigabytes_per_second(own.send.unique_remote, medians[rank])}
            | {"receive_gbps": gigabytes_per_second(own.receive.unique_remote, medians[rank])}
            for rank, own in enumerate(traffic)
        ],
        "verified": {
            "before_and_after": True,
            "combine_columns": 0 if case.op == "dispatch" else case.columns,
            "worst_error_over_bound": max(answer[2] for answer in answers),
        },
    }


def _stems(ep: ExpertParallel, op: str) -> Json:
    """The kernels of an op or a half."""
    chosen = ep.selection
    assert isinstance(chosen, Selection)  # of path ipc, which is measured here
    whole, _, phase = op.rpartition("_") if op.endswith(("_send", "_receive")) else (op, "", "whole")
    specs = {
        "dispatch": (chosen.dispatch,),
        "combine": (chosen.combine,),
        "combine_weighted": (chosen.combine_with_weights,),
        "pair": (chosen.dispatch, chosen.combine),
    }[whole]
    return {"stems": [spec.in_phase(phase).stem for spec in specs]}


def seed_of(*parts: object) -> int:
    """The same number in every process and every run."""
    return zlib.crc32(repr(parts).encode())


def nodes_of(world: RankWorld) -> list[int]:
    """For each rank, the number of its node."""
    names = world.exchange(os.uname().nodename)
    return [names.index(name) for name in names]


def world_of(world: RankWorld, config: LowLatencyConfig, nodes: list[int]) -> Json:
    gpu = world.device.type == "cuda"
    notes = []
    if config.virtual and gpu:
        notes.append("virtual ranks on one GPU: not a link measurement")
    if not gpu:
        notes.append("CPU host target: correctness, not speed")
    return {
        "kind": "virtual" if config.virtual else "processes",
        "ranks": world.size,
        "ranks_per_device": world.ranks_per_device,
        "nodes": len(set(nodes)),
        "description": world.description,
        "notes": notes,
        "timing": "graphs between events" if gpu else "eager, by the host's clock",
    }
