# SPDX-License-Identifier: Apache-2.0
"""Family `ll`, low latency: one fused kernel sends and receives; rows land in per-source staging.

This module is the host half of `templates/ll_dispatch.cu.jinja` and `templates/ll_combine.cu.jinja`: their Specs,
their parameter structs, and where things lie in symmetric memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from moegen.kernels import call_words, masked
from moegen.kernels.params import Param, ParamStruct
from moegen.kernels.spec import (
    DTYPE_BYTES,
    MAX_BLOCK_WARPS,
    MAX_EXPERTS,
    MAX_RANKS,
    MAX_ROW_BYTES,
    MAX_TOPK,
    WARP_SIZE,
    Spec,
    WarpGroups,
    rare,
    tag,
)

if TYPE_CHECKING:
    from typing_extensions import Self

PHASES = {
    "kPeerReady": "the release of its receive buffer",
    "kRoutes": "the experts that its tokens select",
    "kRow": "a token row",
    "kWeights": "the top-k weights of a token",
    "kPartial": "a partial sum",
}
"""What a wait of this family waits for: the name in the kernel, and in words for PeerTimeoutError."""

PIECE_WORDS = {"inline": 3, "row": 4}
"""32-bit payload words in each 16 bytes of a staged record: `inline` spends the fourth on the epoch."""

PIECE_BYTES = 16
IDS_OF_PIECE = 6
"""16-bit expert ids in 16 bytes of routes, which carry their epoch."""

WEIGHT_PIECE_WORDS = 3
"""Late weights in 16 bytes, which carry their epoch."""

HALVES = 2
"""Receive buffers per op: an epoch writes into the one that the epoch before last used, so that a sender need not wait
until the previous epoch has been read."""

PHASE_WORDS = ("whole", "send", "receive")
"""What of an op one launch does: all of it, or (with hooks) one half, the other following in a launch of its own."""

FP8_GROUP = 128
"""Elements that share a scale."""

SCALES_PER_WORD = {"bf16": 0, "fp8": 1, "fp8pow2": 1, "fp8ue8m0": 4}
"""How a row's elements travel, and how many scales a 32-bit word holds: bf16 as they are; e4m3 with float32 scales,
with scales that are powers of two, or with the exponents of such scales, four to a word (UE8M0)."""

QUANTIZED = {"fp8": "fp8", "fp8_pow2": "fp8pow2", "fp8_ue8m0": "fp8ue8m0"}
"""Users' words for the quantised ones."""

MAX_SHARED_BYTES = 48 * 1024
"""Static shared memory of a block on every GPU."""

MAX_TOKENS_PER_RANK = 1 << 20
"""With MAX_EXPERTS, rows of the output are counted in 31 bits."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class LowLatencySpec(Spec):
    """What dispatch and combine of this family have in common."""

    dtype: str = tag(one_of=tuple(SCALES_PER_WORD))
    layout: str = tag(one_of=("expert",))
    num_ranks: int = tag("r")
    hidden: int = tag("h")
    num_topk: int = tag("k")
    num_experts: int = tag("e")
    path: str = tag(one_of=("ipc",))
    warp_groups: WarpGroups = tag("w")
    wire: str = tag(one_of=tuple(PIECE_WORDS))
    phase: str = tag(one_of=PHASE_WORDS)
    peers: str = rare("required", "masked")

    def in_phase(self, phase: str) -> Self:
        return replace(self, phase=phase)

    def validate(self) -> None:
        groups, warps = self.warp_groups.groups, self.warp_groups.warps
        self.require(1 <= self.num_ranks <= MAX_RANKS, f"num_ranks is 1..{MAX_RANKS}; got {self.num_ranks}")
        self.require(
            self.num_ranks <= self.num_experts <= MAX_EXPERTS,
            f"num_experts is num_ranks ({self.num_ranks})..{MAX_EXPERTS}; got {self.num_experts}",
        )
        self.require(
            1 <= self.num_topk <= min(MAX_TOPK, self.num_experts),
            f"num_topk is 1..{MAX_TOPK} and at most num_experts ({self.num_experts}); got {self.num_topk}",
        )
        self.require(
            self.row_bytes > 0 and 2 * self.hidden <= MAX_ROW_BYTES and self.row_bytes % 16 == 0,
            f"a row is a multiple of 16 bytes up to {MAX_ROW_BYTES} (of bf16); hidden {self.hidden} in {self.dtype} "
            f"gives {self.row_bytes}",
        )
        group = FP8_GROUP * SCALES_PER_WORD[self.dtype]
        self.require(
            not group or self.hidden % group == 0,
            f"hidden is a multiple of {group} in {self.dtype}; got {self.hidden}",
        )
        self.require(
            groups >= 1 and warps >= 1 and groups * warps <= MAX_BLOCK_WARPS,
            f"warp groups times warps is 1..{MAX_BLOCK_WARPS}; got {self.warp_groups}",
        )
        self.require(groups <= 15 or warps == 1, f"at most 15 warp groups of several warps; got {self.warp_groups}")

    @property
    def row_bytes(self) -> int:
        return self.hidden * DTYPE_BYTES[self.dtype]

    @property
    def row_vectors(self) -> int:
        return self.row_bytes // PIECE_BYTES

    @property
    def scale_words(self) -> int:
        return scale_words(self.hidden, self.dtype)

    @property
    def piece_words(self) -> int:
        return PIECE_WORDS[self.wire]

    @property
    def row_pieces(self) -> int:
        return ceil_div(self.row_bytes // 4, self.piece_words)

    @property
    def teams(self) -> int:
        return self.warp_groups.groups

    @property
    def team_threads(self) -> int:
        return self.warp_groups.warps * WARP_SIZE

    @property
    def block_threads(self) -> int:
        return self.teams * self.team_threads

    @property
    def max_local_experts(self) -> int:
        return ceil_div(self.num_experts, self.num_ranks)

    @property
    def masked(self) -> bool:
        """Whether a rank that does not come is marked and left out; else that is an error."""
        return self.peers == "masked"

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(PHASES)


_PLACES = (
    Param("uint64_t", "consumed_offset", "[rank] u32: the last epoch that the peer has read"),
    Param("uint64_t", "rows_offset", "[half][source][capacity] records, each at its token's number"),
    Param("uint64_t", "tags_offset", "[half][source][capacity] u64: epoch of the row there"),
)
_COMMON_32 = (
    Param("Blocks", "senders", "blocks that send"),
    Param("Blocks", "receivers", "blocks that receive; the same ones where there are too few"),
    Param("uint32_t", "rank", "this rank"),
    Param("uint32_t", "tokens", "rows of this rank's token tensor"),
    Param("uint32_t", "capacity", "tokens of a source that receive buffers have room for"),
    Param("uint32_t", "max_tokens", "tokens that a rank may send in this call, up to the capacity"),
)


def _common(spec: LowLatencySpec) -> tuple[Param, ...]:
    return (
        Param("Control*", "control", "this op's epoch"),
        *(masked.WAITING if spec.masked else (Param("uint32_t*", "aborted", "this object's abort word"),)),
        Param("Failure*", "failure", "where the host reads what went wrong"),
        *_PLACES,
    )


def scale_words(hidden: int, dtype: str) -> int:
    """32-bit words of scales that travel with a row."""
    per_word = SCALES_PER_WORD[dtype]
    return hidden // (FP8_GROUP * per_word) if per_word else 0


@dataclass(frozen=True)
class LowLatencyDispatch(LowLatencySpec, family="ll", op="dispatch"):
    """Sends each token once to every rank that holds one of its experts and fans it out there, expert by expert."""

    @property
    def route_pieces(self) -> int:
        """Pieces that tell what one token selects."""
        return ceil_div(self.num_topk, IDS_OF_PIECE)

    @property
    def routes_ahead(self) -> int:
        """Tokens whose routes a thread asks for at once. With few ranks there are few, and more text takes longer to
        fetch than that saves; only small blocks have the registers.
        """
        return max(1, 8 // self.route_pieces) if self.num_ranks > 4 and self.block_threads <= 128 else 1

    @property
    def head_pieces(self) -> int:
        """Pieces ahead of a row: its selections' weights, then its scales."""
        return ceil_div(self.num_topk, self.piece_words) + ceil_div(self.scale_words, self.piece_words)

    def validate(self) -> None:
        super().validate()
        self.require(
            self.shared_bytes <= MAX_SHARED_BYTES,
            f"a block has {MAX_SHARED_BYTES:,} bytes of shared memory and {self.warp_groups} warp groups need "
            f"{self.shared_bytes:,} here: fewer groups, each of more warps, need less",
        )

    @property
    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory: per team a head that goes and one that comes with its targets, and
        tokens per expert; those of the first block by source, and tokens per rank.
        """
        groups = self.hidden // FP8_GROUP if self.scale_words else 0
        head = (self.head_pieces * self.piece_words + groups) * 4
        incoming = head + self.num_topk * 16 + self.route_pieces * IDS_OF_PIECE * 2 + 16
        tally = 4 * (self.max_local_experts + 1)
        verdicts = 4 * (self.num_ranks + self.teams) + 16 if self.masked else 0
        return self.teams * (head + incoming + tally) + self.num_ranks * tally + 2 * 4 * self.num_ranks + verdicts + 64

    @property
    def record_bytes(self) -> int:
        return (self.head_pieces + self.row_pieces) * PIECE_BYTES

    @cached_property
    def params(self) -> ParamStruct:
        layout = "[local experts, scale words, ranks * max_tokens]"
        scales = (Param("uint32_t*", "scales", layout),) if self.scale_words else ()
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                Param("const uint8_t*", "x", "[tokens, hidden]"),
                Param("const void*", "topk_idx", "[tokens, topk] int32 or int64"),
                Param("const float*", "topk_weights", "[tokens, topk]; null: every weight is 1"),
                Param("uint8_t*", "out", "[local experts, ranks * max_tokens, hidden]"),
                *scales,
                Param("int32_t*", "counts", "[local experts]: rows of each expert"),
                Param("int32_t*", "total_counts", "[local experts], to which counts are added; or null"),
                Param("int32_t*", "ranges", "[local experts, ranks, 2]: rows of each source, and the first of them"),
                Param("int32_t*", "row_tokens", "[local experts, ranks * max_tokens]: the source's token of each row"),
                Param("int32_t*", "first_rows", "[ranks + 1]: first row of each other source, then the number of rows"),
                Param("int32_t*", "row_origin", "[(ranks - 1) * max_tokens]: source * max_tokens + token of each"),
                Param("int32_t*", "row_slots", "[ranks * max_tokens, topk]: row in `out` or -1; own tokens last"),
                Param("float*", "row_weights", "[ranks * max_tokens, topk]"),
                Param("uint64_t*", "token_ranks", "[max_tokens]: bit r: rank r holds an expert of this token"),
                *(masked.SELECTED if self.masked else ()),
                Param("const int32_t*", "num_tokens", "one number: tokens of this call; null: `tokens`"),
                Param("int32_t*", "tokens_sent", "one number: the tokens of this call"),
                Param("uint64_t", "x_stride", "bytes from one token of x to the next"),
                Param("uint64_t", "routes_offset", "[half][source][1 + capacity * route pieces]"),
                *_common(self),
                Param("uint64_t", "timeout_ns", "how long one wait may take"),
                *_COMMON_32,
                Param("uint32_t", "tellers", "first blocks, which tell the routes"),
                Param("uint32_t", "shares", "that a token's destinations are dealt out to"),
                Param("uint32_t", "wide_ids", "1: topk_idx is int64"),
            )
        )


@dataclass(frozen=True)
class LowLatencyCombine(LowLatencySpec, family="ll", op="combine"):
    """Sends one partial sum per (token, rank) back to the token's owner, who adds them in rank order."""

    dtype: str = tag(one_of=("bf16",))
    weights: str = tag(one_of=("atdispatch", "atcombine"))

    @property
    def record_bytes(self) -> int:
        return self.row_pieces * PIECE_BYTES

    @property
    def resident_blocks(self) -> int:
        """Of a multiprocessor."""
        return 2 if self.block_threads <= 256 else 1

    @property
    def two_rows_ahead(self) -> bool:
        """Whether a thread has the registers for its parts of two rows; else they would spill."""
        steps = ceil_div(self.row_pieces, self.team_threads)
        return steps * self.block_threads * self.resident_blocks <= 2048

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                Param("const uint8_t*", "y", "[local experts, ranks * max_tokens, hidden]"),
                Param("uint8_t*", "out", "[tokens, hidden]"),
                Param("const float*", "topk_weights", "[tokens, topk] if given at combine, else null"),
                Param("const int32_t*", "first_rows", "[ranks + 1]: first row of each other source, then their number"),
                Param(
                    "const int32_t*", "row_origin", "[(ranks - 1) * max_tokens]: source * max_tokens + token of each"
                ),
                Param("const int32_t*", "row_slots", "[ranks * max_tokens, topk]: row in `y` or -1; own tokens last"),
                Param("const float*", "row_weights", "[ranks * max_tokens, topk]"),
                Param("const uint64_t*", "token_ranks", "[max_tokens]: bit r: rank r holds an expert of this token"),
                *(masked.SELECTED if self.masked else ()),
                Param("const int32_t*", "tokens_sent", "one number: the tokens of that dispatch"),
                *_common(self),
                call_words.PLACE,
                Param("uint64_t", "weights_offset", "[half][source][capacity][weight pieces]"),
                Param("uint64_t", "timeout_ns", "how long one wait may take"),
                *_COMMON_32,
                Param("uint32_t", "call", "call word: one bit"),
                *(masked.RENORMALIZE if self.masked else ()),
            )
        )


@dataclass(frozen=True)
class Regions:
    """Where one op's parts lie in every rank's symmetric memory: byte offsets."""

    consumed: int
    calls: int
    routes: int
    rows: int
    tags: int
    weights: int
    end: int


REGION_ALIGNMENT = 256


def regions(spec: LowLatencyDispatch | LowLatencyCombine, max_tokens: int, start: int) -> Regions:
    """Lays an op's regions out from byte `start` on: two halves of each, for even and odd epochs."""
    rows = HALVES * spec.num_ranks * max_tokens
    sizes = (
        spec.num_ranks * 4,
        0 if isinstance(spec, LowLatencyDispatch) else call_words.REGION_BYTES,
        _routes_bytes(spec, max_tokens) if isinstance(spec, LowLatencyDispatch) else 0,
        rows * spec.record_bytes,
        rows * 8 if spec.wire == "row" else 0,
        # Reserved for either combine, so that weights may come at combine on any call.
        0 if isinstance(spec, LowLatencyDispatch) else rows * ceil_div(spec.num_topk, WEIGHT_PIECE_WORDS) * PIECE_BYTES,
    )
    ends = list(accumulate((ceil_div(size, REGION_ALIGNMENT) * REGION_ALIGNMENT for size in sizes), initial=start))
    return Regions(*ends)


def _routes_bytes(spec: LowLatencyDispatch, max_tokens: int) -> int:
    return HALVES * spec.num_ranks * (1 + max_tokens * spec.route_pieces) * PIECE_BYTES
