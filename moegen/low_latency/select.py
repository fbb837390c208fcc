# SPDX-License-Identifier: Apache-2.0
"""Problem -> Specs: a pure function of values that all ranks share, driven by the table of `moegen.tuning`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from moegen import tuning
from moegen.codegen.problem import Problem
from moegen.codegen.spec import Spec, WarpGroups
from moegen.collective.row_spec import CollectivePlace, CollectiveReduce, CollectiveReturn, CollectiveSend
from moegen.errors import SpecError
from moegen.formats import BF16, ROWS
from moegen.limits import MAX_BLOCK_WARPS, VECTOR_BYTES, WARP_SIZE, ceil_div
from moegen.low_latency.spec import LowLatencyCombine, LowLatencyDispatch
from moegen.tuning import Choice, Table
from moegen.tuning.blocks import GPU_NUM_WARPS, HOST_NUM_WARPS, HOST_WARP_GROUPS
from moegen.tuning.under_way import LOW_LATENCY_STEPS

Op = TypeVar("Op", LowLatencyDispatch, LowLatencyCombine)

WEIGHTS_OF_VECTOR = VECTOR_BYTES // 4


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


def select_collective(problem: Problem) -> CollectiveSelection:
    """The kernels for `problem`, whose layout is `expert` and whose path is collective.

    Raises:
        SpecError: as `select`.
    """
    routing = (problem.num_topk, problem.num_experts, problem.path)
    by_expert = ("expert", problem.num_ranks, problem.hidden, *routing)
    packed = ("packed", problem.num_ranks, problem.hidden, *routing)
    # K numbers travel as a row of 16-byte vectors, of eight bf16 each.
    columns = VECTOR_BYTES // BF16.element_bytes * ceil_div(problem.num_topk, WEIGHTS_OF_VECTOR)
    weights = ("bf16", "token", problem.num_ranks, columns, *routing)
    warps = dict.fromkeys(GPU_NUM_WARPS, HOST_NUM_WARPS) if problem.on_host else GPU_NUM_WARPS
    sends = warps["quantising" if ROWS[problem.dtype].quantized_here else "dispatch"]
    return CollectiveSelection(
        CollectiveSend(problem.dtype, *by_expert, sends, "whole"),
        CollectivePlace(problem.dtype, *by_expert, warps["dispatch"], "whole"),
        CollectiveSend(*weights, warps["dispatch"], "rows"),
        CollectivePlace(*weights, warps["dispatch"], "rows"),
        CollectiveReturn("bf16", *packed, warps["combine"]),
        CollectiveReduce("bf16", *packed, warps["combine"]),
    )


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
    a thread holds no more than LOW_LATENCY_STEPS.
    """
    vectors = row_bytes // VECTOR_BYTES
    warps = 1
    while (warps < wanted.warps and warps * WARP_SIZE < vectors) or warps * WARP_SIZE * LOW_LATENCY_STEPS < vectors:
        warps *= 2
    return WarpGroups(max(1, min(wanted.groups, MAX_BLOCK_WARPS // warps)), warps)


def row_bytes(hidden: int, dtype: str) -> int:
    """Of a token's elements as they travel; of a dtype that no kernel has, as bf16: the Spec refuses it."""
    return ROWS.get(dtype, BF16).row_bytes(hidden)


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
