# SPDX-License-Identifier: Apache-2.0
"""Problem -> Specs: a pure function of values that all ranks share, driven by the table of `moegen.tuning`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from moegen import tuning
from moegen.errors import SpecError
from moegen.kernels.a2a import OneSidedCombine, OneSidedDispatch
from moegen.kernels.a2a_payloads import RowBytes
from moegen.kernels.coll import CollectiveOpen, CollectivePack, CollectiveSum
from moegen.kernels.coll_rows import CollectivePlace, CollectiveReduce, CollectiveReturn, CollectiveSend
from moegen.kernels.ht import FORMATS, PHASE_WORDS, HighThroughputCombine, HighThroughputDispatch
from moegen.kernels.ht_layout import HighThroughputLayout
from moegen.kernels.ll import LowLatencyCombine, LowLatencyDispatch, ceil_div
from moegen.kernels.problem import Problem
from moegen.kernels.spec import DTYPE_BYTES, MAX_BLOCK_WARPS, WARP_SIZE, Spec, WarpGroups
from moegen.tuning import Choice, Table

Op = TypeVar("Op", LowLatencyDispatch, LowLatencyCombine)

HOST_WARP_GROUPS = WarpGroups(2, 1)
"""On a CPU more threads only add switches between fibers; two teams keep several rows per block under test."""

VECTOR_BYTES = 16
WEIGHTS_OF_VECTOR = 4

MOST_STEPS = 8
"""Vectors of a row that a thread holds in registers."""


@dataclass(frozen=True)
class Selection:
    """The kernels that serve a Problem: combine either with the weights of dispatch or with its own.

    Attributes:
        dispatch, combine, combine_with_weights: the whole op in one launch.
        hooks: whether the ops may also be launched in two halves.
        dispatch_sms, combine_sms: thread blocks per launch at most; None: as many as are useful.
    """

    dispatch: LowLatencyDispatch
    combine: LowLatencyCombine
    combine_with_weights: LowLatencyCombine
    hooks: bool = False
    dispatch_sms: int | None = None
    combine_sms: int | None = None

    @property
    def specs(self) -> tuple[LowLatencyDispatch | LowLatencyCombine, ...]:
        """Every kernel that a call may need, each once."""
        whole = (self.dispatch, self.combine, self.combine_with_weights)
        if not self.hooks:
            return whole
        sends = tuple(spec.in_phase("send") for spec in whole)
        # Receiving a combine has nothing to do with where its weights came from.
        receives = tuple(spec.in_phase("receive") for spec in whole[:2])
        return (*whole, *sends, *receives)


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


@dataclass(frozen=True)
class CollectiveSelection:
    """The kernels of layout `expert` on path collective, around an all-to-all.

    Attributes:
        dispatch, place: of dispatch.
        send_weights, place_weights: bring the weights of a combine to where the rows are.
        combine, reduce: of combine; whose rows an expert's are, they take from what place has left.
    """

    dispatch: CollectiveSend
    place: CollectivePlace
    send_weights: CollectiveSend
    place_weights: CollectivePlace
    combine: CollectiveReturn
    reduce: CollectiveReduce

    @property
    def specs(self) -> tuple[Spec, ...]:
        """Every kernel that a call may need."""
        weights = (self.send_weights, self.place_weights)
        return (self.dispatch, self.place, *weights, self.combine, self.reduce)


HOST_NUM_WARPS = 2
GPU_NUM_WARPS = {"dispatch": 32, "quantising": 16, "combine": 16}
"""Of a block, one to a multiprocessor. Threads that hold sums, or what they quantise, need more registers than 32 warps
leave them: with 32, dispatch that quantises spilled 304 bytes and took 148 us in place of 134 (bench/results).
"""


LAYOUT_NUM_WARPS = 8
"""A token is one load and a few votes: small blocks come and go."""


def select_rows(problem: Problem) -> RowSelection | CollectiveRowSelection:
    """The kernels for `problem`, whose layout is `token` or `packed`.

    Raises:
        SpecError: as `select`.
    """
    shape = (problem.layout, problem.num_ranks, problem.hidden, problem.num_topk, problem.num_experts, problem.path)
    rows = "borrowed" if problem.borrowed else "placed"
    warps = dict.fromkeys(GPU_NUM_WARPS, HOST_NUM_WARPS) if problem.on_host else GPU_NUM_WARPS
    sends = warps["quantising" if FORMATS[problem.dtype].quantised_here else "dispatch"]
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


def select_collective(problem: Problem) -> CollectiveSelection:
    """The kernels for `problem`, whose layout is `expert` and whose path is collective.

    Raises:
        SpecError: as `select`.
    """
    routing = (problem.num_topk, problem.num_experts, problem.path)
    by_expert = ("expert", problem.num_ranks, problem.hidden, *routing)
    packed = ("packed", problem.num_ranks, problem.hidden, *routing)
    # K numbers travel as a row of 16-byte vectors, of eight bf16 each.
    weights = ("bf16", "token", problem.num_ranks, 8 * ceil_div(problem.num_topk, WEIGHTS_OF_VECTOR), *routing)
    warps = dict.fromkeys(GPU_NUM_WARPS, HOST_NUM_WARPS) if problem.on_host else GPU_NUM_WARPS
    sends = warps["quantising" if FORMATS[problem.dtype].quantised_here else "dispatch"]
    return CollectiveSelection(
        CollectiveSend(problem.dtype, *by_expert, sends, "whole"),
        CollectivePlace(problem.dtype, *by_expert, warps["dispatch"], "whole"),
        CollectiveSend(*weights, warps["dispatch"], "rows"),
        CollectivePlace(*weights, warps["dispatch"], "rows"),
        CollectiveReturn("bf16", *packed, warps["combine"]),
        CollectiveReduce("bf16", *packed, warps["combine"]),
    )


def layout_spec(num_ranks: int, num_topk: int, num_experts: int, *, on_host: bool) -> HighThroughputLayout:
    """The kernel that counts a routing.

    Raises:
        SpecError: as `select`.
    """
    return HighThroughputLayout(num_ranks, num_topk, num_experts, HOST_NUM_WARPS if on_host else LAYOUT_NUM_WARPS)


def select(problem: Problem, table: Table | None = None) -> Selection:
    """The kernels for `problem`.

    Args:
        table: what is fastest; None: the package's.

    Raises:
        SpecError: a value is outside of what the kernels can be rendered for; the text says what is allowed.
    """
    table = table or tuning.table()
    sends, returns = choice(problem, "dispatch", table), choice(problem, "combine", table)
    return Selection(
        _make(LowLatencyDispatch, problem, sends),
        _make(LowLatencyCombine, problem, returns, weights="atdispatch"),
        _make(LowLatencyCombine, problem, returns, weights="atcombine"),
        problem.hooks,
        None if problem.on_host else sends.num_sms,
        None if problem.on_host else returns.num_sms,
    )


def choice(problem: Problem, op: str, table: Table) -> Choice:
    """The table's best among the wires that may be used. Dispatch and combine have receive buffers of their own, so
    each has its own wire.
    """
    dtype = problem.dtype if op == "dispatch" else "bf16"
    ranked = table.ranked(op, problem.path, dtype, row_bytes(problem.hidden, dtype), problem.max_tokens)
    usable = wires(problem)
    return next((one for one in ranked if one.wire in usable), replace(ranked[0], wire=usable[0]))


def wires(problem: Problem) -> tuple[str, ...]:
    """The wires that this problem's target has, or the one that the user chose."""
    return tuning.WIRES if problem.wire == "auto" else (problem.wire,)


def warp_groups(problem: Problem, chosen: Choice, dtype: str) -> WarpGroups:
    """The teams of a block."""
    if problem.warp_groups is not None:
        return WarpGroups.parse(problem.warp_groups)
    if problem.on_host:
        return HOST_WARP_GROUPS
    return fitted(WarpGroups.parse(chosen.warp_groups), row_bytes(problem.hidden, dtype))


def fitted(wanted: WarpGroups, row_bytes: int) -> WarpGroups:
    """Teams for rows of another length: no more warps than a row has warps' worth of 16-byte vectors, and enough that
    a thread holds no more than MOST_STEPS.
    """
    vectors = row_bytes // VECTOR_BYTES
    warps = 1
    while (warps < wanted.warps and warps * WARP_SIZE < vectors) or warps * WARP_SIZE * MOST_STEPS < vectors:
        warps *= 2
    return WarpGroups(max(1, min(wanted.groups, MAX_BLOCK_WARPS // warps)), warps)


def row_bytes(hidden: int, dtype: str) -> int:
    """Of a token's elements as they travel; of a dtype that no kernel has, as bf16: the Spec refuses it."""
    return hidden * DTYPE_BYTES.get(dtype, 2)


def _make(cls: type[Op], problem: Problem, chosen: Choice, **more: str) -> Op:
    dtype = problem.dtype if cls is LowLatencyDispatch else "bf16"
    fields: dict[str, Any] = {
        "dtype": dtype,
        "layout": problem.layout,
        "num_ranks": problem.num_ranks,
        "hidden": problem.hidden,
        "num_topk": problem.num_topk,
        "num_experts": problem.num_experts,
        "path": problem.path,
        "warp_groups": warp_groups(problem, chosen, dtype),
        "wire": chosen.wire,
        "phase": "whole",
        "peers": "masked" if problem.masked else "required",
        **more,
    }
    try:
        return cls(**fields)
    except SpecError:
        one_team = replace(fields["warp_groups"], groups=1)
        if problem.warp_groups is not None or fields["warp_groups"] == one_team:
            raise
        # Teams have shared memory each, and what the table's shape had room for another may not.
        return cls(**fields | {"warp_groups": one_team})


@dataclass(frozen=True)
class OneSidedSelection:
    """Kernels of layout `rank`: those that one object loads together."""

    specs: tuple[Spec, ...]


ONE_SIDED_GROUPS = (
    (32, WarpGroups(1, 14)),
    (256, WarpGroups(1, 7)),
    (1024, WarpGroups(2, 7)),
    (None, WarpGroups(4, 4)),
)
"""Teams by capacity, for 7168 elements between two H200 (bench/results): as many warps as there are to spare move a
row; 14 and 7 of them divide it.
"""
PULLED_GROUPS = ((256, WarpGroups(1, 14)), (1024, WarpGroups(2, 7)), (None, WarpGroups(4, 4)))
"""The same for combine that reads rows where they are: it has more loads under way with more warps."""


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
    """The kernel that adds rows of `dtype` up to results of `out`, words of `moegen.kernels.a2a`.

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
    return CollectiveOpen(problem.num_ranks, "collective", WarpGroups(1, 1) if problem.on_host else WarpGroups(1, 8))


def _one_sided_groups(
    problem: Problem, by_capacity: Sequence[tuple[int | None, WarpGroups]] = ONE_SIDED_GROUPS
) -> WarpGroups:
    if problem.warp_groups is not None:
        return WarpGroups.parse(problem.warp_groups)
    if problem.on_host:
        return HOST_WARP_GROUPS
    return next(groups for limit, groups in by_capacity if limit is None or problem.max_tokens <= limit)
