# SPDX-License-Identifier: Apache-2.0
"""The high-throughput kernels that ht_driver.cpp runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from host.sanitize.build import (
    EXPERTS,
    RANKS,
    TOPK,
    Edit,
    Kernel,
    entries_of,
    params_bytes_of,
    shape_header,
    struct,
    variants_header,
)

from moegen.kernels.ht import (
    CHUNK,
    HighThroughputCombine,
    HighThroughputDispatch,
    Regions,
    regions,
)
from moegen.kernels.ll import ceil_div

HIDDEN = 128  # a group of FP8
MAX_TOKENS = CHUNK + 2
FEW_TOKENS = 6
ALIGNMENT = 4
WARPS = 2


@dataclass(frozen=True)
class Variant:
    """Kernels that belong together; what the driver runs by name.

    Attributes:
        roles_apart: one block sends and two receive; else one does both.
    """

    name: str
    roles_apart: bool
    whole: Kernel
    plan: Kernel
    rows: Kernel
    combine: Kernel

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return self.whole, self.plan, self.rows, self.combine


def variant(dtype: str, layout: str, roles_apart: bool) -> Variant:
    """Unmodified kernels of one format and layout."""
    common = (layout, RANKS, HIDDEN, TOPK, EXPERTS, "ipc", WARPS)
    whole = HighThroughputDispatch(dtype, *common, "whole")
    name = f"{dtype}_{layout}"
    whole_kernel, plan, rows = (Kernel(f"{p}_{name}", whole.in_phase(p)) for p in ("whole", "plan", "rows"))
    combine = Kernel(f"combine_{layout}", HighThroughputCombine("bf16", *common))
    return Variant(name, roles_apart, whole_kernel, plan, rows, combine)


def weakened(right: Variant, op: str, name: str, edit: Edit) -> Variant:
    """`right` with an edit in one of its kernels: that of a phase of dispatch, or combine's."""
    kernel = Kernel(f"{op}_{name}", getattr(right, op).spec, edit)
    return replace(right, name=kernel.name, **{op: kernel})


def kernels_of(variants: Sequence[Variant]) -> list[Kernel]:
    """Each kernel once."""
    return list({kernel.name: kernel for variant in variants for kernel in variant.kernels}.values())


# ---- what the driver includes ---------------------------------------------------------------------


def _layout(at: Regions) -> str:
    return "{" + ", ".join(str(offset) for offset in astuple(at)) + "}"


def _specs(variant: Variant) -> tuple[HighThroughputDispatch, HighThroughputCombine]:
    dispatch, combine = variant.whole.spec, variant.combine.spec
    assert isinstance(dispatch, HighThroughputDispatch) and isinstance(combine, HighThroughputCombine)
    return dispatch, combine


def _flag(holds: bool) -> str:
    return "true" if holds else "false"


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
        _flag(variant.roles_apart),
        _flag(dispatch.packed),
        _flag(dispatch.quantises),
        _layout(dispatch_at),
        _layout(combine_at),
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
