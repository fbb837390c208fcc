# SPDX-License-Identifier: Apache-2.0
"""The kernels that are committed under `generated/` and built ahead of time: few, those that readers look for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moegen.errors import InputError
from moegen.kernels.presets import preset
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec
from moegen.select import INLINE_MAX_TOKENS, select

MAX_CATALOG = 50

DEFAULT_CAPACITIES = (INLINE_MAX_TOKENS, INLINE_MAX_TOKENS + 1)
"""One capacity of each wire format: a Spec depends on the capacity through the wire format alone."""

_CATALOG_PRESETS = (("deepseek-v3", (2, 4, 8)), ("gpt-oss-120b", (4,)), ("tiny", (4,)))


def preset_specs(preset_name: str, ranks: Sequence[int], family: str | None = None, target: str = "sm90") -> list[Spec]:
    """Every kernel that a preset may launch with these numbers of ranks, on one target.

    Raises:
        InputError: no such preset or family.
        SpecError: a number of ranks that the preset cannot be split over.
    """
    if family not in (None, "ll"):
        raise InputError(f"no family {family!r}; there is: ll")
    return list(dict.fromkeys(_preset_specs(preset_name, ranks, on_host=target == "host")))


def catalog() -> list[Spec]:
    """The committed set, in a fixed order, at most MAX_CATALOG."""
    specs: dict[Spec, None] = {}
    for name, ranks in _CATALOG_PRESETS:
        specs.update(dict.fromkeys(_preset_specs(name, ranks, on_host=False)))
    specs.update(dict.fromkeys(_preset_specs("tiny", (4,), on_host=True)))
    if len(specs) > MAX_CATALOG:
        raise AssertionError(f"{len(specs)} kernels are too many to read; the catalog holds at most {MAX_CATALOG}")
    return list(specs)


def _preset_specs(name: str, ranks: Sequence[int], *, on_host: bool) -> Iterator[Spec]:
    layer = preset(name)
    for num_ranks in ranks:
        for capacity in DEFAULT_CAPACITIES:
            problem = Problem(num_ranks, layer.num_experts, layer.num_topk, layer.hidden, capacity, on_host=on_host)
            yield from select(problem).specs
