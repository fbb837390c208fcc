# SPDX-License-Identifier: Apache-2.0
"""The kernels that are committed under `generated/` and built ahead of time: few, those that readers look for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moegen import tuning
from moegen.errors import InputError
from moegen.kernels.coll import for_exact
from moegen.kernels.ht import LAYOUTS
from moegen.kernels.ll import MAX_TOKENS_PER_RANK
from moegen.kernels.presets import preset
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec
from moegen.select import (
    ONE_SIDED_GROUPS,
    CollectiveRowSelection,
    RowSelection,
    combine_spec,
    dispatch_spec,
    open_spec,
    select,
    select_rows,
)

MAX_CATALOG = 50

_CATALOG: tuple[tuple[str, int, dict[str, Any], tuple[int, ...]], ...] = (
    ("deepseek-v3", 2, {}, (128,)),
    ("deepseek-v3", 8, {}, (32, 128)),
    ("deepseek-v3", 8, {"dtype": "fp8", "hooks": True}, (128,)),
    ("deepseek-v3", 8, {"dtype": "fp8ue8m0"}, (64,)),
    ("deepseek-v3", 8, {"masked": True}, (64,)),
    ("gpt-oss-120b", 4, {}, (128,)),
    ("tiny", 4, {"on_host": True}, (32,)),
)
"""Preset, number of ranks, what else the Problem says, capacities."""

_ROWS_CATALOG: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("deepseek-v3", 8, {"layout": "token"}),
    ("deepseek-v3", 8, {"layout": "packed", "dtype": "e4m3"}),
    ("tiny", 4, {"layout": "packed", "on_host": True}),
    ("deepseek-v3", 8, {"layout": "packed", "path": "collective"}),
)
"""The same of layouts `token` and `packed`, whose kernels do not depend on the capacity. Of the first line, all; of the
others, the whole ops.
"""

_PAYLOADS = (2, 4, 4)
"""Of the one-sided kernels that are built beforehand: bytes of hidden's elements, of ids and of weights."""

FAMILIES = ("ll", "ht", "a2a", "coll")


def preset_specs(preset_name: str, ranks: Sequence[int], family: str | None = None, target: str = "sm90") -> list[Spec]:
    """Every kernel that a preset may launch with these numbers of ranks, on one target.

    Raises:
        InputError: no such preset or family.
        SpecError: a number of ranks that the preset cannot be split over.
    """
    if family not in (None, *FAMILIES):
        raise InputError(f"no family {family!r}; there are: {', '.join(FAMILIES)}")
    on_host = target == "host"
    specs: dict[Spec, None] = {}
    for r in ranks:
        if family in (None, "ll"):
            specs.update(dict.fromkeys(_specs(preset_name, r, all_capacities(), on_host=on_host)))
        if family in (None, "a2a"):
            specs.update(dict.fromkeys(_one_sided(preset_name, r, all_one_sided_capacities(), on_host=on_host)))
        if family in (None, "coll"):
            capacities = all_one_sided_capacities()
            for first in _one_sided(preset_name, r, capacities, on_host=on_host, path="collective"):
                specs.update(dict.fromkeys((first, *for_exact(first))))
            for layout in LAYOUTS:
                rows = _rows(preset_name, r, layout=layout, on_host=on_host, path="collective")
                specs.update(dict.fromkeys(rows.specs))
        if family in (None, "ht"):
            for layout in LAYOUTS:
                specs.update(dict.fromkeys(_rows(preset_name, r, layout=layout, on_host=on_host).specs))
    return list(specs)


def all_one_sided_capacities() -> list[int]:
    """The same of layout `rank`."""
    return [limit or MAX_TOKENS_PER_RANK for limit, _ in ONE_SIDED_GROUPS]


def all_capacities() -> list[int]:
    """Capacities, one on each side of every limit at which `select` changes its mind."""
    return [limit + more for limit in tuning.table().limits for more in (0, 1)]


def catalog() -> list[Spec]:
    """The committed set, in a fixed order, at most MAX_CATALOG."""
    specs: dict[Spec, None] = {}
    for name, num_ranks, options, capacities in _CATALOG:
        specs.update(dict.fromkeys(_specs(name, num_ranks, capacities, **options)))
    for number, (name, num_ranks, options) in enumerate(_ROWS_CATALOG):
        selection = _rows(name, num_ranks, **options)
        specs.update(dict.fromkeys(selection.specs if number == 0 else selection.whole))
    specs.update(dict.fromkeys(_one_sided("deepseek-v3", 8, (128,))))
    pack, *others = _one_sided("deepseek-v3", 8, (128,), path="collective")
    specs.update(dict.fromkeys((pack, for_exact(pack)[-1], *others)))
    specs.update(dict.fromkeys(_one_sided("tiny", 4, (128,), on_host=True)))
    if len(specs) > MAX_CATALOG:
        raise AssertionError(f"{len(specs)} kernels are too many to read; the catalog holds at most {MAX_CATALOG}")
    return list(specs)


def _specs(name: str, num_ranks: int, capacities: Sequence[int], **options: Any) -> Iterator[Spec]:
    layer = preset(name)
    for capacity in capacities:
        problem = Problem(num_ranks, layer.num_experts, layer.num_topk, layer.hidden, capacity, **options)
        yield from select(problem).specs


def _one_sided(name: str, num_ranks: int, capacities: Sequence[int], **options: Any) -> Iterator[Spec]:
    """Dispatch of tokens, ids and weights, and combine: from any memory and in place, or what path collective has."""
    layer = preset(name)
    element, id_bytes, weight_bytes = _PAYLOADS
    widths = (element * layer.hidden, id_bytes * layer.num_topk, weight_bytes * layer.num_topk)
    for capacity in capacities:
        problem = Problem(
            num_ranks, layer.num_experts, layer.num_topk, layer.hidden, capacity, layout="rank", **options
        )
        yield dispatch_spec(problem, widths)
        both = (False,) if problem.path == "collective" else (False, True)
        yield from (combine_spec(problem, "bf16", "bf16", pulls=pulls) for pulls in both)
        if problem.path == "collective":
            yield open_spec(problem)


def _rows(name: str, num_ranks: int, **options: Any) -> RowSelection | CollectiveRowSelection:
    layer = preset(name)
    problem = Problem(num_ranks, layer.num_experts, layer.num_topk, layer.hidden, max_tokens=1, **options)
    return select_rows(problem)
