# SPDX-License-Identifier: Apache-2.0
"""The one-sided kernels that a2a_driver.cpp runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from host.sanitize.build import (
    EXPERTS,
    RANKS,
    TOPK,
    Kernel,
    KernelSet,
    entries_of,
    flag,
    initialiser,
    kernels_of,
    params_bytes_of,
    shape_header,
    struct,
    variants_header,
)

from moegen.kernels.a2a import OneSidedCombine, OneSidedDispatch
from moegen.kernels.a2a_layout import planes, regions, roles
from moegen.kernels.a2a_payloads import RowBytes
from moegen.kernels.spec import WARP_SIZE, WarpGroups

HIDDEN = 1032
"""129 vectors of 16 bytes: one more than a warp adds up in one turn."""

WIDTHS = (2 * HIDDEN, 229, 66, 4 * TOPK, 8)
"""Rows for combine, bytes that a warp reads in two turns, halfwords, ids, and a scale: of a team with one warp the
first three are wide, of larger ones two. Units of 16, 1, 2, 4 and 8 bytes.
"""
IDS = 3

SENDERS = 2
MAX_TOKENS = SENDERS * (WARP_SIZE + 2)
FEW_TOKENS = 6
LIMITS = (MAX_TOKENS, FEW_TOKENS, FEW_TOKENS + 3, FEW_TOKENS, FEW_TOKENS + 1)
"""`max_tokens` of each of five rounds: planes do not lie where those of the round before lay. The first has more tokens
than a block plans at a time.
"""

STATS_WORDS = 5  # no multiple of what a piece holds


@dataclass(frozen=True)
class Variant(KernelSet):
    """A dispatch and a combine.

    Attributes:
        blocks: of a launch.
    """

    blocks: int
    dispatch: Kernel
    combine: Kernel


def variant(
    groups: WarpGroups, blocks: int, out: str = "bf16", ranks: int = RANKS, rows: str = "pushed", copy: str = "vec"
) -> Variant:
    """Unmodified kernels of one kind of team."""
    name = f"r{ranks}_w{groups}_{out}_{rows}_{copy}"
    dispatch = OneSidedDispatch(RowBytes(WIDTHS), ranks, TOPK, EXPERTS, "ipc", groups, copy=copy)
    combine = OneSidedCombine("bf16", out, ranks, HIDDEN, min(ranks, TOPK), "ipc", groups, rows=rows)
    return Variant(name, blocks, Kernel(f"dispatch_{name}", dispatch), Kernel(f"combine_{name}", combine))


# ---- what the driver includes ---------------------------------------------------------------------


def _specs(variant: Variant) -> tuple[OneSidedDispatch, OneSidedCombine]:
    dispatch, combine = variant.dispatch.spec, variant.combine.spec
    assert isinstance(dispatch, OneSidedDispatch) and isinstance(combine, OneSidedCombine)
    return dispatch, combine


def _roles(spec: OneSidedDispatch | OneSidedCombine, blocks: int) -> str:
    who = roles(spec, MAX_TOKENS, blocks)
    return initialiser((who.blocks, initialiser(who.senders), initialiser(who.receivers)))


def _row(variant: Variant) -> str:
    dispatch, combine = _specs(variant)
    columns = (
        f'"{variant.name}"',
        *map(entries_of, variant.kernels),
        *map(params_bytes_of, variant.kernels),
        str(dispatch.block_threads),
        str(dispatch.dynamic_shared_bytes),
        str(combine.out_row_bytes // HIDDEN),
        flag(combine.pulls),
        _roles(dispatch, variant.blocks),
        _roles(combine, variant.blocks),
    )
    return ", ".join(columns)


def _layout(ranks: int) -> str:
    """Where things lie, which is the same for all variants."""
    at = regions(ranks, MAX_TOKENS, sum(WIDTHS), 2 * HIDDEN, expert_rows=True)
    places = {**asdict(at), "half": at.half}
    of_limits = [initialiser(planes(WIDTHS, ranks, slots, at.planes)) for slots in LIMITS]
    return (
        f"constexpr struct {{ uint64_t {', '.join(places)}; }} kAt = {initialiser(places.values())};\n"
        f"constexpr uint32_t kWidths[kPayloads] = {initialiser(WIDTHS)};\n"
        f"constexpr uint32_t kLimits[] = {initialiser(LIMITS)};\n"
        f"constexpr uint64_t kPlanes[][kPayloads] = {initialiser(of_limits)};\n"
    )


def headers(variants: Sequence[Variant]) -> dict[str, str]:
    """What a2a_driver.cpp includes: the texts, by name."""
    dispatch, combine = _specs(variants[0])
    shape = shape_header(
        dispatch.num_ranks,
        kHidden=HIDDEN,
        kPayloads=len(WIDTHS),
        kIds=IDS,
        kMaxTokens=MAX_TOKENS,
        kFewTokens=FEW_TOKENS,
        kStatsWords=STATS_WORDS,
        kDestinations=dispatch.destinations,
    )
    structs = (
        struct("DispatchParams", dispatch.params),
        struct("CombineParams", replace(combine, rows="pushed").params),
        struct("PullingCombineParams", replace(combine, rows="pulled").params),
    )
    return {
        "shape.hpp": shape + _layout(dispatch.num_ranks),
        "variants.hpp": variants_header(structs, kernels_of(variants), list(map(_row, variants))),
    }
