# SPDX-License-Identifier: Apache-2.0
"""Family `coll` of layouts `token`, `packed` and `expert`: what goes before and behind an all-to-all of
torch.distributed.

This module is the host half of `send.cu.jinja`, `place.cu.jinja`, `return.cu.jinja` and `reduce.cu.jinja` in
`templates/collective/`: their Specs, their parameter structs, and where things lie in a chunk. None of these kernels
waits for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

from moegen.codegen.params import Param, ParamStruct, read_if
from moegen.codegen.row_spec import RowCombine, RowDispatch
from moegen.codegen.spec import rare, tag
from moegen.limits import CHUNK_ALIGNMENT, VECTOR_BYTES, ceil_div
from moegen.tuning.under_way import ROW_AHEAD

HEADER_WORDS = 4
"""32-bit words ahead of a chunk's counts: the object and the call that it belongs to, the call word, and a zero."""

_CONTROL = Param("Control*", "control", "the number of this object's call")
_FAILURE = Param("Failure*", "failure", "where the host reads what went wrong")
_OBJECT = Param("uint32_t", "object", "a number that all ranks' ends of this object share")
_RANK = Param("uint32_t", "rank", "this rank")
_MAX_TOKENS = Param("uint32_t", "max_tokens", "capacity: tokens that a rank may send")
_SCALES = {
    "token": "[rows, scale words] with the strides below",
    "packed": "[rows, scale words] with the strides below",
    "expert": "[local experts, scale words, ranks * max_tokens]",
}
_SCALE_STRIDES = (
    Param("uint64_t", "scale_row_stride", "words from one row's scales to the next's"),
    Param("uint64_t", "scale_word_stride", "words from one scale word of a row to the next"),
)
_TOLD = (
    Param("int32_t*", "counts", "[local experts]: rows that select each expert"),
    Param("int32_t*", "total_counts", "[local experts], to which counts are added; or null"),
    Param("int32_t*", "source_counts", "[ranks, 1 + ranks]: tokens of each source, its rows for each rank"),
)
_ALIGNMENT = Param("uint32_t", "alignment", "an expert's first row is a multiple of this")


def _chunks(num_ranks: int, what: str, moves: bool = True) -> tuple[Param, ...]:
    return (
        Param("uint8_t*", "chunks", what),
        Param("uint64_t", "starts", "where the chunk of each rank begins: bytes", num_ranks),
        Param("uint64_t", "records_offset", "where rows begin in a chunk: bytes", when=moves),
    )


def _sent(written: bool) -> tuple[Param, ...]:
    """What the owner of tokens keeps of a dispatch."""
    const = "" if written else "const "
    return (
        Param(f"{const}uint64_t*", "token_ranks", "[max_tokens]: bit r: rank r holds an expert of this token"),
        Param(f"{const}int32_t*", "tokens_sent", "one number: the tokens of that dispatch"),
        Param(f"{const}int32_t*", "sent_rows", "[max_tokens, destinations]: its row with each of them, in rank order"),
    )


def _first_rows(const: str) -> Param:
    note = "[ranks + 1]: first row of each source, then the number of rows"
    return Param(f"{const}int32_t*", "first_rows", note)


def _selections(const: str) -> tuple[Param, ...]:
    """What a rank keeps of the rows that came, for each selection."""
    slots = "[ranks * max_tokens, topk]: local expert or row; -1: not here"
    weights = f"[ranks * max_tokens, topk]{'; null: ones' if const else ''}"
    return Param(f"{const}int32_t*", "row_slots", slots), Param(f"{const}float*", "row_weights", weights)


class _Chunked:
    """What the kernels of both ops know of chunks."""

    @property
    def header_words(self) -> int:
        return HEADER_WORDS


@dataclass(frozen=True)
class CollectiveSend(_Chunked, RowDispatch, family="coll", op="send"):
    """Puts each token once into the chunk of every rank that holds one of its experts, in the order of the tokens.

    A chunk is a header, what the source tells of its rows (but in phase "rows"), and the rows (but in phase "plan").
    """

    layout: str = tag(one_of=("token", "packed", "expert"))
    path: str = tag(one_of=("collective",))
    rows: str = rare("placed")
    most_ahead: ClassVar[int] = ROW_AHEAD["dispatch"]

    @property
    def count_words(self) -> int:
        """Behind the header: rows for this rank, how many select each of its experts, then the tokens of the source and
        its rows for each rank.
        """
        return 1 + self.max_local_experts + self.source_words if self.plans else 0

    @property
    def header_bytes(self) -> int:
        return ceil_div(4 * (HEADER_WORDS + self.count_words), CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT

    @property
    def entry_bytes(self) -> int:
        """Of what is told of a row: its token, then a selection and a weight for each k."""
        return ceil_div(4 * self.entry_words, VECTOR_BYTES) * VECTOR_BYTES if self.plans else 0

    def records_offset(self, rows: int) -> int:
        """Where rows begin in a chunk that has room for so many."""
        return self.header_bytes + rows * self.entry_bytes

    def chunk_bytes(self, rows: int) -> int:
        end = self.records_offset(rows) + (rows * self.slot_bytes if self.moves else 0)
        return ceil_div(end, CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT

    @cached_property
    def params(self) -> ParamStruct:
        plans, moves = self.plans, self.moves
        x_scales = "[tokens, scale words], if the caller quantised; else null"
        wanted = "tokens that this rank has and this object has no room for, or 0"
        return ParamStruct(
            (
                *_chunks(self.num_ranks, "what goes to each rank", moves),
                Param("const uint8_t*", "x", "[tokens, hidden]", when=moves),
                Param("const uint32_t*", "x_scales", x_scales, when=moves and self.format.given),
                Param("const void*", "topk_idx", "[tokens, topk] int32 or int64", when=plans),
                Param("const float*", "topk_weights", "[tokens, topk]; null: every weight is 1", when=plans),
                *_sent(written=plans),
                Param("const int32_t*", "num_tokens", "one number: tokens of this call; null: `tokens`", when=plans),
                _CONTROL,
                *read_if(plans, _FAILURE),
                Param("uint64_t", "x_stride", "bytes from one token of x to the next", when=moves),
                Param("Blocks", "senders", "all blocks"),
                _OBJECT,
                *read_if(moves, _MAX_TOKENS),
                Param("uint32_t", "tokens", "rows of this rank's token tensor"),
                Param("uint32_t", "tokens_wanted", wanted, when=plans),
                Param("uint32_t", "wide_ids", "1: topk_idx is int64", when=plans),
            )
        )


@dataclass(frozen=True)
class CollectivePlace(CollectiveSend, family="coll", op="place"):
    """Puts the rows that have come where the user reads them, by source rank and then by the source's token.

    Layout `expert`: as `packed`, but each expert's first row is where it would be if all others were full.
    """

    @property
    def checks_sources(self) -> bool:
        return True

    @property
    def _of_layout(self) -> tuple[Param, ...]:
        plans, moves = self.plans, self.moves
        slot_tokens = "[local experts, ranks * max_tokens]: the source's token of each row"
        ranges = "[local experts, ranks, 2]: rows of each source, and the first of them"
        return {
            "token": (
                Param("int64_t*", "out_topk_idx", "[rows, topk] local expert or -1, or null", when=moves),
                Param("float*", "out_weights", "[rows, topk], or null", when=moves),
            ),
            "packed": (
                Param("float*", "out_weights", "[rows], or null", when=moves),
                Param("int32_t*", "first_slots", "[local experts + 1]: first row of each expert", when=plans),
            ),
            "expert": (
                Param("int32_t*", "slot_tokens", slot_tokens, when=moves),
                Param("int32_t*", "ranges", ranges, when=plans),
            ),
        }[self.layout]

    @cached_property
    def params(self) -> ParamStruct:
        plans, moves = self.plans, self.moves
        const = "" if plans else "const "
        moves_scales = moves and self.scale_words > 0
        return ParamStruct(
            (
                *_chunks(self.num_ranks, "what has come from each rank", moves),
                Param("uint8_t*", "out", "[rows, hidden]", when=moves),
                Param("uint32_t*", "out_scales", f"{_SCALES[self.layout]}, or null", when=moves_scales),
                *self._of_layout,
                *read_if(plans, *_TOLD),
                _first_rows(const),
                Param(f"{const}int32_t*", "row_tokens", "[ranks * max_tokens]: the source's token of each row"),
                *_selections(const),
                _CONTROL,
                _FAILURE,
                *(() if self.layout == "expert" else read_if(moves_scales, *_SCALE_STRIDES)),
                Param("Blocks", "receivers", "all blocks"),
                _OBJECT,
                _RANK,
                _MAX_TOKENS,
                Param("uint32_t", "capacity", "rows of `out`", when=moves),
                *(read_if(plans, _ALIGNMENT) if self.packed else ()),
            )
        )


@dataclass(frozen=True)
class CollectiveReturn(_Chunked, RowCombine, family="coll", op="return"):
    """Puts one row per (token, rank) into the chunk of the token's owner: the row itself (layout `token`), or the sum
    over this rank's experts, rounded once. Rows lie in the order in which they came; this rank's own are not returned.
    """

    path: str = tag(one_of=("collective",))
    most_ahead: ClassVar[int] = ROW_AHEAD["combine"]

    @property
    def header_bytes(self) -> int:
        return CHUNK_ALIGNMENT

    def records_offset(self, rows: int) -> int:
        """Where rows begin in a chunk."""
        return self.header_bytes

    def chunk_bytes(self, rows: int) -> int:
        """Of a chunk that has room for so many."""
        return ceil_div(self.header_bytes + rows * self.slot_bytes, CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                *_chunks(self.num_ranks, "what goes to each rank"),
                Param("const uint8_t*", "y", "[rows, hidden]"),
                Param("const float*", "y_weights", "[rows that came, topk], which travel with the rows; or null"),
                _first_rows("const "),
                *read_if(self.packed, *_selections("const ")),
                _CONTROL,
                Param("Blocks", "senders", "all blocks"),
                _OBJECT,
                _RANK,
                _MAX_TOKENS,
                Param("uint32_t", "rows", "of `y`; more may have come to a dispatch that had no room for them"),
                Param("uint32_t", "call", "the call word"),
            )
        )


@dataclass(frozen=True)
class CollectiveReduce(CollectiveReturn, family="coll", op="reduce"):
    """Adds up a token's rows that have come back, in the order of the ranks; this rank's own part is added in fp32."""

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                *_chunks(self.num_ranks, "what has come back from each rank"),
                Param("const uint8_t*", "y", "[rows, hidden]: of this rank's experts"),
                Param(
                    "const float*", "y_weights", "[rows that came, topk], summed over ranks into out_weights; or null"
                ),
                Param("const uint8_t*", "bias", "[tokens, hidden], added to the sum; or null"),
                Param("const uint8_t*", "second_bias", "[tokens, hidden]; or null"),
                Param("uint8_t*", "out", "[tokens, hidden]"),
                Param("float*", "out_weights", "[tokens, topk], or null"),
                *_sent(written=False),
                _first_rows("const "),
                *read_if(self.packed, *_selections("const ")),
                _CONTROL,
                _FAILURE,
                Param("Blocks", "receivers", "all blocks"),
                _OBJECT,
                _RANK,
                _MAX_TOKENS,
                Param("uint32_t", "tokens", "rows of this rank's token tensor"),
                Param("uint32_t", "rows", "of `y`; more may have come to a dispatch that had no room for them"),
                Param("uint32_t", "call", "the call word"),
            )
        )


@dataclass(frozen=True)
class Chunks:
    """Where the chunks of one exchange lie, on one side of it: bytes."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    records_offset: int

    @property
    def end(self) -> int:
        return self.starts[-1] + self.sizes[-1]


def chunks(spec: CollectiveSend | CollectiveReturn, rows: Sequence[int]) -> Chunks:
    """Chunks with room for so many rows of each rank, one behind the other.

    Numbers may differ only where nothing is told of rows, whose begin would then differ too.
    """
    sizes = tuple(spec.chunk_bytes(number) for number in rows)
    return Chunks(tuple(accumulate(sizes[:-1], initial=0)), sizes, spec.records_offset(rows[0]))
