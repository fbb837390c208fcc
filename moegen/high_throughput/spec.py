# SPDX-License-Identifier: Apache-2.0
"""Family `ht`, high throughput: persistent kernels; some blocks send rows, the others place them while more arrive.

This module is the host half of `dispatch.cu.jinja` and `combine.cu.jinja` in `templates/high_throughput/`: their Specs,
and their parameter structs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from moegen.codegen.call_words import PLACE
from moegen.codegen.params import Param, ParamStruct, read_if
from moegen.codegen.row_spec import RowCombine, RowDispatch
from moegen.limits import PACKET_WORDS, ceil_div
from moegen.tuning.under_way import ROW_AHEAD

PHASES = {
    "kPeerReady": "the end of its previous call",
    "kPlanned": "the counts of an earlier chunk of tokens",
    "kCounts": "how many rows it sends",
    "kEntry": "where one of its rows goes",
    "kRow": "a token row",
    "kPartial": "a partial sum",
}
"""What a wait of this family waits for: the name in the kernel, and in words for PeerTimeoutError."""


def _common(moves: bool) -> tuple[Param, ...]:
    return (
        Param("Control*", "control", "this op's epoch"),
        Param("uint32_t*", "aborted", "this object's abort word"),
        Param("Failure*", "failure", "where the host reads what went wrong"),
        Param("uint64_t", "consumed_offset", "[rank] u32: the last epoch that the peer has finished"),
        PLACE,
        *read_if(
            moves,
            Param("uint64_t", "rows_offset", "[source][max_tokens] slots, each with its token's number"),
            Param("uint64_t", "tags_offset", "[source][max_tokens] u64: call word and epoch of the row there"),
        ),
        Param("uint64_t", "timeout_ns", "how long one wait may take"),
    )


def _common_32(moves: bool) -> tuple[Param, ...]:
    return (
        Param("Blocks", "senders", "blocks that send", when=moves),
        Param("Blocks", "receivers", "blocks that plan and receive; the same one if there is only one"),
        Param("uint32_t", "rank", "this rank"),
        Param("uint32_t", "tokens", "rows of this rank's token tensor"),
        Param("uint32_t", "max_tokens", "capacity: tokens that a rank may send"),
    )


def _of_handle(*, written: bool, selections: bool = True, own_rows: bool = True) -> tuple[Param, ...]:
    """What dispatch leaves for combine and for further dispatches with the same routing."""
    slots = "[ranks * max_tokens, topk]: local expert or (packed) row; -1: not here"
    weights = f"[ranks * max_tokens, topk]{'' if written else '; null: ones'}"
    own = "[max_tokens]: which of this rank's rows for itself a token is"
    const = "" if written else "const "
    return (
        Param(f"{const}uint64_t*", "token_ranks", "[max_tokens]: bit r: rank r holds an expert of this token"),
        Param(f"{const}int32_t*", "tokens_sent", "one number: the tokens of this call"),
        Param(f"{const}int32_t*", "first_rows", "[ranks + 1]: first row of each source, then the number of rows"),
        Param(f"{const}int32_t*", "row_tokens", "[ranks * max_tokens]: the source's token of each row"),
        Param(f"{const}int32_t*", "row_slots", slots, when=selections),
        Param(f"{const}float*", "row_weights", weights, when=selections),
        Param(f"{const}int32_t*", "own_rows", own, when=own_rows),
    )


@dataclass(frozen=True)
class HighThroughputDispatch(RowDispatch, family="ht", op="dispatch"):
    """One launch plans, sends and places rows; see `RowDispatch`."""

    phase_words: ClassVar[Mapping[str, str]] = PHASES
    most_ahead: ClassVar[int] = ROW_AHEAD["dispatch"]

    @property
    def awaited(self) -> Mapping[str, bool]:
        plans = dict.fromkeys(("kPlanned", "kCounts", "kEntry"), self.plans)
        return {"kPeerReady": True, **plans, "kRow": self.moves}

    @property
    def count_packets(self) -> int:
        """Packets that a source sends first: its rows for a rank, how many select each of that rank's experts, its
        tokens, its rows for each rank, and its call word.
        """
        return ceil_div(1 + self.max_local_experts + self.source_words + 1, PACKET_WORDS)

    @property
    def _told(self) -> tuple[Param, ...]:
        """What the user, and combine, are told of all rows together."""
        return (
            Param("int32_t*", "counts", "[local experts]: rows that select each expert"),
            Param("int32_t*", "total_counts", "[local experts], to which counts are added; or null"),
            Param("int32_t*", "first_slots", "[local experts + 1]: first row of each expert", when=self.packed),
            Param("int32_t*", "source_counts", "[ranks, 1 + ranks]: tokens of each source, its rows for each rank"),
        )

    @cached_property
    def params(self) -> ParamStruct:
        plans, moves = self.plans, self.moves
        places = moves and not self.borrowed
        places_scales = places and self.scale_words > 0
        x_scales = "[tokens, scale words], if the caller quantised; else null"
        out_scales = "[rows, scale words] with the strides below, or null"
        out_topk_idx = "[rows, topk] local expert or -1, or null"
        wanted = "tokens that this rank has and this object has no room for, or 0"
        return ParamStruct(
            (
                Param("uint8_t*", "peers", "symmetric memory of each rank, as mapped here", self.num_ranks),
                Param("const uint8_t*", "x", "[tokens, hidden]", when=moves),
                Param("const uint32_t*", "x_scales", x_scales, when=moves and self.format.given),
                Param("const void*", "topk_idx", "[tokens, topk] int32 or int64", when=plans),
                Param("const float*", "topk_weights", "[tokens, topk]; null: every weight is 1", when=plans),
                Param("uint8_t*", "out", "[rows, hidden]", when=places),
                Param("uint32_t*", "out_scales", out_scales, when=places_scales),
                Param("int64_t*", "out_topk_idx", out_topk_idx, when=moves and not self.packed),
                Param("float*", "out_weights", "[rows, topk] (layout token) or [rows] (packed), or null", when=moves),
                *read_if(plans, *self._told),
                *_of_handle(written=True, own_rows=plans),
                *read_if(
                    plans,
                    Param("const int32_t*", "num_tokens", "one number: tokens of this call; null: `tokens`"),
                    Param("uint32_t*", "chunk_counts", "[chunks][ranks + experts]: the plan's counters"),
                    Param("uint32_t*", "chunk_epochs", "[chunks]: whose counters those are"),
                ),
                *_common(moves),
                Param("uint64_t", "x_stride", "bytes from one token of x to the next", when=moves),
                Param("uint64_t", "counts_offset", "[source][count packets]", when=plans),
                Param("uint64_t", "entries_offset", "[source][max_tokens][entry packets]", when=plans),
                *read_if(
                    places_scales,
                    Param("uint64_t", "scale_row_stride", "words from one row's scales to the next's"),
                    Param("uint64_t", "scale_word_stride", "words from one scale word of a row to the next"),
                ),
                *_common_32(moves),
                Param("uint32_t", "capacity", "rows of `out`", when=moves),
                Param(
                    "uint32_t", "alignment", "an expert's first row is a multiple of this", when=plans and self.packed
                ),
                Param("uint32_t", "tokens_wanted", wanted, when=plans),
                Param("uint32_t", "wide_ids", "1: topk_idx is int64", when=plans),
            )
        )


@dataclass(frozen=True)
class HighThroughputCombine(RowCombine, family="ht", op="combine"):
    """One launch sends partial sums and adds what arrives; see `RowCombine`."""

    phase_words: ClassVar[Mapping[str, str]] = PHASES
    most_ahead: ClassVar[int] = ROW_AHEAD["combine"]

    @property
    def awaited(self) -> Mapping[str, bool]:
        return {"kPeerReady": True, "kPartial": True}

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
                *_of_handle(written=False, selections=self.packed),
                *_common(moves=True),
                *_common_32(moves=True),
                Param("uint32_t", "rows", "of `y`; more may have come to a dispatch that had no room for them"),
                Param("uint32_t", "call", "call word"),
            )
        )
