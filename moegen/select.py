# SPDX-License-Identifier: Apache-2.0
"""Problem -> Specs: a pure function of values that all ranks share, driven by the tables below."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moegen.kernels.ll import LowLatencyCombine, LowLatencyDispatch
from moegen.kernels.problem import Problem
from moegen.kernels.spec import DTYPE_BYTES, WARP_SIZE, WarpGroups

INLINE_MAX_TOKENS = 64
"""Up to this capacity rows carry their epoch in every 16 bytes; above it they have a tag. A pair of 64 tokens of 7168
took 22.3 us inline and 25.1 with tags, one of 128 tokens 35.6 and 34.6 (two H100, one team of 8 warps)."""

HOST_WARP_GROUPS = WarpGroups(2, 1)
"""On a CPU more threads only add switches between fibers; two teams keep several rows per block under test."""

VECTOR_BYTES = 16

MOST_STEPS = 8
"""Vectors of a row that a thread holds in registers."""

WARPS_OF_FEW, WARPS_OF_MANY = 16, 8
FEW_TOKENS = {"dispatch": 32, "combine": 64}
"""Warps that move a row, at most: WARPS_OF_FEW up to these capacities, WARPS_OF_MANY above. Every block is one such
team. Two H100, hidden 7168, top-8, 256 experts, us: dispatch 6.5 (16 warps) and 7.1 (8) for 1 token, 14.2 and 12.0 for
64; combine 9.5 and 9.8 for 64; a pair of 512 tokens with one, two, three and four teams of 8 to a block 91.5, 90.7,
94.8 and 112.8."""


@dataclass(frozen=True)
class Selection:
    """The kernels that serve a Problem: combine either with the weights of dispatch or with its own.

    Attributes:
        dispatch, combine, combine_with_weights: the whole op in one launch.
        hooks: whether the ops may also be launched in two halves.
    """

    dispatch: LowLatencyDispatch
    combine: LowLatencyCombine
    combine_with_weights: LowLatencyCombine
    hooks: bool = False

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


def select(problem: Problem) -> Selection:
    """The kernels for `problem`.

    Raises:
        SpecError: a value is outside of what the kernels can be rendered for; the text says what is allowed.
    """
    return Selection(
        _dispatch(problem),
        _combine(problem, "atdispatch"),
        _combine(problem, "atcombine"),
        problem.hooks,
    )


def _dispatch(problem: Problem) -> LowLatencyDispatch:
    return LowLatencyDispatch(**_fields(problem, "dispatch"))


def _combine(problem: Problem, weights: str) -> LowLatencyCombine:
    return LowLatencyCombine(**_fields(replace(problem, dtype="bf16"), "combine"), weights=weights)


def _fields(problem: Problem, op: str) -> dict[str, Any]:
    return {
        "dtype": problem.dtype,
        "layout": problem.layout,
        "num_ranks": problem.num_ranks,
        "hidden": problem.hidden,
        "num_topk": problem.num_topk,
        "num_experts": problem.num_experts,
        "path": problem.path,
        "warp_groups": warp_groups(problem, op),
        "wire": wire(problem),
        "phase": "whole",
        "peers": "masked" if problem.masked else "required",
    }


def wire(problem: Problem) -> str:
    """Up to a capacity of INLINE_MAX_TOKENS rows are sent inline."""
    if problem.wire != "auto":
        return problem.wire
    return "inline" if problem.max_tokens <= INLINE_MAX_TOKENS else "row"


def warp_groups(problem: Problem, op: str) -> WarpGroups:
    """One team to a block, of as many warps as a row has warps' worth of 16-byte vectors: at most the table's, and
    enough that a thread holds no more than MOST_STEPS.
    """
    if problem.warp_groups is not None:
        return WarpGroups.parse(problem.warp_groups)
    if problem.on_host:
        return HOST_WARP_GROUPS
    vectors = problem.hidden * DTYPE_BYTES.get(problem.dtype, 2) // VECTOR_BYTES
    most = WARPS_OF_FEW if problem.max_tokens <= FEW_TOKENS[op] else WARPS_OF_MANY
    warps = 1
    while (warps < most and warps * WARP_SIZE < vectors) or warps * WARP_SIZE * MOST_STEPS < vectors:
        warps *= 2
    return WarpGroups(1, warps)
