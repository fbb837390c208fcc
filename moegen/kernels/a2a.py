# SPDX-License-Identifier: Apache-2.0
"""Family `a2a`, one-sided: rows of any width go straight to where the receiver's user reads them, rank by rank.

This module is the host half of `templates/a2a_dispatch.cu.jinja` and `templates/a2a_combine.cu.jinja`: their Specs and
their parameter structs. The units in which payloads move are in `moegen.kernels.a2a_payloads`; where things lie and
which blocks do what, in `moegen.kernels.a2a_layout`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moegen.kernels.a2a_params import BEGIN, ROLES
from moegen.kernels.a2a_payloads import UNITS, BulkRow, Payload, RowBytes
from moegen.kernels.a2a_results import RESULTS, Result, in_whole_tiles
from moegen.kernels.call_words import FIELDS, PLACE
from moegen.kernels.ht import require_routing
from moegen.kernels.ll import MAX_SHARED_BYTES, ceil_div
from moegen.kernels.params import Param, ParamStruct
from moegen.kernels.spec import (
    MAX_BLOCK_WARPS,
    MAX_RANKS,
    MAX_ROW_BYTES,
    WARP_SIZE,
    Spec,
    WarpGroups,
    rare,
    tag,
)

PHASES = {
    "kPeerReady": "the end of its reading of the rows before",
    "kCounts": "how many rows it sends",
    "kStats": "its statistics",
    "kRows": "all its rows",
    "kPresence": "its beginning",
    "kPartial": "a row to be added",
}
"""What a wait of this family waits for: the name in the kernel, and in words for PeerTimeoutError."""

MAX_PAYLOADS = 16
MAX_STATS = 1024
MAX_SENDERS = 256
"""Blocks that send rows in one launch; each signals for itself."""

PIECE_BYTES = 16
PIECE_WORDS = 3
AHEAD = 7
"""Units of a row that a thread has under way at once; seven divide rows of 7168 bf16 between 128 threads."""

ROW_DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4, "e4m3": 1}
"""What combine adds up: bytes of an element."""


STAGES = 2
"""Of a team whose rows travel by bulk copies."""

MAX_STAGE_BYTES = 200 * 1024
"""Of all stages of a block: an H100 grants 227 KiB of shared memory."""


@dataclass(frozen=True)
class OneSidedSpec(Spec):
    """What dispatch and combine of this family have in common; both begin with one more field."""

    @property
    def team_threads(self) -> int:
        return self.groups.warps * WARP_SIZE

    @property
    def teams(self) -> int:
        return self.groups.groups

    @property
    def block_threads(self) -> int:
        return self.teams * self.team_threads

    @property
    def groups(self) -> WarpGroups:
        raise NotImplementedError

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(PHASES)

    def require_groups(self) -> None:
        groups, warps = self.groups.groups, self.groups.warps
        self.require(
            groups >= 1 and warps >= 1 and groups * warps <= MAX_BLOCK_WARPS,
            f"warp groups times warps is 1..{MAX_BLOCK_WARPS}; got {self.groups}",
        )
        self.require(groups <= 15 or warps == 1, f"at most 15 warp groups of several warps; got {self.groups}")


@dataclass(frozen=True)
class OneSidedDispatch(OneSidedSpec, family="a2a", op="dispatch"):
    """Sends a token's payloads once to every rank that holds one of its experts.

    A source's rows lie there in the order of its tokens, each payload in a plane [ranks, slots, width] of its own.
    """

    payloads: RowBytes = tag("p")
    num_ranks: int = tag("r")
    num_topk: int = tag("k")
    num_experts: int = tag("e")
    path: str = tag(one_of=("ipc",))
    warp_groups: WarpGroups = tag("w")
    copy: str = rare("vec", "bulk")

    def validate(self) -> None:
        require_routing(self)
        widths = self.payloads.widths
        self.require(1 <= len(widths) <= MAX_PAYLOADS, f"there are 1..{MAX_PAYLOADS} payloads; got {len(widths)}")
        self.require(
            min(widths) >= 1 and max(widths) <= MAX_ROW_BYTES,
            f"a payload has 1..{MAX_ROW_BYTES} bytes per token; got {self.payloads}",
        )
        self.require_groups()
        self.require(self.shared_bytes <= MAX_SHARED_BYTES, f"{self.shared_bytes} bytes of shared memory are too many")
        self.require(
            self.dynamic_shared_bytes <= MAX_STAGE_BYTES,
            f"bulk copies have {MAX_STAGE_BYTES} bytes of shared memory for {STAGES} rows of each of {self.teams} "
            f"teams; these take {self.dynamic_shared_bytes}: fewer warp groups, or copy=vec",
        )

    @property
    def groups(self) -> WarpGroups:
        return self.warp_groups

    @property
    def max_local_experts(self) -> int:
        return ceil_div(self.num_experts, self.num_ranks)

    @property
    def phase(self) -> str:
        """There is one launch: `parts/experts.cuh.jinja` asks."""
        return "whole"

    @property
    def destinations(self) -> int:
        """Ranks that one token may reach."""
        return min(self.num_ranks, self.num_topk)

    @property
    def shared_bytes(self) -> int:
        """Upper bound of a block's shared memory."""
        chunk = WARP_SIZE * (8 + 4 * self.destinations)
        counts = 2 * 4 * (self.block_threads // WARP_SIZE) * self.num_ranks
        return chunk + counts + 3 * 4 * self.num_ranks + 256

    @cached_property
    def rows(self) -> tuple[Payload, ...]:
        """The payloads, in order."""
        made = []
        for number, width in enumerate(self.payloads.widths):
            unit = next(size for size in UNITS if width % size == 0)
            made.append(Payload(number, UNITS[unit], width // unit))
        return tuple(made)

    @property
    def narrow(self) -> tuple[Payload, ...]:
        """Those of which a thread has one unit at most: all are asked for at once, ahead of the others."""
        return tuple(row for row in self.rows if row.units <= self.team_threads)

    @property
    def wide(self) -> tuple[Payload, ...]:
        """The others that go through registers."""
        return tuple(row for row in self.rows if row.units > self.team_threads and not self._is_bulk(row))

    def _is_bulk(self, row: Payload) -> bool:
        return self.copy == "bulk" and row.unit == UNITS[16] and row.units > self.team_threads

    @cached_property
    def bulk(self) -> tuple[BulkRow, ...]:
        """Those that bulk copies move: too wide for one step of a team, and of whole 16-byte vectors."""
        made, offset = [], 0
        for row in filter(self._is_bulk, self.rows):
            made.append(BulkRow(row.number, row.units, 16 * row.units, offset))
            offset += 16 * row.units
        return tuple(made)

    @property
    def stages(self) -> int:
        return STAGES

    @property
    def stage_bytes(self) -> int:
        return sum(row.bytes for row in self.bulk)

    @property
    def dynamic_shared_bytes(self) -> int:
        return STAGES * self.teams * self.stage_bytes

    @property
    def long(self) -> tuple[Payload, ...]:
        """Those of the wide ones that a team has not under way at once."""
        return tuple(row for row in self.wide if row.units > AHEAD * self.team_threads)

    @property
    def most_ahead(self) -> int:
        return AHEAD

    @property
    def max_senders(self) -> int:
        return MAX_SENDERS

    @property
    def blocks_bits(self) -> int:
        """Lowest bits of a call word, which are zero: the number of sending blocks travels in them."""
        return FIELDS["a2a_dispatch"][0].bits

    @property
    def stats_pieces(self) -> int:
        """Of a rank's statistics, at most."""
        return ceil_div(MAX_STATS, PIECE_WORDS)

    @cached_property
    def params(self) -> ParamStruct:
        number = len(self.payloads.widths)
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                Param("const uint8_t*", "payloads", "[tokens, width] of each", number),
                Param("uint64_t", "planes", "of each payload: [source][slots, width] in symmetric memory", number),
                Param("const void*", "topk_idx", "[tokens, topk] int32 or int64"),
                Param("const int32_t*", "num_tokens", "one number: tokens of this call; null: `tokens`"),
                Param("uint64_t*", "token_ranks", "[tokens]: bit r: rank r holds an expert of this token"),
                Param("int32_t*", "token_slots", "[tokens, destinations]: its slot with each of them"),
                Param("int32_t*", "tokens_sent", "one number: the tokens of this call"),
                Param("int32_t*", "counts", "[ranks]: rows from each source"),
                Param("const int32_t*", "stats", "[stats words] of this rank, or null"),
                Param("int32_t*", "gathered", "[ranks, stats words]"),
                Param("int32_t*", "unused_ids", "[ranks, slots, id words]: filled behind a source's rows; or null"),
                *BEGIN,
                Param("uint64_t", "call", "call word, whose lowest bits are zero"),
                Param("uint64_t", "counts_offset", "[half][source] pieces"),
                Param("uint64_t", "stats_offset", "[half][source][stats pieces]"),
                Param(
                    "uint64_t", "flags_offset", f"[source][{MAX_SENDERS}] u32: the last epoch whose rows it has sent"
                ),
                *ROLES,
                Param("uint32_t", "stats_words", "statistics of a rank"),
                Param("uint32_t", "id_words", "of a row of unused_ids"),
                Param("int32_t", "unused_id", "what it is filled with"),
                Param("uint32_t", "wide_ids", "1: topk_idx is int64"),
            )
        )


@dataclass(frozen=True)
class OneSidedCombine(OneSidedSpec, family="a2a", op="combine"):
    """Sends rows back to where they came from and adds those of a token up, in fp32 and in the order of the ranks."""

    dtype: str = tag(one_of=tuple(ROW_DTYPES))
    out: str = tag("to", one_of=tuple(RESULTS))
    num_ranks: int = tag("r")
    hidden: int = tag("h")
    destinations: int = tag("d")
    path: str = tag(one_of=("ipc",))
    warp_groups: WarpGroups = tag("w")
    rows: str = rare("pushed", "pulled")

    def validate(self) -> None:
        self.require(
            0 < self.row_bytes <= MAX_ROW_BYTES and self.row_bytes % 16 == 0,
            f"a row is a multiple of 16 bytes up to {MAX_ROW_BYTES}; hidden {self.hidden} in {self.dtype} gives "
            f"{self.row_bytes}",
        )
        self.require(1 <= self.num_ranks <= MAX_RANKS, f"num_ranks is 1..{MAX_RANKS}; got {self.num_ranks}")
        self.require(
            1 <= self.destinations <= self.num_ranks,
            f"a token reaches 1..{self.num_ranks} ranks; got destinations={self.destinations}",
        )
        group = self.result.group or 1
        self.require(
            self.hidden % group == 0,
            f"{self.out} has a scale for every {group} elements; hidden is a multiple of that, and got {self.hidden}",
        )
        self.require_groups()

    @property
    def groups(self) -> WarpGroups:
        return self.warp_groups

    @property
    def pulls(self) -> bool:
        """Whether the token's owner reads the rows where the experts' ranks have them; else these send them."""
        return self.rows == "pulled"

    @property
    def row_bytes(self) -> int:
        return self.hidden * ROW_DTYPES[self.dtype]

    @property
    def word_floats(self) -> int:
        """Elements in 32 bits."""
        return 4 // ROW_DTYPES[self.dtype]

    @property
    def result(self) -> Result:
        return RESULTS[self.out]

    @property
    def quantised(self) -> bool:
        return self.result.group != 0

    @property
    def out_place(self) -> str:
        """How the kernel's functions are told where a token's result goes."""
        return "const Result& out" if self.quantised else "uint8_t* out"

    @property
    def out_row_bytes(self) -> int:
        return self.hidden * self.result.bits // 8

    @property
    def out_bytes(self) -> int:
        """What a vector of 16 bytes becomes."""
        return 4 * self.word_floats * self.result.bits // 8

    @property
    def out_words(self) -> int:
        """32-bit words of it, the last perhaps in part."""
        return ceil_div(self.out_bytes, 4)

    @property
    def group_lanes(self) -> int:
        """Lanes whose vectors share a scale."""
        return self.result.group * ROW_DTYPES[self.dtype] // PIECE_BYTES

    @property
    def row_scales(self) -> int:
        return self.hidden // self.result.group

    @property
    def padded_scales(self) -> int:
        """Scales of a row that there is room for."""
        return in_whole_tiles(0, self.row_scales)[1] if self.result.tiled else self.row_scales

    @property
    def pair(self) -> str:
        """Rounds two sums to 16 bits each."""
        return {"bf16": "round_to_bf16x2", "fp16": "round_to_f16x2"}.get(self.out, "")

    @property
    def ahead(self) -> int:
        return max(1, min(AHEAD, ceil_div(self.row_bytes // PIECE_BYTES, self.team_threads)))

    @property
    def summed_ahead(self) -> int:
        """Of a row that is added: a thread has its sums, too."""
        floats = PIECE_BYTES // ROW_DTYPES[self.dtype]
        few = self.block_threads <= (256 if self.quantised and floats == 4 else 512)  # more would spill
        return max(1, min((16 if not few or (self.pulls and self.destinations > 2) else 32) // floats, self.ahead))

    @property
    def rows_ahead(self) -> int:
        """Of a token, that a thread asks for at once where it reads them in place; more would spill."""
        most = 4 if self.block_threads > 512 else 8 if self.quantised or self.dtype == "fp32" else 16
        return min(self.destinations, max(1, most // self.summed_ahead))

    @property
    def _places(self) -> tuple[Param, ...]:
        if self.pulls:
            return (Param("uint64_t", "rows_offset", "[source][slots, hidden]: what the experts of each rank made"),)
        return (
            Param("uint64_t", "rows_offset", "[half][rank][max_tokens] rows"),
            Param("uint64_t", "half_bytes", "of a half: room for the longest rows, whatever this kernel's"),
            Param("uint64_t", "tags_offset", "[half][rank][max_tokens] u32: epoch of the row there"),
        )

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                *(() if self.pulls else (Param("const uint8_t*", "y", "[ranks, slots, hidden]"),)),
                Param("uint8_t*", "out", "[tokens, hidden]"),
                *self.result.params,
                Param("const uint64_t*", "token_ranks", "[tokens]: bit r: rank r holds an expert of this token"),
                Param("const int32_t*", "token_slots", "[tokens, destinations]: its slot with each of them"),
                Param("const int32_t*", "tokens_sent", "one number: the tokens of that dispatch"),
                Param("const int32_t*", "counts", "[ranks]: rows from each source"),
                *BEGIN,
                Param("const Control*", "other_control", "dispatch's"),
                Param(
                    "const uint64_t*", "calls", "[parity][rank]: call words published to this rank, with their epochs"
                ),
                PLACE,
                *self._places,
                *ROLES,
                Param("uint32_t", "call", "call word"),
            )
        )
