# SPDX-License-Identifier: Apache-2.0
"""Family `ll`, low latency: one fused kernel sends and receives; rows land in per-source staging.

This module is the host half of the kernels in `templates/low_latency/`: their Specs, their parameter structs, and where
things lie in symmetric memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from moegen.codegen import call_words
from moegen.codegen.params import Param, ParamStruct, read_if
from moegen.codegen.spec import Spec, WarpGroups, rare, tag
from moegen.formats import BF16, ROWS, Format
from moegen.limits import (
    MAX_BLOCK_WARPS,
    MAX_EXPERTS,
    MAX_RANKS,
    MAX_ROW_BYTES,
    MAX_SHARED_BYTES,
    MAX_TEAMS,
    MAX_TOPK,
    PACKET_BYTES,
    PACKET_WORDS,
    VECTOR_BYTES,
    WARP_SIZE,
    ceil_div,
)
from moegen.low_latency import active_params
from moegen.tuning import under_way
from moegen.tuning.blocks import COMBINE_RESIDENT_BLOCKS, COMBINE_RESIDENT_THREADS

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

WIRE_WORDS = {"inline": PACKET_WORDS, "row": VECTOR_BYTES // 4}
"""32-bit payload words in a unit, the 16 bytes of a row that cross at once: `inline` spends the fourth on the epoch."""

IDS_OF_PACKET = 2 * PACKET_WORDS
"""16-bit expert ids in a packet of routes."""

PHASE_WORDS = ("whole", "send", "receive")
"""What of an op one launch does: all of it, or (with hooks) one half, the other following in a launch of its own."""


@dataclass(frozen=True)
class LowLatencySpec(Spec):
    """What dispatch and combine of this family have in common."""

    dtype: str = tag(one_of=tuple(word for word, form in ROWS.items() if not form.given))
    layout: str = tag(one_of=("expert",))
    num_ranks: int = tag("r")
    hidden: int = tag("h")
    num_topk: int = tag("k")
    num_experts: int = tag("e")
    path: str = tag(one_of=("ipc",))
    warp_groups: WarpGroups = tag("w")
    wire: str = tag(one_of=tuple(WIRE_WORDS))
    phase: str = tag(one_of=PHASE_WORDS)
    peers: str = rare("required", "masked")
    phase_words: ClassVar[Mapping[str, str]] = PHASES

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
            self.row_bytes > 0 and BF16.row_bytes(self.hidden) <= MAX_ROW_BYTES and self.row_bytes % VECTOR_BYTES == 0,
            f"a row is a multiple of {VECTOR_BYTES} bytes up to {MAX_ROW_BYTES} (of bf16); hidden {self.hidden} in "
            f"{self.dtype} gives {self.row_bytes}",
        )
        group = self.format.word_elements
        self.require(
            not group or self.hidden % group == 0,
            f"hidden is a multiple of {group} in {self.dtype}; got {self.hidden}",
        )
        self.require(
            groups >= 1 and warps >= 1 and groups * warps <= MAX_BLOCK_WARPS,
            f"warp groups times warps is 1..{MAX_BLOCK_WARPS}; got {self.warp_groups}",
        )
        self.require(
            groups <= MAX_TEAMS or warps == 1,
            f"at most {MAX_TEAMS} warp groups of several warps; got {self.warp_groups}",
        )

    @property
    def format(self) -> Format:
        return ROWS[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.format.row_bytes(self.hidden)

    @property
    def row_vectors(self) -> int:
        return self.row_bytes // VECTOR_BYTES

    @property
    def scale_words(self) -> int:
        """32-bit words of scales that travel with a row."""
        return self.format.scale_words(self.hidden)

    @property
    def unit_words(self) -> int:
        return WIRE_WORDS[self.wire]

    @property
    def row_units(self) -> int:
        return ceil_div(self.row_bytes // 4, self.unit_words)

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
    def sends(self) -> bool:
        return self.phase != "receive"

    @property
    def receives(self) -> bool:
        return self.phase != "send"


def _common(spec: LowLatencySpec) -> tuple[Param, ...]:
    of_row = "[half][source][capacity] u64: epoch of the row there"
    return (
        Param("Control*", "control", "this op's epoch"),
        *(_waiting(spec) if spec.masked else (Param("uint32_t*", "aborted", "this object's abort word"),)),
        Param("Failure*", "failure", "where the host reads what went wrong"),
        Param("uint64_t", "consumed_offset", "[rank] u32: the last epoch that the peer has read", when=spec.sends),
        Param("uint64_t", "rows_offset", "[half][source][capacity] slots, each with its token's number"),
        Param("uint64_t", "tags_offset", of_row, when=spec.wire == "row"),
    )


def _waiting(spec: LowLatencySpec) -> tuple[Param, ...]:
    return (*active_params.WAITING, *read_if(spec.receives, *active_params.VERDICTS))


def _roles(spec: LowLatencySpec) -> tuple[Param, ...]:
    return (
        Param("Blocks", "senders", "blocks that send", when=spec.sends),
        Param("Blocks", "receivers", "blocks that receive; the same ones where there are too few", when=spec.receives),
        Param("uint32_t", "rank", "this rank"),
    )


_TOKENS = Param("uint32_t", "tokens", "rows of this rank's token tensor")
_CAPACITY = Param("uint32_t", "capacity", "tokens of a source that receive buffers have room for")
_MAX_TOKENS = Param("uint32_t", "max_tokens", "tokens that a rank may send in this call, up to the capacity")


@dataclass(frozen=True)
class LowLatencyDispatch(LowLatencySpec, family="ll", op="dispatch"):
    """Sends each token once to every rank that holds one of its experts and fans it out there, expert by expert."""

    @property
    def awaited(self) -> Mapping[str, bool]:
        return {"kPeerReady": self.sends, "kRoutes": self.receives, "kRow": self.receives}

    @property
    def route_packets(self) -> int:
        """Packets that tell what one token selects."""
        return ceil_div(self.num_topk, IDS_OF_PACKET)

    @property
    def routes_ahead(self) -> int:
        """Tokens whose routes a thread asks for at once."""
        if self.num_ranks <= under_way.ROUTES_AHEAD_RANKS or self.block_threads > under_way.ROUTES_AHEAD_THREADS:
            return 1
        return max(1, under_way.ROUTES_AHEAD_PACKETS // self.route_packets)

    @property
    def head_units(self) -> int:
        """Units ahead of a row: its selections' weights, then its scales."""
        return ceil_div(self.num_topk, self.unit_words) + ceil_div(self.scale_words, self.unit_words)

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
        group = self.format.group
        groups = self.hidden // group if group else 0
        head = (self.head_units * self.unit_words + groups) * 4
        incoming = head + self.num_topk * 16 + self.route_packets * IDS_OF_PACKET * 2 + 16
        tally = 4 * (self.max_local_experts + 1)
        verdicts = 4 * (self.num_ranks + self.teams) + 16 if self.masked else 0
        return self.teams * (head + incoming + tally) + self.num_ranks * tally + 2 * 4 * self.num_ranks + verdicts + 64

    @property
    def slot_bytes(self) -> int:
        return (self.head_units + self.row_units) * PACKET_BYTES

    @property
    def _results(self) -> tuple[Param, ...]:
        scales = "[local experts, scale words, ranks * max_tokens]"
        return (
            Param("uint8_t*", "out", "[local experts, ranks * max_tokens, hidden]"),
            Param("uint32_t*", "scales", scales, when=self.scale_words > 0),
            Param("int32_t*", "counts", "[local experts]: rows of each expert"),
            Param("int32_t*", "total_counts", "[local experts], to which counts are added; or null"),
            Param("int32_t*", "ranges", "[local experts, ranks, 2]: rows of each source, and the first of them"),
            Param("int32_t*", "row_tokens", "[local experts, ranks * max_tokens]: the source's token of each row"),
            Param("int32_t*", "first_rows", "[ranks + 1]: first row of each other source, then the number of rows"),
            Param("int32_t*", "row_origin", "[(ranks - 1) * max_tokens]: source * max_tokens + token of each"),
            Param("int32_t*", "row_slots", "[ranks * max_tokens, topk]: row in `out` or -1; own tokens last"),
            Param("float*", "row_weights", "[ranks * max_tokens, topk]"),
        )

    @cached_property
    def params(self) -> ParamStruct:
        sends, receives = self.sends, self.receives
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                *read_if(
                    sends,
                    Param("const uint8_t*", "x", "[tokens, hidden]"),
                    Param("const void*", "topk_idx", "[tokens, topk] int32 or int64"),
                    Param("const float*", "topk_weights", "[tokens, topk]; null: every weight is 1"),
                ),
                *read_if(receives, *self._results),
                *read_if(
                    sends,
                    Param("uint64_t*", "token_ranks", "[max_tokens]: bit r: rank r holds an expert of this token"),
                    *(active_params.SELECTED if self.masked else ()),
                    Param("const int32_t*", "num_tokens", "one number: tokens of this call; null: `tokens`"),
                    Param("int32_t*", "tokens_sent", "one number: the tokens of this call"),
                    Param("uint64_t", "x_stride", "bytes from one token of x to the next"),
                ),
                Param("uint64_t", "routes_offset", "[half][source][1 + capacity * route packets]"),
                *_common(self),
                Param("uint64_t", "timeout_ns", "how long one wait may take"),
                *_roles(self),
                *read_if(sends, _TOKENS),
                _CAPACITY,
                *read_if(receives, _MAX_TOKENS),
                *read_if(
                    sends,
                    Param("uint32_t", "tellers", "first blocks, which tell the routes"),
                    Param("uint32_t", "shares", "that a token's destinations are dealt out to"),
                    Param("uint32_t", "wide_ids", "1: topk_idx is int64"),
                ),
            )
        )


@dataclass(frozen=True)
class LowLatencyCombine(LowLatencySpec, family="ll", op="combine"):
    """Sends one partial sum per (token, rank) back to the token's owner, who adds them in rank order."""

    dtype: str = tag(one_of=("bf16",))
    weights: str = tag(one_of=("atdispatch", "atcombine"))

    @property
    def slot_bytes(self) -> int:
        return self.row_units * PACKET_BYTES

    @property
    def resident_blocks(self) -> int:
        """Of a multiprocessor."""
        return COMBINE_RESIDENT_BLOCKS if self.block_threads <= COMBINE_RESIDENT_THREADS else 1

    @property
    def two_rows_ahead(self) -> bool:
        """Whether a thread has the registers for its parts of two rows; else they would spill."""
        steps = ceil_div(self.row_units, self.team_threads)
        return steps * self.block_threads * self.resident_blocks <= under_way.TWO_ROWS_VECTORS

    @property
    def awaited(self) -> Mapping[str, bool]:
        return {"kPeerReady": self.sends, "kWeights": self.sends and self.late, "kPartial": self.receives}

    @property
    def late(self) -> bool:
        """Whether weights come with this op: a launch that sends sends them first."""
        return self.weights == "atcombine"

    @property
    def _of_dispatch(self) -> tuple[Param, ...]:
        first_rows = "[ranks + 1]: first row of each other source, then their number"
        row_slots = "[ranks * max_tokens, topk]: row in `y` or -1; own tokens last"
        return (
            Param("const int32_t*", "first_rows", first_rows),
            Param("const int32_t*", "row_origin", "[(ranks - 1) * max_tokens]: source * max_tokens + token of each"),
            Param("const int32_t*", "row_slots", row_slots),
            Param("const float*", "row_weights", "[ranks * max_tokens, topk]", when=not self.late),
        )

    @cached_property
    def params(self) -> ParamStruct:
        sends, receives = self.sends, self.receives
        sends_late = sends and self.late
        makes_up = receives and self.masked  # for what is missing
        looks = sends or self.masked  # at call words: a wait for a rank that may be missing does, too
        at_combine = "[tokens, topk] if given at combine, else null"
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                Param("const uint8_t*", "y", "[local experts, ranks * max_tokens, hidden]", when=sends),
                Param("uint8_t*", "out", "[tokens, hidden]", when=receives),
                Param("const float*", "topk_weights", at_combine, when=sends_late or makes_up),
                *read_if(sends, *self._of_dispatch),
                Param("const uint64_t*", "token_ranks", "[max_tokens]: bit r: rank r holds an expert of this token"),
                *(read_if(receives, *active_params.SELECTED) if self.masked else ()),
                Param("const int32_t*", "tokens_sent", "one number: the tokens of that dispatch"),
                *_common(self),
                *read_if(looks, call_words.PLACE),
                Param("uint64_t", "weights_offset", "[half][source][capacity][weight packets]", when=sends_late),
                Param("uint64_t", "timeout_ns", "how long one wait may take"),
                *_roles(self),
                _TOKENS,
                _CAPACITY,
                *read_if(sends, _MAX_TOKENS),
                Param("uint32_t", "call", "call word: one bit", when=not sends),
                *(read_if(receives, active_params.RENORMALIZE) if self.masked else ()),
            )
        )
