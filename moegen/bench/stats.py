# SPDX-License-Identifier: Apache-2.0
"""From times to the figures that are printed. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, interpolated linearly between the two nearest values."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90 and p99."""
    return {name: quantile(values, q) for name, q in QUANTILES.items()}


def slowest(per_rank: Sequence[Sequence[float]]) -> list[float]:
    """For each replay, the time of the rank that took longest."""
    return [max(times) for times in zip(*per_rank, strict=True)]


def over_ranks(values: Sequence[float]) -> dict[str, float]:
    """min, avg and max."""
    return {"min": min(values), "avg": sum(values) / len(values), "max": max(values)}


def gigabytes_per_second(num_bytes: float, microseconds: float) -> float:
    """10**9 bytes per second; 0 if there is no time that could be measured."""
    return num_bytes / microseconds / 1e3 if microseconds > 0 else 0.0


def median_of_slowest(per_rank: Sequence[Sequence[float]]) -> float:
    """The median over replays of the time of the rank that took longest."""
    return quantile(slowest(per_rank), 0.5)
