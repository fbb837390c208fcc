# SPDX-License-Identifier: Apache-2.0
"""Calls from Python, one by one: what the host spends on each, and how long they take with the host included."""

from __future__ import annotations

import time
from statistics import median

import torch

from moegen.bench.case import CallableCase
from moegen.bench.timing import Step, meet, synchronize
from moegen.runtime.worlds import RankWorld

_LOOPS = 5
_WARMUP_CALLS = 3


def measure_eager(world: RankWorld, pair: CallableCase, combine: CallableCase, calls: int) -> dict[str, float]:
    """Microseconds per call on this rank: medians of a few loops. Collective.

    Returns:
        `pair_us`: of a dispatch and a combine, from the first call until the device is done, over the calls.
        `dispatch_host_us`, `combine_host_us`: until the call returns (on a CPU the kernel has run by then).
        `small_op_us`: the same of one `x.add_(1)` on a tensor of 16 numbers.
        `dispatch_in_small_ops`, `combine_in_small_ops`: the ratio.
    """
    small = torch.zeros(16, dtype=torch.float32, device=world.device)
    small_op_us, _ = _loops(world, lambda: small.add_(1), calls)
    dispatch_us, _ = _loops(world, lambda: pair.dispatch(0), calls)
    combine_us, _ = _loops(world, lambda: combine.combine(0), calls)
    _, pair_us = _loops(world, lambda: pair.pair(0), calls)
    return {
        "pair_us": pair_us,
        "dispatch_host_us": dispatch_us,
        "combine_host_us": combine_us,
        "small_op_us": small_op_us,
        "dispatch_in_small_ops": dispatch_us / small_op_us,
        "combine_in_small_ops": combine_us / small_op_us,
    }


def _loops(world: RankWorld, step: Step, calls: int) -> tuple[float, float]:
    """Microseconds per call until it returns, and until the device is done."""
    for _ in range(_WARMUP_CALLS):
        step()
    host, total = [], []
    for _ in range(_LOOPS):
        meet(world)
        started = time.perf_counter()
        for _ in range(calls):
            step()
        returned = time.perf_counter()
        synchronize(world)
        done = time.perf_counter()
        host.append((returned - started) * 1e6 / calls)
        total.append((done - started) * 1e6 / calls)
    meet(world)
    return median(host), median(total)
