# SPDX-License-Identifier: Apache-2.0
"""The kernels that are committed under `generated/` and built ahead of time: few, those that readers look for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moegen.errors import InputError
from moegen.kernels.presets import preset
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec
from moegen.select import INLINE_MAX_TOKENS, MOST_WARPS, select

MAX_CATALOG = 50

_CATALOG = (
    ("deepseek-v3", (2, 4, 8), (32, 128, 1024)),
    ("gpt-oss-120b", (4,), (32, 128)),
    ("tiny", (4,), (32, 128)),
)
"""Preset, numbers of ranks, capacities."""


def preset_specs(preset_name: str, ranks: Sequence[int], family: str | None = None, target: str = "sm90") -> list[Spec]:
    """Every kernel that a preset may launch with these numbers of ranks, on one target.

    Raises:
        InputError: no such preset or family.
        SpecError: a number of ranks that the preset cannot be split over.
    """
    if family not in (None, "ll"):
        raise InputError(f"no family {family!r}; there is: ll")
    on_host = target == "host"
    specs = (spec for r in ranks for spec in _specs(preset_name, r, all_capacities(r), on_host=on_host))
    return list(dict.fromkeys(specs))


def all_capacities(num_ranks: int) -> list[int]:
    """Capacities, one at least on each side of every limit at which `select` changes its mind."""
    limits = [INLINE_MAX_TOKENS, *(rows // num_ranks for rows, _ in MOST_WARPS[:-1])]
    return sorted({capacity for limit in limits for capacity in (limit, limit + 1) if capacity > 0})


def catalog() -> list[Spec]:
    """The committed set, in a fixed order, at most MAX_CATALOG."""
    specs: dict[Spec, None] = {}
    for name, ranks, capacities in _CATALOG:
        for num_ranks in ranks:
            specs.update(dict.fromkeys(_specs(name, num_ranks, capacities, on_host=False)))
    specs.update(dict.fromkeys(_specs("tiny", 4, (32, 128), on_host=True)))
    if len(specs) > MAX_CATALOG:
        raise AssertionError(f"{len(specs)} kernels are too many to read; the catalog holds at most {MAX_CATALOG}")
    return list(specs)


def _specs(name: str, num_ranks: int, capacities: Sequence[int], *, on_host: bool) -> Iterator[Spec]:
    layer = preset(name)
    for capacity in capacities:
        problem = Problem(num_ranks, layer.num_experts, layer.num_topk, layer.hidden, capacity, on_host=on_host)
        yield from select(problem).specs
