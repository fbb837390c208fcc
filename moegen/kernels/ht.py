# SPDX-License-Identifier: Apache-2.0
"""Family `ht`, high throughput: persistent kernels; some blocks send rows, the others place them while more arrive.

This module is the host half of `templates/ht_dispatch.cu.jinja` and `templates/ht_combine.cu.jinja`: their Specs,
their parameter structs, where things lie in symmetric memory, and which blocks do what.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

from moegen.kernels.call_words import PLACE, REGION_BYTES, pack
from moegen.kernels.ll import FP8_GROUP, MAX_SHARED_BYTES, REGION_ALIGNMENT, ceil_div
from moegen.kernels.params import Param, ParamStruct
from moegen.kernels.spec import (
    MAX_BLOCK_WARPS,
    MAX_EXPERTS,
    MAX_RANKS,
    MAX_ROW_BYTES,
    MAX_TOPK,
    WARP_SIZE,
    Spec,
    rare,
    tag,
)

if TYPE_CHECKING:
    from typing_extensions import Self

PHASES = {
    "kPeerReady": "the end of its previous call",
    "kPlanned": "the counts of an earlier chunk of tokens",
    "kCounts": "how many rows it sends",
    "kEntry": "where one of its rows goes",
    "kRow": "a token row",
    "kPartial": "a partial sum",
}
"""What a wait of this family waits for: the name in the kernel, and in words for PeerTimeoutError."""

PIECE_BYTES = 16
PIECE_WORDS = 3
"""32-bit words of counts and plan entries in 16 bytes, which carry their epoch."""

CHUNK = 64
"""Tokens that one block plans at a time: two words of bits per counter."""

AHEAD_IN_DISPATCH, AHEAD_IN_COMBINE = 7, 4
"""16-byte vectors of a part. Seven divide rows of 7168 elements; combine has three parts under way, and sums of one."""

PHASE_WORDS = ("whole", "plan", "rows")
"""What one launch of dispatch does: all of it, only tell every rank which rows come where, or only move rows by a plan
that was made before."""

LAYOUTS = ("token", "packed")


@dataclass(frozen=True)
class RowFormat:
    """How the elements of a row travel.

    Attributes:
        element_bytes: as they travel.
        scales_per_word: that share 32 bits; 0: there are none.
        given: the caller quantised them; else bf16 is what is given.
    """

    element_bytes: int
    scales_per_word: int = 0
    given: bool = False

    @property
    def quantised_here(self) -> bool:
        return self.scales_per_word > 0 and not self.given


FORMATS = {
    "bf16": RowFormat(2),
    "fp8": RowFormat(1, 1),
    "fp8pow2": RowFormat(1, 1),
    "fp8ue8m0": RowFormat(1, 4),
    "e4m3": RowFormat(1, 1, given=True),
    "e4m3ue8m0": RowFormat(1, 4, given=True),
}


def require_routing(spec: Any) -> None:
    """What all ops of this family can be rendered for: the numbers of ranks, experts and selections of a Spec."""
    ranks, experts, topk = spec.num_ranks, spec.num_experts, spec.num_topk
    spec.require(1 <= ranks <= MAX_RANKS, f"num_ranks is 1..{MAX_RANKS}; got {ranks}")
    spec.require(ranks <= experts <= MAX_EXPERTS, f"num_experts is num_ranks ({ranks})..{MAX_EXPERTS}; got {experts}")
    spec.require(
        1 <= topk <= min(MAX_TOPK, experts),
        f"num_topk is 1..{MAX_TOPK} and at most num_experts ({experts}); got {topk}",
    )


@dataclass(frozen=True)
class HighThroughputSpec(Spec):
    """What dispatch and combine of this family have in common."""

    dtype: str = tag(one_of=tuple(FORMATS))
    layout: str = tag(one_of=LAYOUTS)
    num_ranks: int = tag("r")
    hidden: int = tag("h")
    num_topk: int = tag("k")
    num_experts: int = tag("e")
    path: str = tag(one_of=("ipc",))
    num_warps: int = tag("w")
    most_ahead: ClassVar[int]

    def validate(self) -> None:
        require_routing(self)
        self.require(
            self.row_bytes > 0 and 2 * self.hidden <= MAX_ROW_BYTES and self.row_bytes % 16 == 0,
            f"a row is a multiple of 16 bytes up to {MAX_ROW_BYTES} (of bf16); hidden {self.hidden} in {self.dtype} "
            f"gives {self.row_bytes}",
        )
        group = FP8_GROUP * self.format.scales_per_word
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
    def format(self) -> RowFormat:
        return FORMATS[self.dtype]

    @property
    def quantises(self) -> bool:
        return self.format.quantised_here

    @property
    def row_bytes(self) -> int:
        return self.hidden * self.format.element_bytes

    @property
    def scale_words(self) -> int:
        """32-bit words of scales that travel with a row."""
        per_word = self.format.scales_per_word
        return self.hidden // (FP8_GROUP * per_word) if per_word else 0

    @property
    def block_threads(self) -> int:
        return self.num_warps * WARP_SIZE

    @property
    def max_local_experts(self) -> int:
        return ceil_div(self.num_experts, self.num_ranks)

    @property
    def vectors_ahead(self) -> int:
        """16-byte vectors of a row that a lane has under way at once: fewer in short rows."""
        return max(1, min(self.most_ahead, ceil_div(self.row_bytes // PIECE_BYTES, WARP_SIZE)))

    @property
    def packed(self) -> bool:
        return self.layout == "packed"

    @property
    def by_expert(self) -> bool:
        """Whether a token has a row for each local expert that it selects."""
        return self.layout != "token"

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(PHASES)


_COMMON = (
    Param("Control*", "control", "this op's epoch"),
    Param("uint32_t*", "aborted", "this object's abort word"),
    Param("Failure*", "failure", "where the host reads what went wrong"),
    Param("uint64_t", "consumed_offset", "[rank] u32: the last epoch that the peer has finished"),
    PLACE,
    Param("uint64_t", "rows_offset", "[source][max_tokens] records, each at its token's number"),
    Param("uint64_t", "tags_offset", "[source][max_tokens] u64: call word and epoch of the row there"),
    Param("uint64_t", "timeout_ns", "how long one wait may take"),
)
_COMMON_32 = (
    Param("Blocks", "senders", "blocks that send"),
    Param("Blocks", "receivers", "blocks that plan and receive; the same one if there is only one"),
    Param("uint32_t", "rank", "this rank"),
    Param("uint32_t", "tokens", "rows of this rank's token tensor"),
    Param("uint32_t", "max_tokens", "capacity: tokens that a rank may send"),
)


def _of_handle(written: bool) -> tuple[Param, ...]:
    """What dispatch leaves for combine and for further dispatches with the same routing."""
    const = "" if written else "const "
    return (
        Param(f"{const}uint64_t*", "token_ranks", "[max_tokens]: bit r: rank r holds an expert of this token"),
        Param(f"{const}int32_t*", "tokens_sent", "one number: the tokens of this call"),
        Param(f"{const}int32_t*", "first_rows", "[ranks + 1]: first row of each source, then the number of rows"),
        Param(f"{const}int32_t*", "row_tokens", "[ranks * max_tokens]: the source's token of each row"),
        Param(
            f"{const}int32_t*", "row_slots", "[ranks * max_tokens, topk]: local expert or (packed) row; -1: not here"
        ),
        Param(f"{const}float*", "row_weights", f"[ranks * max_tokens, topk]{'' if written else '; null: ones'}"),
        Param(f"{const}int32_t*", "own_rows", "[max_tokens]: which of this rank's rows for itself a token is"),
    )


@dataclass(frozen=True)
class HighThroughputDispatch(HighThroughputSpec, family="ht", op="dispatch"):
    """Sends each token once to every rank that holds one of its experts.

    Layout `token`: one row per token that comes, by source rank and then the source's token. Layout `packed`: one row
    per local expert that it selects, rows of an expert contiguous and in that order, experts aligned.
    """

    phase: str = tag(one_of=PHASE_WORDS)
    rows: str = rare("placed", "borrowed")
    chunk: ClassVar[int] = CHUNK
    most_ahead: ClassVar[int] = AHEAD_IN_DISPATCH

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
    def entry_words(self) -> int:
        """Of what the plan tells of a row: its token, then a selection and a weight for each k."""
        return 1 + 2 * self.num_topk

    @property
    def entry_pieces(self) -> int:
        return ceil_div(self.entry_words, PIECE_WORDS)

    @property
    def count_pieces(self) -> int:
        """Packets that a source sends first: its rows for a rank, how many select each of that rank's experts, its
        tokens, its rows for each rank, and its call word.
        """
        return ceil_div(1 + self.max_local_experts + self.source_words + 1, PIECE_WORDS)

    @property
    def call(self) -> int:
        """The call word: the phase, which is equal on all ranks that make the same call."""
        return pack("ht_dispatch", PHASE_WORDS.index(self.phase))

    @property
    def source_words(self) -> int:
        """Of what every rank learns about a source: its tokens, and its rows for each rank."""
        return 1 + self.num_ranks

    @property
    def record_bytes(self) -> int:
        """Of a row and its scales, as they are staged."""
        return ceil_div(self.row_bytes + 4 * self.scale_words, PIECE_BYTES) * PIECE_BYTES

    @property
    def num_counters(self) -> int:
        return self.num_ranks + self.num_experts

    @property
    def shared_bytes(self) -> int:
        plan = self.num_counters * (8 + 4) + CHUNK * self.num_topk * (2 + 4)
        receive = 4 * (self.num_ranks + 1) * (1 + self.max_local_experts)
        receive += self.num_warps * 4 * (self.entry_pieces * PIECE_WORDS + self.num_topk)
        return plan + receive + 256

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                Param("const uint8_t*", "x", "[tokens, hidden]"),
                Param("const uint32_t*", "x_scales", "[tokens, scale words], if the caller quantised; else null"),
                Param("const void*", "topk_idx", "[tokens, topk] int32 or int64"),
                Param("const float*", "topk_weights", "[tokens, topk]; null: every weight is 1"),
                Param("uint8_t*", "out", "[rows, hidden]"),
                Param("uint32_t*", "out_scales", "[rows, scale words] with the strides below, or null"),
                Param("int64_t*", "out_topk_idx", "[rows, topk] local expert or -1 (layout token), or null"),
                Param("float*", "out_weights", "[rows, topk] (layout token) or [rows] (packed), or null"),
                Param("int32_t*", "counts", "[local experts]: rows that select each expert"),
                Param("int32_t*", "total_counts", "[local experts], to which counts are added; or null"),
                Param("int32_t*", "first_slots", "[local experts + 1]: first row of each expert (layout packed)"),
                Param("int32_t*", "source_counts", "[ranks, 1 + ranks]: tokens of each source, its rows for each rank"),
                *_of_handle(written=True),
                Param("const int32_t*", "num_tokens", "one number: tokens of this call; null: `tokens`"),
                Param("uint32_t*", "chunk_counts", "[chunks][ranks + experts]: the plan's counters"),
                Param("uint32_t*", "chunk_epochs", "[chunks]: whose counters those are"),
                *_COMMON,
                Param("uint64_t", "x_stride", "bytes from one token of x to the next"),
                Param("uint64_t", "counts_offset", "[source][count pieces]"),
                Param("uint64_t", "entries_offset", "[source][max_tokens][entry pieces]"),
                Param("uint64_t", "scale_row_stride", "words from one row's scales to the next's"),
                Param("uint64_t", "scale_word_stride", "words from one scale word of a row to the next"),
                *_COMMON_32,
                Param("uint32_t", "capacity", "rows of `out`"),
                Param("uint32_t", "alignment", "an expert's first row is a multiple of this (layout packed)"),
                Param("uint32_t", "tokens_wanted", "tokens that this rank has and this object has no room for, or 0"),
                Param("uint32_t", "wide_ids", "1: topk_idx is int64"),
            )
        )


@dataclass(frozen=True)
class HighThroughputCombine(HighThroughputSpec, family="ht", op="combine"):
    """Sends one row per (token, rank) back to the token's owner, who adds them in rank order.

    From layout `packed` that row is the weighted sum over the rank's experts, or the plain one, rounded once.
    """

    dtype: str = tag(one_of=("bf16",))
    moves: ClassVar[bool] = True
    most_ahead: ClassVar[int] = AHEAD_IN_COMBINE
    borrowed: ClassVar[bool] = False

    @property
    def record_bytes(self) -> int:
        """Of a row and its weights, as they are staged."""
        return self.row_bytes + ceil_div(4 * self.num_topk, PIECE_BYTES) * PIECE_BYTES

    @property
    def shared_bytes(self) -> int:
        return 2 * self.num_warps * (self.num_ranks + self.num_topk + 2) * 12 + 256

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                Param("const uint8_t*", "y", "[rows, hidden]"),
                Param(
                    "const float*", "y_weights", "[rows that came, topk], summed over ranks into out_weights; or null"
                ),
                Param("const uint8_t*", "bias", "[tokens, hidden], added to the sum; or null"),
                Param("const uint8_t*", "second_bias", "[tokens, hidden]; or null"),
                Param("uint8_t*", "out", "[tokens, hidden]"),
                Param("float*", "out_weights", "[tokens, topk], or null"),
                *_of_handle(written=False),
                *_COMMON,
                *_COMMON_32,
                Param("uint32_t", "rows", "of `y`; more may have come to a dispatch that had no room for them"),
                Param("uint32_t", "call", "call word"),
            )
        )


@dataclass(frozen=True)
class Regions:
    """Where one op's parts lie in every rank's symmetric memory: byte offsets."""

    consumed: int
    calls: int
    counts: int
    entries: int
    rows: int
    tags: int
    end: int


def regions(spec: HighThroughputDispatch | HighThroughputCombine, max_tokens: int, start: int) -> Regions:
    """Lays an op's regions out from byte `start` on."""
    rows = spec.num_ranks * max_tokens
    counts = entries = 0
    if isinstance(spec, HighThroughputDispatch):
        counts, entries = spec.num_ranks * spec.count_pieces, rows * spec.entry_pieces
    sizes = (
        spec.num_ranks * 4,
        REGION_BYTES,
        counts * PIECE_BYTES,
        entries * PIECE_BYTES,
        rows * spec.record_bytes,
        rows * 8,
    )
    ends = accumulate((ceil_div(size, REGION_ALIGNMENT) * REGION_ALIGNMENT for size in sizes), initial=start)
    return Regions(*ends)
