# SPDX-License-Identifier: Apache-2.0
"""Op `layout` of family `ht`: how many tokens go where.

The host half of `templates/high_throughput/layout.cu.jinja`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moegen.codegen.params import Param, ParamStruct
from moegen.codegen.row_spec import require_routing
from moegen.codegen.spec import Spec, tag
from moegen.limits import MAX_BLOCK_WARPS, WARP_SIZE


@dataclass(frozen=True)
class HighThroughputLayout(Spec, family="ht", op="layout"):
    """Counts a rank's own tokens: those that go to each rank, and those that select each expert. Waits for nobody."""

    num_ranks: int = tag("r")
    num_topk: int = tag("k")
    num_experts: int = tag("e")
    num_warps: int = tag("w")

    def validate(self) -> None:
        require_routing(self)
        self.require(1 <= self.num_warps <= MAX_BLOCK_WARPS, f"num_warps is 1..{MAX_BLOCK_WARPS}; got {self.num_warps}")

    @property
    def block_threads(self) -> int:
        return self.num_warps * WARP_SIZE

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
