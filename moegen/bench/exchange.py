# SPDX-License-Identifier: Apache-2.0
"""Path collective: what padding costs in bytes, and how long the stages of calls from Python take."""

from __future__ import annotations

from statistics import median
from typing import Any

from moegen.bench.a2a_case import OneSidedCase
from moegen.bench.a2a_config import OneSidedConfig
from moegen.bench.eager import measure_eager
from moegen.bench.stats import over_ranks
from moegen.bench.timing import meet
from moegen.kernels.coll import chunk_planes
from moegen.kernels.problem import Problem
from moegen.runtime.worlds import RankWorld
from moegen.tuning.exchange import ExchangeRule

Json = dict[str, Any]


def padding(problem: Problem, config: OneSidedConfig, slots: int, needed: float) -> Json:
    """Bytes that a rank sends to the others in a padded dispatch and its combine.

    Args:
        slots: rows that a source may send to a rank.
        needed: bytes of rows that the routing needs, a rank's average.

    Returns:
        `padded`: all that is sent, headers included.
        `needed`, and what is `wasted`.
        `expected_waste`: by the rule of `exchange="auto"`, and whether that `takes_exact`.
    """
    padded = (config.ranks - 1) * (chunk_planes(config.payload_widths, slots, 0)[-1] + slots * config.row_bytes)
    rule, row_bytes = ExchangeRule(problem, "auto"), config.dispatch_row_bytes + config.row_bytes
    return {
        "padded": padded,
        "needed": needed,
        "wasted": padded - needed,
        "expected_waste": rule.padding_bytes(slots, row_bytes),
        "takes_exact": rule.is_exact(slots, row_bytes),
    }


def measure_calls(world: RankWorld, case: OneSidedCase, config: OneSidedConfig) -> Json:
    """Of pairs called one by one: `measure_eager`'s figures, and each stage's microseconds, the median of the calls,
    over ranks. Verified before and after. Collective.
    """
    _verify(world, case)
    eager = measure_eager(world, case, case, config.calls)
    stages = case.time_stages(config.calls)
    _verify(world, case)
    answers = world.exchange((eager, {name: median(seconds) * 1e6 for name, seconds in stages.items()}))
    return {
        "ranks": [own for own, _ in answers],
        **{name: over_ranks([own[name] for own, _ in answers]) for name in eager},
        "stages_us": {name: over_ranks([own[name] for _, own in answers]) for name in answers[0][1]},
    }


def _verify(world: RankWorld, case: OneSidedCase) -> None:
    case.poison()
    for step in case.steps():
        step()
    meet(world)
    case.verify()
