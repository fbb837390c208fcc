# SPDX-License-Identifier: Apache-2.0
"""Problem -> Specs of layout `rank`: a pure function of values that all ranks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moegen.codegen.problem import Problem
from moegen.codegen.spec import Spec, WarpGroups
from moegen.one_sided.payload_table import RowBytes
from moegen.one_sided.spec import OneSidedCombine, OneSidedDispatch
from moegen.one_sided.spec_collective import CollectiveOpen, CollectivePack, CollectiveSum
from moegen.tuning.blocks import (
    HOST_OPEN_WARP_GROUPS,
    HOST_WARP_GROUPS,
    ONE_SIDED_GROUPS,
    OPEN_WARP_GROUPS,
    PULLED_GROUPS,
)


@dataclass(frozen=True)
class OneSidedSelection:
    """Kernels of layout `rank`: those that one object loads together."""

    specs: tuple[Spec, ...]


def dispatch_spec(problem: Problem, widths: tuple[int, ...]) -> OneSidedDispatch:
    """The kernel that moves payloads of so many bytes per token; on path collective, into the chunks to be exchanged.

    Raises:
        SpecError: as `select`.
    """
    shape = (problem.num_ranks, problem.num_topk, problem.num_experts, problem.path)
    groups = _one_sided_groups(problem)
    if problem.path == "collective":
        return CollectivePack(RowBytes(widths), *shape, groups)
    return OneSidedDispatch(RowBytes(widths), *shape, groups, copy="bulk" if problem.copy == "bulk" else "vec")


def combine_spec(problem: Problem, dtype: str, out: str, *, pulls: bool = False) -> OneSidedCombine:
    """The kernel that adds rows of `dtype` up to results of `out`, words of `moegen.formats`' SUMMANDS and RESULTS.

    Args:
        pulls: rows are read where the other ranks have them; else they are sent.

    Raises:
        SpecError: as `select`.
    """
    destinations = min(problem.num_ranks, problem.num_topk)
    shape = (problem.num_ranks, problem.hidden, destinations, problem.path)
    if problem.path == "collective":
        return CollectiveSum(dtype, out, *shape, _one_sided_groups(problem))
    groups = _one_sided_groups(problem, PULLED_GROUPS if pulls else ONE_SIDED_GROUPS)
    return OneSidedCombine(dtype, out, *shape, groups, rows="pulled" if pulls else "pushed")


def open_spec(problem: Problem) -> CollectiveOpen:
    """The kernel that reads the headers of exchanged chunks."""
    return CollectiveOpen(
        problem.num_ranks, "collective", HOST_OPEN_WARP_GROUPS if problem.on_host else OPEN_WARP_GROUPS
    )


def _one_sided_groups(
    problem: Problem, by_capacity: Sequence[tuple[int | None, WarpGroups]] = ONE_SIDED_GROUPS
) -> WarpGroups:
    if problem.warp_groups is not None:
        return WarpGroups.parse(problem.warp_groups)
    if problem.on_host:
        return HOST_WARP_GROUPS
    return next(groups for limit, groups in by_capacity if limit is None or problem.max_tokens <= limit)
