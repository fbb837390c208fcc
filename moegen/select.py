# SPDX-License-Identifier: Apache-2.0
"""Problem -> Specs: a pure function of values that all ranks share, driven by the tables below."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.kernels.ll import MAX_SHARED_BYTES, LowLatencyCombine, LowLatencyDispatch, dispatch_shared_bytes
from moegen.kernels.problem import Problem
from moegen.kernels.spec import DTYPE_BYTES, MAX_BLOCK_WARPS, WARP_SIZE, WarpGroups

INLINE_MAX_TOKENS = 64
"""Up to this capacity rows carry their epoch in every 16 bytes; above it they have a tag. A bare exchange of 64 rows
of 14,336 bytes took 6.9 us inline and 7.5 with tags, one of 128 rows 10.1 and 10.3 (two H200)."""

HOST_WARP_GROUPS = WarpGroups(2, 1)
"""On a CPU more threads only add switches between fibers; two teams keep several rows per block under test."""

VECTOR_BYTES = 16

MOST_WARPS = ((160, 32), (600, 16), (float("inf"), 8))
"""Rows that a rank may receive, and up to how many warps then share one. Best pairs of 2 virtual ranks with 66 blocks
each of an H200, hidden 7168, top-8, 256 experts: 64 to 128 rows 1x32, 256 rows 2x16, 1,024 rows 4x8 (129 us against 169
with 1x32). A rank with a GPU of its own has twice the blocks: the limits are half-way in between."""


@dataclass(frozen=True)
class Selection:
    """The kernels that serve a Problem: combine either with the weights of dispatch or with its own."""

    dispatch: LowLatencyDispatch
    combine: LowLatencyCombine
    combine_with_weights: LowLatencyCombine

    @property
    def specs(self) -> tuple[LowLatencyDispatch, LowLatencyCombine, LowLatencyCombine]:
        return (self.dispatch, self.combine, self.combine_with_weights)


def select(problem: Problem) -> Selection:
    """The kernels for `problem`.

    Raises:
        SpecError: a value is outside of what the kernels can be rendered for; the text says what is allowed.
    """
    fields = (
        problem.dtype,
        problem.layout,
        problem.num_ranks,
        problem.hidden,
        problem.num_topk,
        problem.num_experts,
        problem.path,
        warp_groups(problem),
        wire(problem),
    )
    return Selection(
        LowLatencyDispatch(*fields),
        LowLatencyCombine(*fields, "atdispatch"),
        LowLatencyCombine(*fields, "atcombine"),
    )


def wire(problem: Problem) -> str:
    """Up to a capacity of INLINE_MAX_TOKENS rows are sent inline."""
    if problem.wire != "auto":
        return problem.wire
    return "inline" if problem.max_tokens <= INLINE_MAX_TOKENS else "row"


def warp_groups(problem: Problem) -> WarpGroups:
    """As many warps to a row as it has warps' worth of 16-byte vectors, but fewer if there are many rows to a block."""
    if problem.warp_groups is not None:
        return WarpGroups.parse(problem.warp_groups)
    if problem.on_host:
        return HOST_WARP_GROUPS
    vectors = problem.hidden * DTYPE_BYTES.get(problem.dtype, 2) // VECTOR_BYTES
    rows = problem.num_ranks * problem.max_tokens
    most = next(warps for limit, warps in MOST_WARPS if rows <= limit)
    warps = 1
    while warps < most and warps * WARP_SIZE < vectors:
        warps *= 2
    while warps < MAX_BLOCK_WARPS and not _fits(problem, _full_block(warps)):
        warps *= 2
    return _full_block(warps)


def _full_block(warps: int) -> WarpGroups:
    """As many teams of that size as a block holds; it has 15 named barriers for teams of several warps."""
    groups = MAX_BLOCK_WARPS // warps
    return WarpGroups(groups if warps == 1 else min(groups, 15), warps)


def _fits(problem: Problem, groups: WarpGroups) -> bool:
    """Whether so many teams have room in a block's shared memory: many ranks, experts and selections take much."""
    needed = dispatch_shared_bytes(
        problem.num_ranks, problem.num_experts, problem.num_topk, wire(problem), groups.groups
    )
    return needed <= MAX_SHARED_BYTES
