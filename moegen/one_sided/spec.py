# SPDX-License-Identifier: Apache-2.0
"""Family `a2a`, one-sided: rows of any width go straight to where the receiver's user reads them, rank by rank.

This module is the host half of the kernels in `templates/one_sided/`: their Specs and their parameter structs. The
units in which payloads move are in `moegen.one_sided.payload_table`; where things lie and which blocks do what, in
`moegen.one_sided.regions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from moegen.codegen.call_words import FIELDS, PLACE
from moegen.codegen.params import Param, ParamStruct, read_if
from moegen.codegen.row_spec import require_routing
from moegen.codegen.spec import Spec, WarpGroups, rare, tag
from moegen.formats import RESULTS, SUMMANDS, Format
from moegen.limits import (
    MAX_BLOCK_WARPS,
    MAX_PAYLOADS,
    MAX_RANKS,
    MAX_ROW_BYTES,
    MAX_SENDERS,
    MAX_SHARED_BYTES,
    MAX_STAGE_BYTES,
    MAX_STATS,
    MAX_TEAMS,
    PACKET_WORDS,
    VECTOR_BYTES,
    WARP_SIZE,
    ceil_div,
)
from moegen.one_sided.common_params import BEGIN, roles_and_sizes
from moegen.one_sided.payload_table import UNITS, BulkRow, Payload, RowBytes
from moegen.tuning import under_way

PHASES = {
    "kPeerReady": "the end of its reading of the rows before",
    "kCounts": "how many rows it sends",
    "kStats": "its statistics",
    "kRows": "all its rows",
    "kPresence": "its beginning",
    "kPartial": "a row to be added",
}
"""What a wait of this family waits for: the name in the kernel, and in words for PeerTimeoutError."""


@dataclass(frozen=True)
class OneSidedSpec(Spec):
    """What dispatch and combine of this family have in common; both begin with one more field."""

    phase_words: ClassVar[Mapping[str, str]] = PHASES

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

    def require_groups(self) -> None:
        groups, warps = self.groups.groups, self.groups.warps
        self.require(
            groups >= 1 and warps >= 1 and groups * warps <= MAX_BLOCK_WARPS,
            f"warp groups times warps is 1..{MAX_BLOCK_WARPS}; got {self.groups}",
        )
        self.require(
            groups <= MAX_TEAMS or warps == 1, f"at most {MAX_TEAMS} warp groups of several warps; got {self.groups}"
        )


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
            f"bulk copies have {MAX_STAGE_BYTES} bytes of shared memory for {self.stages} rows of each of {self.teams} "
            f"teams; these take {self.dynamic_shared_bytes}: fewer warp groups, or copy=vec",
        )

    @property
    def groups(self) -> WarpGroups:
        return self.warp_groups

    @property
    def awaited(self) -> Mapping[str, bool]:
        return {"kPeerReady": True, "kCounts": True, "kStats": True, "kRows": self.num_ranks > 1}

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
        return self.copy == "bulk" and row.unit == UNITS[VECTOR_BYTES] and row.units > self.team_threads

    @cached_property
    def bulk(self) -> tuple[BulkRow, ...]:
        """Those that bulk copies move: too wide for one step of a team, and of whole 16-byte vectors."""
        made, offset = [], 0
        for row in filter(self._is_bulk, self.rows):
            made.append(BulkRow(row.number, row.units, VECTOR_BYTES * row.units, offset))
            offset += VECTOR_BYTES * row.units
        return tuple(made)

    @property
    def stages(self) -> int:
        return under_way.PAYLOAD_STAGES

    @property
    def stage_bytes(self) -> int:
        return sum(row.bytes for row in self.bulk)

    @property
    def dynamic_shared_bytes(self) -> int:
        return self.stages * self.teams * self.stage_bytes

    @property
    def long(self) -> tuple[Payload, ...]:
        """Those of the wide ones that a team has not under way at once."""
        return tuple(row for row in self.wide if row.units > under_way.PAYLOAD_AHEAD * self.team_threads)

    @property
    def most_ahead(self) -> int:
        return under_way.PAYLOAD_AHEAD

    @property
    def max_senders(self) -> int:
        return MAX_SENDERS

    @property
    def blocks_bits(self) -> int:
        """Lowest bits of a call word, which are zero: the number of sending blocks travels in them."""
        return FIELDS["a2a_dispatch"][0].bits

    @property
    def stats_packets(self) -> int:
        """Of a rank's statistics, at most."""
        return ceil_div(MAX_STATS, PACKET_WORDS)

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
                Param("uint64_t", "counts_offset", "[half][source] packets"),
                Param("uint64_t", "stats_offset", "[half][source][stats packets]"),
                Param(
                    "uint64_t", "flags_offset", f"[source][{MAX_SENDERS}] u32: the last epoch whose rows it has sent"
                ),
                *roles_and_sizes(),
                Param("uint32_t", "stats_words", "statistics of a rank"),
                Param("uint32_t", "id_words", "of a row of unused_ids"),
                Param("int32_t", "unused_id", "what it is filled with"),
                Param("uint32_t", "wide_ids", "1: topk_idx is int64"),
            )
        )


@dataclass(frozen=True)
class OneSidedCombine(OneSidedSpec, family="a2a", op="combine"):
    """Sends rows back to where they came from and adds those of a token up, in fp32 and in the order of the ranks."""

    dtype: str = tag(one_of=tuple(SUMMANDS))
    out: str = tag("to", one_of=tuple(RESULTS))
    num_ranks: int = tag("r")
    hidden: int = tag("h")
    destinations: int = tag("d")
    path: str = tag(one_of=("ipc",))
    warp_groups: WarpGroups = tag("w")
    rows: str = rare("pushed", "pulled")

    def validate(self) -> None:
        self.require(
            0 < self.row_bytes <= MAX_ROW_BYTES and self.row_bytes % VECTOR_BYTES == 0,
            f"a row is a multiple of {VECTOR_BYTES} bytes up to {MAX_ROW_BYTES}; hidden {self.hidden} in {self.dtype} "
            f"gives {self.row_bytes}",
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
    def awaited(self) -> Mapping[str, bool]:
        return {"kPresence": True, "kPartial": not self.pulls}

    @property
    def pulls(self) -> bool:
        """Whether the token's owner reads the rows where the experts' ranks have them; else these send them."""
        return self.rows == "pulled"

    @property
    def format(self) -> Format:
        return SUMMANDS[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.format.row_bytes(self.hidden)

    @property
    def result(self) -> Format:
        return RESULTS[self.out]

    @property
    def quantized(self) -> bool:
        return self.result.quantized_here

    @property
    def result_params(self) -> tuple[Param, ...]:
        """Those that a kernel of this result has beside its `out`."""
        if not self.quantized:
            return ()
        scales = Param("uint8_t*", "scales", "one per group of elements" + ", in tiles" * self.result.tiled)
        factor = Param("const float*", "output_scale", "one number, which results are multiplied by; null: 1")
        return (scales, factor) if self.result.scaled_by_user else (scales,)

    @property
    def ahead(self) -> int:
        return max(1, min(under_way.PAYLOAD_AHEAD, ceil_div(self.row_bytes // VECTOR_BYTES, self.team_threads)))

    @property
    def summed_ahead(self) -> int:
        """Of a row that is added: a thread has its sums, too."""
        floats = VECTOR_BYTES // self.format.element_bytes
        wide = self.quantized and self.dtype == "fp32"
        fits = self.block_threads <= (under_way.QUANTIZED_SUMS_THREADS if wide else under_way.SUMS_THREADS)
        many = fits and not (self.pulls and self.destinations > under_way.PULLED_SUMS_RANKS)
        return max(1, min((under_way.SUMS if many else under_way.FEWER_SUMS) // floats, self.ahead))

    @property
    def rows_ahead(self) -> int:
        """Of a token, that a thread asks for at once where it reads them in place."""
        wide = self.quantized or self.dtype == "fp32"
        most = under_way.WIDE_PULLED_VECTORS if wide else under_way.PULLED_VECTORS
        if self.block_threads > under_way.SUMS_THREADS:
            most = under_way.FEWEST_PULLED_VECTORS
        return min(self.destinations, max(1, most // self.summed_ahead))

    @property
    def _places(self) -> tuple[Param, ...]:
        pulled = "[source][slots, hidden]: what the experts of each rank made"
        return (
            Param("uint64_t", "rows_offset", pulled if self.pulls else "[half][rank][max_tokens] rows"),
            *read_if(
                not self.pulls,
                Param("uint64_t", "half_bytes", "of a half: room for the longest rows, whatever this kernel's"),
                Param("uint64_t", "tags_offset", "[half][rank][max_tokens] u32: epoch of the row there"),
            ),
        )

    @cached_property
    def params(self) -> ParamStruct:
        returns = not self.pulls and self.num_ranks > 1
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                Param("const uint8_t*", "y", "[ranks, slots, hidden]", when=not self.pulls),
                Param("uint8_t*", "out", "[tokens, hidden]"),
                *self.result_params,
                Param("const uint64_t*", "token_ranks", "[tokens]: bit r: rank r holds an expert of this token"),
                Param("const int32_t*", "token_slots", "[tokens, destinations]: its slot with each of them"),
                Param("const int32_t*", "tokens_sent", "one number: the tokens of that dispatch"),
                Param("const int32_t*", "counts", "[ranks]: rows from each source", when=returns),
                *BEGIN,
                Param("const Control*", "other_control", "dispatch's"),
                Param(
                    "const uint64_t*", "calls", "[parity][rank]: call words published to this rank, with their epochs"
                ),
                PLACE,
                *self._places,
                *roles_and_sizes(sends=returns),
                Param("uint32_t", "max_tokens", "the same in any call", when=not self.pulls),
                Param("uint32_t", "call", "call word"),
            )
        )
