# SPDX-License-Identifier: Apache-2.0
"""The high-throughput kernels that ht_driver.cpp runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

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

from moegen.kernels.ht import (
    CHUNK,
    HighThroughputCombine,
    HighThroughputDispatch,
    regions,
)
from moegen.kernels.ll import ceil_div

HIDDEN = 128  # a group of FP8
MAX_TOKENS = CHUNK + 2
FEW_TOKENS = 6
ALIGNMENT = 4
WARPS = 2


@dataclass(frozen=True)
class Variant(KernelSet):
    """A dispatch kernel for each phase and a combine kernel.

    Attributes:
        roles_apart: one block sends and two receive; else one does both.
    """

    roles_apart: bool
    whole: Kernel
    plan: Kernel
    rows: Kernel
    combine: Kernel


def variant(dtype: str, layout: str, roles_apart: bool) -> Variant:
    """Unmodified kernels of one format and layout."""
    common = (layout, RANKS, HIDDEN, TOPK, EXPERTS, "ipc", WARPS)
    whole = HighThroughputDispatch(dtype, *common, "whole")
    name = f"{dtype}_{layout}"
    whole_kernel, plan, rows = (Kernel(f"{p}_{name}", whole.in_phase(p)) for p in ("whole", "plan", "rows"))
    combine = Kernel(f"combine_{layout}", HighThroughputCombine("bf16", *common))
    return Variant(name, roles_apart, whole_kernel, plan, rows, combine)


# ---- what the driver includes ---------------------------------------------------------------------


def _specs(variant: Variant) -> tuple[HighThroughputDispatch, HighThroughputCombine]:
    dispatch, combine = variant.whole.spec, variant.combine.spec
    assert isinstance(dispatch, HighThroughputDispatch) and isinstance(combine, HighThroughputCombine)
    return dispatch, combine


def _row(variant: Variant) -> str:
    dispatch, combine = _specs(variant)
    dispatch_at = regions(dispatch, MAX_TOKENS, 0)
    combine_at = regions(combine, MAX_TOKENS, dispatch_at.end)
    columns = (
        f'"{variant.name}"',
        *map(entries_of, variant.kernels),
        params_bytes_of(variant.whole),
        params_bytes_of(variant.combine),
        str(dispatch.block_threads),
        *map(flag, (variant.roles_apart, dispatch.packed, dispatch.quantises)),
        initialiser(astuple(dispatch_at)),
        initialiser(astuple(combine_at)),
    )
    return ", ".join(columns)


def headers(variants: Sequence[Variant]) -> dict[str, str]:
    """What ht_driver.cpp includes: the texts, by name."""
    dispatch, combine = _specs(variants[0])
    shape = shape_header(
        kHidden=HIDDEN,
        kMaxTokens=MAX_TOKENS,
        kFewTokens=FEW_TOKENS,
        kAlignment=ALIGNMENT,
        kChunks=ceil_div(MAX_TOKENS, CHUNK),
        kCounters=dispatch.num_counters,
    )
    structs = (struct("DispatchParams", dispatch.params), struct("CombineParams", combine.params))
    return {
        "shape.hpp": shape,
        "variants.hpp": variants_header(structs, kernels_of(variants), list(map(_row, variants))),
    }
