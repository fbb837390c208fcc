# SPDX-License-Identifier: Apache-2.0
"""Specs of kernels that move rows of hidden elements: what family `ht` and the kernels around an all-to-all share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from moegen.codegen.call_words import pack
from moegen.codegen.spec import Spec, rare, tag
from moegen.formats import BF16, ROWS, Format
from moegen.limits import (
    MAX_BLOCK_WARPS,
    MAX_EXPERTS,
    MAX_RANKS,
    MAX_ROW_BYTES,
    MAX_SHARED_BYTES,
    MAX_TOPK,
    PACKET_WORDS,
    VECTOR_BYTES,
    WARP_SIZE,
    ceil_div,
)

if TYPE_CHECKING:
    from typing_extensions import Self

CHUNK = 64
"""Tokens that one block plans at a time: two words of bits per counter."""

PHASE_WORDS = ("whole", "plan", "rows")
"""What one launch of dispatch does: all of it, only tell every rank which rows come where, or only move rows by a plan
that was made before."""

LAYOUTS = ("token", "packed")


def require_routing(spec: Any) -> None:
    """What all ops that route tokens can be rendered for: the numbers of ranks, experts and selections of a Spec."""
    ranks, experts, topk = spec.num_ranks, spec.num_experts, spec.num_topk
    spec.require(1 <= ranks <= MAX_RANKS, f"num_ranks is 1..{MAX_RANKS}; got {ranks}")
    spec.require(ranks <= experts <= MAX_EXPERTS, f"num_experts is num_ranks ({ranks})..{MAX_EXPERTS}; got {experts}")
    spec.require(
        1 <= topk <= min(MAX_TOPK, experts),
        f"num_topk is 1..{MAX_TOPK} and at most num_experts ({experts}); got {topk}",
    )


@dataclass(frozen=True)
class RowSpec(Spec):
    """What dispatch and combine of rows have in common."""

    dtype: str = tag(one_of=tuple(ROWS))
    layout: str = tag(one_of=LAYOUTS)
    num_ranks: int = tag("r")
    hidden: int = tag("h")
    num_topk: int = tag("k")
    num_experts: int = tag("e")
    path: str = tag(one_of=("ipc",))
    num_warps: int = tag("w")
    most_ahead: ClassVar[int]
    """16-byte vectors of a part that a lane may have under way."""

    def validate(self) -> None:
        require_routing(self)
        self.require(
            self.row_bytes > 0 and BF16.row_bytes(self.hidden) <= MAX_ROW_BYTES and self.row_bytes % VECTOR_BYTES == 0,
            f"a row is a multiple of {VECTOR_BYTES} bytes up to {MAX_ROW_BYTES} (of bf16); hidden {self.hidden} in "
            f"{self.dtype} gives {self.row_bytes}",
        )
        group = self.format.word_elements
        self.require(
            not group or self.hidden % group == 0,
            f"hidden is a multiple of {group} in {self.dtype}; got {self.hidden}",
        )
        self.require(1 <= self.num_warps <= MAX_BLOCK_WARPS, f"num_warps is 1..{MAX_BLOCK_WARPS}; got {self.num_warps}")
        self.require(
            self.shared_bytes <= MAX_SHARED_BYTES,
            f"a block has {MAX_SHARED_BYTES:,} bytes of shared memory and {self.num_warps} warps need "
            f"{self.shared_bytes:,} here: fewer warps need less",
        )

    @property
    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory."""
        raise NotImplementedError

    @property
    def format(self) -> Format:
        return ROWS[self.dtype]

    @property
    def quantizes(self) -> bool:
        return self.format.quantized_here

    @property
    def row_bytes(self) -> int:
        return self.format.row_bytes(self.hidden)

    @property
    def scale_words(self) -> int:
        """32-bit words of scales that travel with a row."""
        return self.format.scale_words(self.hidden)

    @property
    def block_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    @property
    def max_local_experts(self) -> int:
        return ceil_div(self.num_experts, self.num_ranks)

    @property
    def packed(self) -> bool:
        return self.layout == "packed"

    @property
    def by_expert(self) -> bool:
        """Whether a token has a row for each local expert that it selects."""
        return self.layout != "token"


@dataclass(frozen=True)
class RowDispatch(RowSpec):
    """Sends each token once to every rank that holds one of its experts.

    Layout `token`: one row per token that comes, by source rank and then the source's token. Layout `packed`: one row
    per local expert that it selects, rows of an expert contiguous and in that order, experts aligned.
    """

    phase: str = tag(one_of=PHASE_WORDS)
    rows: str = rare("placed", "borrowed")
    chunk: ClassVar[int] = CHUNK

    def in_phase(self, phase: str) -> Self:
        return replace(self, phase=phase)

    def validate(self) -> None:
        super().validate()
        self.require(self.layout == "token" or not self.borrowed, "rows of layout packed lie nowhere but where they go")

    @property
    def borrowed(self) -> bool:
        """Whether the user reads rows where they were received."""
        return self.rows == "borrowed"

    @property
    def plans(self) -> bool:
        return self.phase != "rows"

    @property
    def moves(self) -> bool:
        return self.phase != "plan"

    @property
    def checks_sources(self) -> bool:
        """Whether what comes from a source says to which call it belongs, once for all of its rows."""
        return self.plans

    @property
    def entry_words(self) -> int:
        """Of what the plan tells of a row: its token, then a selection and a weight for each k."""
        return 1 + 2 * self.num_topk

    @property
    def entry_packets(self) -> int:
        return ceil_div(self.entry_words, PACKET_WORDS)

    @property
    def call(self) -> int:
        """The call word: the phase, which is equal on all ranks that make the same call."""
        return pack("ht_dispatch", PHASE_WORDS.index(self.phase))

    @property
    def source_words(self) -> int:
        """Of what every rank learns about a source: its tokens, and its rows for each rank."""
        return 1 + self.num_ranks

    @property
    def slot_bytes(self) -> int:
        """Of a row and its scales, as they are staged."""
        return ceil_div(self.format.moved_bytes(self.hidden), VECTOR_BYTES) * VECTOR_BYTES

    @property
    def num_counters(self) -> int:
        return self.num_ranks + self.num_experts

    @property
    def shared_bytes(self) -> int:
        plan = self.num_counters * (8 + 4) + CHUNK * self.num_topk * (2 + 4)
        receive = 4 * (self.num_ranks + 1) * (1 + self.max_local_experts)
        receive += self.num_warps * 4 * (self.entry_packets * PACKET_WORDS + self.num_topk)
        return plan + receive + 256


@dataclass(frozen=True)
class RowCombine(RowSpec):
    """Sends one row per (token, rank) back to the token's owner, who adds them in rank order.

    From layout `packed` that row is the weighted sum over the rank's experts, or the plain one, rounded once.
    """

    dtype: str = tag(one_of=("bf16",))
    plans: ClassVar[bool] = False
    moves: ClassVar[bool] = True
    borrowed: ClassVar[bool] = False

    @property
    def slot_bytes(self) -> int:
        """Of a row and its weights, as they are staged."""
        return self.row_bytes + ceil_div(4 * self.num_topk, VECTOR_BYTES) * VECTOR_BYTES

    @property
    def shared_bytes(self) -> int:
        return 2 * self.num_warps * (self.num_ranks + self.num_topk + 2) * 12 + 256
