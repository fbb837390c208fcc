# SPDX-License-Identifier: Apache-2.0
"""Family `ll`, low latency: one fused kernel sends and receives; rows land in per-source staging.

This module is the host half of `templates/ll_dispatch.cu.jinja` and `templates/ll_combine.cu.jinja`: their Specs,
their parameter structs, where things lie in symmetric memory, and how many blocks to launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

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
    tag,
)

PHASES = {
    "kPeerReady": "the release of its receive buffer",
    "kCounts": "the token counts",
    "kRow": "a token row",
    "kWeights": "the top-k weights of a token",
    "kPartial": "a partial sum",
}
"""What a wait of this family waits for: the name in the kernel, and in words for PeerTimeoutError."""

PIECE_WORDS = {"inline": 3, "row": 4}
"""32-bit payload words in each 16 bytes of a staged record: `inline` spends the fourth on the epoch."""

PIECE_BYTES = 16
COUNT_PIECE_WORDS = 3
POSITION_BITS = 20
"""A header word holds an expert id above these bits and below them the token's place among its source's rows for
that expert, so a rank may send at most 2**20 tokens."""

HALVES = 2
"""Receive buffers per op: an epoch writes into the one that the epoch before last used, so that a sender need not wait
until the previous epoch has been read."""

WINDOW_IDS = 4096
"""Expert ids that a block keeps in shared memory (8 KiB): all of them up to 512 tokens of 8."""

MAX_SHARED_BYTES = 48 * 1024
"""Static shared memory of a block on every GPU."""

MAX_TOKENS_PER_RANK = 1 << POSITION_BITS


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class LowLatencySpec(Spec):
    """What dispatch and combine of this family have in common."""

    dtype: str = tag(one_of=tuple(DTYPE_BYTES))
    layout: str = tag(one_of=("expert",))
    num_ranks: int = tag("r")
    hidden: int = tag("h")
    num_topk: int = tag("k")
    num_experts: int = tag("e")
    path: str = tag(one_of=("ipc",))
    warp_groups: WarpGroups = tag("w")
    wire: str = tag(one_of=tuple(PIECE_WORDS))

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
            0 < self.row_bytes <= MAX_ROW_BYTES and self.row_bytes % 16 == 0,
            f"a row is a multiple of 16 bytes up to {MAX_ROW_BYTES}; hidden {self.hidden} gives {self.row_bytes}",
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
    def row_words(self) -> int:
        return self.row_bytes // 4

    @property
    def piece_words(self) -> int:
        return PIECE_WORDS[self.wire]

    @property
    def row_pieces(self) -> int:
        return ceil_div(self.row_words, self.piece_words)

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
    def count_pieces(self) -> int:
        """Pieces of one source's counts: its rows, then its tokens per local expert."""
        return ceil_div(1 + self.max_local_experts, COUNT_PIECE_WORDS)

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(PHASES)

    @property
    def position_bits(self) -> int:
        return POSITION_BITS


_COMMON = (
    Param("const int32_t*", "num_tokens", "one number: tokens of this call, at most `tokens`; null: `tokens`"),
    Param("Control*", "control", "this op's epoch"),
    Param("uint32_t*", "aborted", "this object's abort word"),
    Param("Failure*", "failure", "where the host reads what went wrong"),
    Param("uint64_t", "consumed_offset", "[rank] u32: the last epoch that the peer has read"),
    Param("uint64_t", "rows_offset", "[half][source][max_tokens] records"),
    Param("uint64_t", "tags_offset", "[half][source][max_tokens] u64: epoch of the row there"),
)
_COMMON_32 = (
    Param("uint32_t", "rank", "this rank"),
    Param("uint32_t", "tokens", "rows of this rank's token tensor"),
    Param("uint32_t", "max_tokens", "capacity: tokens that a rank may send"),
)


def window_tokens(num_topk: int, teams: int) -> int:
    """Tokens whose selections a block keeps in shared memory; at least one round's."""
    return max(WINDOW_IDS // num_topk, teams)


def header_pieces(num_topk: int, wire: str) -> int:
    """Pieces of a record's header: token, then per selection its expert and place, then its weight."""
    return ceil_div(1 + 2 * num_topk, PIECE_WORDS[wire])


def dispatch_shared_bytes(num_ranks: int, num_experts: int, num_topk: int, wire: str, teams: int) -> int:
    """Upper bound of a dispatch block's shared memory: per team what goes out and what comes in; ids; counts."""
    header = header_pieces(num_topk, wire) * PIECE_WORDS[wire] * 4
    outgoing = header + num_ranks * (8 + 4 + 4) + 8
    incoming = header + num_topk * 8 + 16
    ids = window_tokens(num_topk, teams) * num_topk * 2
    counts = 2 * (num_experts + num_ranks) + num_ranks * (1 + ceil_div(num_experts, num_ranks))
    return teams * (outgoing + incoming) + ids + counts * 4 + 64


@dataclass(frozen=True)
class LowLatencyDispatch(LowLatencySpec, family="ll", op="dispatch"):
    """Sends each token once to every rank that holds one of its experts and fans it out there, expert by expert."""

    @property
    def header_pieces(self) -> int:
        return header_pieces(self.num_topk, self.wire)

    def validate(self) -> None:
        super().validate()
        self.require(
            self.shared_bytes <= MAX_SHARED_BYTES,
            f"a block has {MAX_SHARED_BYTES:,} bytes of shared memory and {self.warp_groups} warp groups need "
            f"{self.shared_bytes:,} here: fewer groups, each of more warps, need less",
        )

    @property
    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory."""
        return dispatch_shared_bytes(self.num_ranks, self.num_experts, self.num_topk, self.wire, self.teams)

    @property
    def window_tokens(self) -> int:
        """Tokens whose selections a block keeps in shared memory."""
        return window_tokens(self.num_topk, self.teams)

    @property
    def record_bytes(self) -> int:
        return (self.header_pieces + self.row_pieces) * PIECE_BYTES

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                Param("const uint8_t*", "x", "[tokens, hidden]"),
                Param("const void*", "topk_idx", "[tokens, topk] int32 or int64"),
                Param("const float*", "topk_weights", "[tokens, topk]; null: every weight is 1"),
                Param("uint8_t*", "out", "[local experts, ranks * max_tokens, hidden]"),
                Param("int32_t*", "counts", "[local experts]: rows of each expert"),
                Param("int32_t*", "ranges", "[local experts, ranks, 2]: first row and rows of each source"),
                Param("int32_t*", "rows_received", "one number: rows from other ranks"),
                Param("int32_t*", "row_origin", "[(ranks - 1) * max_tokens]: source * max_tokens + token of each"),
                Param("int32_t*", "row_slots", "[ranks * max_tokens, topk]: row in `out` or -1; own tokens last"),
                Param("float*", "row_weights", "[ranks * max_tokens, topk]"),
                Param("uint64_t*", "token_ranks", "[max_tokens]: bit r: rank r holds an expert of this token"),
                Param("int32_t*", "tokens_sent", "one number: the tokens of this call"),
                Param("uint64_t", "x_stride", "bytes from one token of x to the next"),
                Param("uint64_t", "counts_offset", "[half][source][count pieces]"),
                *_COMMON,
                Param("uint64_t", "timeout_ns", "how long the waits of this launch may take together"),
                *_COMMON_32,
                Param("uint32_t", "wide_ids", "1: topk_idx is int64"),
            )
        )


@dataclass(frozen=True)
class LowLatencyCombine(LowLatencySpec, family="ll", op="combine"):
    """Sends one partial sum per (token, rank) back to the token's owner, who adds them in rank order."""

    weights: str = tag(one_of=("atdispatch", "atcombine"))

    @property
    def record_bytes(self) -> int:
        return self.row_pieces * PIECE_BYTES

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                Param("const uint8_t*", "y", "[local experts, ranks * max_tokens, hidden]"),
                Param("uint8_t*", "out", "[tokens, hidden]"),
                Param("const float*", "topk_weights", "[tokens, topk] if given at combine, else null"),
                Param("const int32_t*", "rows_received", "one number: rows from other ranks"),
                Param(
                    "const int32_t*", "row_origin", "[(ranks - 1) * max_tokens]: source * max_tokens + token of each"
                ),
                Param("const int32_t*", "row_slots", "[ranks * max_tokens, topk]: row in `y` or -1; own tokens last"),
                Param("const float*", "row_weights", "[ranks * max_tokens, topk]"),
                Param("const uint64_t*", "token_ranks", "[max_tokens]: bit r: rank r holds an expert of this token"),
                *_COMMON,
                Param("uint64_t", "weights_offset", "[half][source][max_tokens][weight pieces]"),
                Param("uint64_t", "timeout_ns", "how long the waits of this launch may take together"),
                *_COMMON_32,
            )
        )


@dataclass(frozen=True)
class Regions:
    """Where one op's parts lie in every rank's symmetric memory: byte offsets."""

    consumed: int
    counts: int
    rows: int
    tags: int
    weights: int
    end: int


REGION_ALIGNMENT = 256


def regions(spec: LowLatencyDispatch | LowLatencyCombine, max_tokens: int, start: int) -> Regions:
    """Lays an op's regions out from byte `start` on: two halves of each, for even and odd epochs."""
    rows = HALVES * spec.num_ranks * max_tokens
    dispatch = isinstance(spec, LowLatencyDispatch)
    sizes = (
        spec.num_ranks * 4,
        HALVES * spec.num_ranks * spec.count_pieces * PIECE_BYTES if dispatch else 0,
        rows * spec.record_bytes,
        rows * 8 if spec.wire == "row" else 0,
        # Reserved for either combine, so that weights may come at combine on any call.
        0 if dispatch else rows * ceil_div(spec.num_topk, COUNT_PIECE_WORDS) * PIECE_BYTES,
    )
    ends = list(accumulate((ceil_div(size, REGION_ALIGNMENT) * REGION_ALIGNMENT for size in sizes), initial=start))
    return Regions(*ends)


def num_blocks(spec: LowLatencySpec, max_tokens: int, resident_blocks: int) -> int:
    """Blocks to launch: a team for each row that may arrive or be sent and for each rank to tell the counts, never more
    than can run at the same time.
    """
    ranks = spec.num_ranks
    return max(1, min(resident_blocks, ceil_div((ranks + 1) * max_tokens + ranks, spec.teams)))
