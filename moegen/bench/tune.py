# SPDX-License-Identifier: Apache-2.0
"""`moegen bench tune`: what every rank does. Times dispatch and combine with every candidate, each verified once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from statistics import fmean
from typing import Any

import torch

from moegen import tuning
from moegen.bench.barrier import DeviceBarrier
from moegen.bench.case import Case
from moegen.bench.config import LowLatencyConfig
from moegen.bench.inputs import Batch, Buffers
from moegen.bench.link import measure_link
from moegen.bench.ll import nodes_of, seed_of, world_of
from moegen.bench.machine import machine, versions
from moegen.bench.stats import median_of_slowest
from moegen.bench.timing import OpClock, meet
from moegen.compile.target import Target
from moegen.errors import InputError, SpecError
from moegen.expert_parallel import ExpertParallel
from moegen.kernels.bench import BenchBarrier, BenchPull, BenchPush
from moegen.kernels.problem import Problem
from moegen.kernels.spec import WarpGroups
from moegen.runtime.worlds import RankWorld
from moegen.select import fitted, row_bytes, select
from moegen.tuning import Choice

log = logging.getLogger(__name__)

Json = dict[str, Any]

FORMS = {"dispatch": ("dispatch",), "combine": ("combine", "combine_weighted")}
"""Op -> what is timed of it; its figure is the mean, because one choice serves all forms."""

QUANTIZE = {"bf16": "", "fp8": "fp8"}
"""Dtype of dispatch -> the user's word. What comes back is bf16 in any case, so combine is timed with the first."""


@dataclass(frozen=True)
class TuneConfig(LowLatencyConfig):
    """One run. Each number of tokens is a capacity too.

    Attributes:
        dtypes: words of QUANTIZE.
        wires: words of the Spec.
        warp_groups: GROUPSxWARPS, fitted to the row like the table's.
        num_sms: thread blocks at most; 0: as many as are useful.
    """

    dtypes: tuple[str, ...] = tuple(QUANTIZE)
    wires: tuple[str, ...] = tuning.WIRES
    warp_groups: tuple[str, ...] = ("1x4", "1x8", "1x16")
    num_sms: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.routings) != 1:
            raise InputError("a table is made from one routing")
        for name, given, known in (("dtypes", self.dtypes, tuple(QUANTIZE)), ("wires", self.wires, tuning.WIRES)):
            if not given or not set(given) <= set(known):
                raise InputError(f"{name} are of {', '.join(known)}; got {', '.join(given) or 'none'}")
        if not self.warp_groups or not self.num_sms or min(self.num_sms) < 0:
            raise InputError("give at least one of --warp-groups and of --num-sms, which is 0 or more")

    def candidates(self, dtype: str) -> list[Choice]:
        """What is tried, each kernel once; without what has no kernel for this shape.

        Raises:
            InputError: nothing is left.
        """
        length = row_bytes(self.hidden, dtype)
        groups = dict.fromkeys(str(fitted(WarpGroups.parse(word), length)) for word in self.warp_groups)
        tried = [Choice(wire, word, sms or None) for wire in self.wires for word in groups for sms in self.num_sms]
        left = [choice for choice in tried if self._exists(choice, dtype)]
        if not left:
            raise InputError(f"none of these has a kernel for {dtype}: {', '.join(map(str, tried))}")
        return left

    def problem(self, choice: Choice, dtype: str) -> Problem:
        """What an object of this candidate is made for, whatever its capacity."""
        return Problem(
            self.ranks,
            self.num_experts,
            self.num_topk,
            self.hidden,
            max_tokens=1,
            dtype=dtype,
            wire=choice.wire,
            warp_groups=choice.warp_groups,
        )

    @property
    def stems(self) -> list[str]:
        """Every kernel of a run, to be built beforehand."""
        specs = (
            spec
            for dtype in self.dtypes
            for choice in self.candidates(dtype)
            for spec in select(self.problem(choice, dtype)).specs
        )
        sizes = (self.ranks, self.link.threads, self.link.in_flight)
        bench = (BenchBarrier(self.ranks), BenchPush(*sizes), BenchPull(*sizes))
        return list(dict.fromkeys(spec.stem for spec in (*bench, *specs)))

    @property
    def command(self) -> str:
        """The command line that measures the same again."""
        shape = f"--hidden {self.hidden} --experts {self.num_experts} --topk {self.num_topk}"
        return (
            f"moegen bench tune --ranks {self.ranks} --device {self.device} "
            f"--world {'processes' if self.processes else 'local'} --tokens {','.join(map(str, self.tokens))} {shape} "
            f"--routing {','.join(self.routings)} --dtypes {','.join(self.dtypes)} --wires {','.join(self.wires)} "
            f"--warp-groups {','.join(self.warp_groups)} --num-sms {','.join(map(str, self.num_sms))} "
            f"--ops {self.ops} --replays {self.replays} --seed {self.seed}"
        )

    def _exists(self, choice: Choice, dtype: str) -> bool:
        try:
            select(self.problem(choice, dtype))
        except SpecError as error:
            log.info("%s of %s is left out: %s", choice, dtype, error)
            return False
        return True


def measure(world: RankWorld, config: TuneConfig) -> Json:
    """Microseconds of every candidate: the median over replays of the slowest rank's. Collective.

    Raises:
        BenchError: a result was wrong, or memory was allocated where it must not be.
    """
    barrier = DeviceBarrier(world, config.timeout)
    clock = OpClock(world, barrier, config.ops, config.replays)
    link = measure_link(world, barrier, config.link)
    rows = [
        row
        for dtype in config.dtypes
        for tokens in config.tokens
        for row in _capacity(world, config, clock, dtype, tokens)
    ]
    barrier.check()
    meet(world)
    barrier.destroy()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": config.command,
        "arch": _arch(world.device),
        "machine": machine(world.device),
        "versions": versions(),
        "world": world_of(world, config, nodes_of(world)),
        "hidden": config.hidden,
        "link": link,
        "rows": rows,
    }


def _capacity(world: RankWorld, config: TuneConfig, clock: OpClock, dtype: str, tokens: int) -> Iterator[Json]:
    """All candidates with the same inputs and the same routing."""
    config = replace(config, quantize=QUANTIZE[dtype])
    ops = [op for op, dtypes in tuning.DTYPES.items() if dtype in dtypes]
    (routing,) = config.routings
    batch = Batch.draw(world, config, tokens, routing, seed_of(config.seed, tokens, routing))
    buffers = Buffers(world, config, tokens, tokens)
    for choice in config.candidates(dtype):
        for op, us in _candidate(world, config, clock, choice, ops, buffers, batch).items():
            yield {"op": op, "dtype": dtype, "tokens": tokens, "us": us, "choice": _fields(choice)}
        if world.rank == 0:
            log.info("%s, %d tokens, %s: measured", dtype, tokens, choice)


def _candidate(
    world: RankWorld,
    config: TuneConfig,
    clock: OpClock,
    choice: Choice,
    ops: list[str],
    buffers: Buffers,
    batch: Batch,
) -> dict[str, float]:
    with ExpertParallel(
        world,
        num_experts=config.num_experts,
        num_topk=config.num_topk,
        hidden=config.hidden,
        max_tokens_per_rank=buffers.tokens,
        quantize=config.quantize or None,
        wire=choice.wire,
        warp_groups=choice.warp_groups,
        num_sms=choice.num_sms,
        timeout=config.timeout,
    ) as ep:
        ep.warmup()
        meet(world)
        forms = [form for op in ops for form in FORMS[op]]
        times = {form: _time(clock, Case(ep, form, buffers, batch, config.ops)) for form in forms}
        ep.check()
        meet(world)
    answers = world.exchange(times)
    return {op: fmean(median_of_slowest([answer[form] for answer in answers]) for form in FORMS[op]) for op in ops}


def _time(clock: OpClock, case: Case) -> list[float]:
    recording = clock.record(case.steps())
    case.poison()
    recording.replay()
    case.verify()
    times, _ = clock.time(recording)
    return times


def _fields(choice: Choice) -> Json:
    return {"wire": choice.wire, "warp_groups": choice.warp_groups, "num_sms": choice.num_sms}


def _arch(device: torch.device) -> str:
    """Whose table the figures belong to."""
    if device.type != "cuda":
        return "host"
    return Target.for_capability(*torch.cuda.get_device_capability(device)).name
