# SPDX-License-Identifier: Apache-2.0
"""The low-latency kernels that ll_driver.cpp runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

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

from moegen.kernels.ll import LowLatencyCombine, LowLatencyDispatch, regions
from moegen.kernels.spec import WarpGroups

HIDDEN = 64
MAX_TOKENS = 8
BLOCKS_PER_ROLE = 2


@dataclass(frozen=True)
class Variant(KernelSet):
    dispatch: Kernel
    combine: Kernel


def variant(wire: str, weights: str, groups: WarpGroups, peers: str = "required") -> Variant:
    """Unmodified kernels of one wire format."""
    common = ("bf16", "expert", RANKS, HIDDEN, TOPK, EXPERTS, "ipc", groups, wire, "whole")
    name = f"{wire}_{weights}_w{groups}_{peers}"
    dispatch = Kernel(f"dispatch_{name}", LowLatencyDispatch(*common, peers=peers))
    return Variant(name, dispatch, Kernel(f"combine_{name}", LowLatencyCombine(*common, weights, peers=peers)))


# ---- what the driver includes ---------------------------------------------------------------------


def _row(variant: Variant) -> str:
    dispatch, combine = variant.dispatch.spec, variant.combine.spec
    assert isinstance(dispatch, LowLatencyDispatch) and isinstance(combine, LowLatencyCombine)
    dispatch_at = regions(dispatch, MAX_TOKENS, 0)
    combine_at = regions(combine, MAX_TOKENS, dispatch_at.end)
    late, masked = map(flag, (combine.weights == "atcombine", dispatch.masked))
    kernels = (variant.dispatch, variant.combine)
    columns = (*map(entries_of, kernels), *map(params_bytes_of, kernels), str(dispatch.block_threads), late, masked)
    return ", ".join(
        (f'"{variant.name}"', *columns, initialiser(astuple(dispatch_at)), initialiser(astuple(combine_at)))
    )


def headers(variants: Sequence[Variant]) -> dict[str, str]:
    """What ll_driver.cpp includes: the texts, by name."""
    dispatch, combine = variants[0].dispatch.spec, variants[0].combine.spec
    assert isinstance(dispatch, LowLatencyDispatch) and isinstance(combine, LowLatencyCombine)
    assert not dispatch.masked
    structs = (
        struct("DispatchParams", dispatch.params),
        struct("CombineParams", combine.params),
        struct("MaskedDispatchParams", replace(dispatch, peers="masked").params),
        struct("MaskedCombineParams", replace(combine, peers="masked").params),
    )
    return {
        "shape.hpp": shape_header(kHidden=HIDDEN, kMaxTokens=MAX_TOKENS, kBlocksPerRole=BLOCKS_PER_ROLE),
        "variants.hpp": variants_header(structs, kernels_of(variants), list(map(_row, variants))),
    }
