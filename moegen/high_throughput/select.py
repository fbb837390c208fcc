# SPDX-License-Identifier: Apache-2.0
"""Problem -> Specs of layouts `token` and `packed`: a pure function of values that all ranks share."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.codegen.problem import Problem
from moegen.codegen.row_spec import PHASE_WORDS
from moegen.codegen.spec import Spec
from moegen.collective.row_spec import CollectivePlace, CollectiveReduce, CollectiveReturn, CollectiveSend
from moegen.formats import ROWS
from moegen.high_throughput.layout_spec import HighThroughputLayout
from moegen.high_throughput.spec import HighThroughputCombine, HighThroughputDispatch
from moegen.tuning.blocks import GPU_NUM_WARPS, HOST_NUM_WARPS, LAYOUT_NUM_WARPS


@dataclass(frozen=True)
class RowSelection:
    """The kernels of layouts `token` and `packed`.

    Attributes:
        dispatch: the whole op in one launch; in its phases "plan" and "rows" it is made in two, or by an old plan.
        layout: counts a rank's own routing.
    """

    dispatch: HighThroughputDispatch
    combine: HighThroughputCombine
    layout: HighThroughputLayout

    @property
    def specs(self) -> tuple[HighThroughputDispatch | HighThroughputCombine | HighThroughputLayout, ...]:
        plan, rows = self.dispatch.in_phase("plan"), self.dispatch.in_phase("rows")
        return (self.dispatch, plan, rows, self.combine, self.layout)

    @property
    def whole(self) -> tuple[Spec, ...]:
        """Those of ops that are made at once."""
        return (self.dispatch, self.combine)


@dataclass(frozen=True)
class CollectiveRowSelection:
    """The kernels of layouts `token` and `packed` on path collective, around an all-to-all: those that fill chunks, and
    those that read them.

    Attributes:
        dispatch, place: of dispatch, for the whole op; their phases as in `RowSelection`.
        combine, reduce: of combine.
    """

    dispatch: CollectiveSend
    place: CollectivePlace
    combine: CollectiveReturn
    reduce: CollectiveReduce
    layout: HighThroughputLayout

    @property
    def specs(self) -> tuple[Spec, ...]:
        phases = [op.in_phase(phase) for op in (self.dispatch, self.place) for phase in PHASE_WORDS]
        return (*phases, self.combine, self.reduce, self.layout)

    @property
    def whole(self) -> tuple[Spec, ...]:
        """Those of ops that are made at once."""
        return (self.dispatch, self.place, self.combine, self.reduce)


def select_rows(problem: Problem) -> RowSelection | CollectiveRowSelection:
    """The kernels for `problem`, whose layout is `token` or `packed`.

    Raises:
        SpecError: as `select`.
    """
    shape = (problem.layout, problem.num_ranks, problem.hidden, problem.num_topk, problem.num_experts, problem.path)
    rows = "borrowed" if problem.borrowed else "placed"
    warps = dict.fromkeys(GPU_NUM_WARPS, HOST_NUM_WARPS) if problem.on_host else GPU_NUM_WARPS
    sends = warps["quantising" if ROWS[problem.dtype].quantized_here else "dispatch"]
    counts = layout_spec(problem.num_ranks, problem.num_topk, problem.num_experts, on_host=problem.on_host)
    if problem.path == "collective":
        return CollectiveRowSelection(
            CollectiveSend(problem.dtype, *shape, sends, "whole", rows=rows),
            CollectivePlace(problem.dtype, *shape, warps["dispatch"], "whole"),
            CollectiveReturn("bf16", *shape, warps["combine"]),
            CollectiveReduce("bf16", *shape, warps["combine"]),
            counts,
        )
    return RowSelection(
        HighThroughputDispatch(problem.dtype, *shape, sends, "whole", rows=rows),
        HighThroughputCombine("bf16", *shape, warps["combine"]),
        counts,
    )


def layout_spec(num_ranks: int, num_topk: int, num_experts: int, *, on_host: bool) -> HighThroughputLayout:
    """The kernel that counts a routing.

    Raises:
        SpecError: as `select`.
    """
    return HighThroughputLayout(num_ranks, num_topk, num_experts, HOST_NUM_WARPS if on_host else LAYOUT_NUM_WARPS)
