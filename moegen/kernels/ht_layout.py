# SPDX-License-Identifier: Apache-2.0
"""Op `layout` of family `ht`: how many tokens go where. The host half of `templates/ht_layout.cu.jinja`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from moegen.kernels.ht import require_routing
from moegen.kernels.ll import ceil_div
from moegen.kernels.params import Param, ParamStruct
from moegen.kernels.spec import MAX_BLOCK_WARPS, WARP_SIZE, Spec, tag


@dataclass(frozen=True)
class HighThroughputLayout(Spec, family="ht", op="layout"):
    """Counts a rank's own tokens: those that go to each rank, and those that select each expert. Waits for nobody."""

    num_ranks: int = tag("r")
    num_topk: int = tag("k")
    num_experts: int = tag("e")
    num_warps: int = tag("w")
    phase: ClassVar[str] = "whole"

    def validate(self) -> None:
        require_routing(self)
        self.require(1 <= self.num_warps <= MAX_BLOCK_WARPS, f"num_warps is 1..{MAX_BLOCK_WARPS}; got {self.num_warps}")

    @property
    def block_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    @property
    def max_local_experts(self) -> int:
        return ceil_div(self.num_experts, self.num_ranks)

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                Param("const void*", "topk_idx", "[tokens, topk] int32 or int64"),
                Param("uint32_t*", "counters", "[ranks + experts], zeroed: tokens for each rank, then for each expert"),
                Param("bool*", "token_in_rank", "[tokens, ranks]"),
                Param("Failure*", "failure", "where the host reads what went wrong"),
                Param("uint32_t", "tokens", "rows of topk_idx"),
                Param("uint32_t", "wide_ids", "1: topk_idx is int64"),
            )
        )
