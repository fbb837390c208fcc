# SPDX-License-Identifier: Apache-2.0
"""Family `coll`, collective: what goes before and behind an all-to-all of torch.distributed, where no memory is shared.

This module is the host half of `templates/coll_*.cu.jinja`: their Specs, their parameter structs, and where things lie
in the buffers. None of these kernels waits for anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from moegen.kernels.a2a import MAX_STATS, OneSidedCombine, OneSidedDispatch, OneSidedSpec
from moegen.kernels.a2a_layout import planes
from moegen.kernels.a2a_payloads import RowBytes
from moegen.kernels.ll import ceil_div
from moegen.kernels.params import Param, ParamStruct
from moegen.kernels.spec import MAX_RANKS, Spec, WarpGroups, rare, tag

HEADER_WORDS = 8
"""32-bit words of a chunk's header, ahead of the statistics: its rows, the tokens of its source, the rows that it has
room for, the object and the call that it belongs to, and zeros.
"""

MAX_HEADER_BYTES = 4 * (HEADER_WORDS + MAX_STATS)
CHUNK_ALIGNMENT = 128
VECTOR_BYTES = 16
MOVED_AHEAD = 4
"""Vectors of `coll_move` that a thread has under way: with 448 threads of 132 blocks, 3.8 MB."""

_SENDERS = Param("Blocks", "senders", "blocks that pack rows")
_RECEIVERS = Param("Blocks", "receivers", "the block that writes headers")
_UNUSED_IDS = (
    Param("uint32_t", "ids_payload", "payload whose unused rows are filled"),
    Param("uint32_t", "id_words", "of its rows; 0: none is filled"),
    Param("int32_t", "unused_id", "what they are filled with"),
)


def _line(num_ranks: int) -> tuple[Param, ...]:
    return (
        Param("uint8_t*", "line", "rows without gaps, a part for each rank"),
        Param("uint64_t", "begins", "of the parts: bytes", num_ranks),
    )


@dataclass(frozen=True)
class CollectivePack(OneSidedDispatch, family="coll", op="pack"):
    """Puts a token's payloads once where those lie that go to a rank, for every rank that holds one of its experts, in
    the order of the tokens: in a chunk, which is a header and a plane [slots, width] for each payload, or (exact) in a
    line without gaps, once it is known how many go where.
    """

    path: str = tag(one_of=("collective",))
    exchange: str = rare("padded", "exact")

    @property
    def exact(self) -> bool:
        return self.exchange == "exact"

    @property
    def header_words(self) -> int:
        return HEADER_WORDS

    @cached_property
    def params(self) -> ParamStruct:
        number = len(self.payloads.widths)
        if self.exact:
            return self._params_in_line
        return ParamStruct(
            (
                Param("uint8_t*", "chunks", "[ranks][chunk bytes]: what goes to each rank"),
                Param("const uint8_t*", "payloads", "[tokens, width] of each", number),
                Param("uint64_t", "planes", "of each payload: [slots, width], bytes from the chunk's begin", number),
                Param("const void*", "topk_idx", "[tokens, topk] int32 or int64"),
                Param("const int32_t*", "num_tokens", "one number: tokens of this call; null: `tokens`"),
                Param("uint64_t*", "token_ranks", "[tokens]: bit r: rank r holds an expert of this token"),
                Param("int32_t*", "token_slots", "[tokens, destinations]: its slot with each of them"),
                Param("int32_t*", "tokens_sent", "one number: the tokens of this call"),
                Param("const int32_t*", "stats", "[stats words] of this rank, or null"),
                Param("Control*", "control", "the number of the call"),
                Param("Failure*", "failure", "where the host reads what went wrong"),
                Param("uint64_t", "active", "all ones: every rank takes part"),
                Param("uint64_t", "chunk_bytes", "of one rank"),
                Param("uint64_t", "word", "the call word"),
                _SENDERS,
                _RECEIVERS,
                Param("uint32_t", "object", "a number that all ranks' ends of this object share"),
                Param("uint32_t", "tokens", "tokens of this rank"),
                Param("uint32_t", "slots", "rows that a source may send to a rank in this call"),
                Param("uint32_t", "stats_words", "statistics of a rank"),
                *_UNUSED_IDS,
                Param("uint32_t", "wide_ids", "1: topk_idx is int64"),
            )
        )

    @property
    def _params_in_line(self) -> ParamStruct:
        return ParamStruct(
            (
                *_line(self.num_ranks),
                Param("const uint8_t*", "payloads", "[tokens, width] of each", len(self.payloads.widths)),
                Param("const void*", "topk_idx", "[tokens, topk] int32 or int64"),
                Param("const int32_t*", "num_tokens", "one number: tokens of this call; null: `tokens`"),
                Param("uint64_t*", "token_ranks", "[tokens]: bit r: rank r holds an expert of this token"),
                Param("int32_t*", "token_slots", "[tokens, destinations]: its slot with each of them"),
                Param("Failure*", "failure", "where the host reads what went wrong"),
                Param("uint64_t", "active", "bit r: rows go to rank r"),
                _SENDERS,
                Param("uint32_t", "rows", "that go to each rank", self.num_ranks),
                Param("uint32_t", "tokens", "tokens of this rank"),
                Param("uint32_t", "wide_ids", "1: topk_idx is int64"),
            )
        )


@dataclass(frozen=True)
class CollectiveOpen(OneSidedSpec, family="coll", op="open"):
    """Reads the headers of what has come: how many rows from each source, and whether they belong to this call."""

    num_ranks: int = tag("r")
    path: str = tag(one_of=("collective",))
    warp_groups: WarpGroups = tag("w")

    def validate(self) -> None:
        self.require(1 <= self.num_ranks <= MAX_RANKS, f"num_ranks is 1..{MAX_RANKS}; got {self.num_ranks}")
        self.require_groups()

    @property
    def groups(self) -> WarpGroups:
        return self.warp_groups

    @property
    def header_words(self) -> int:
        return HEADER_WORDS

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                Param("const uint8_t*", "headers", "of what comes from each rank"),
                Param("const uint8_t*", "own_headers", "of what goes to each rank, if `exchanged` is asked for"),
                Param("int32_t*", "counts", "[ranks]: rows from each source"),
                Param("int32_t*", "exchanged", "[2][ranks]: rows from each source, rows to each rank; or null"),
                Param("int32_t*", "gathered", "[ranks, stats words], or null"),
                Param("const Control*", "control", "the number of the call behind this one"),
                Param("Failure*", "failure", "where the host reads what went wrong"),
                Param("uint64_t", "stride", "bytes from a header to the next"),
                Param("uint64_t", "word", "the call word"),
                Param("uint32_t", "object", "a number that all ranks' ends of this object share"),
                Param("uint32_t", "slots", "rows that a source may send to a rank in this call"),
                Param("uint32_t", "stats_words", "statistics of a rank"),
                Param("uint32_t", "rank", "this rank"),
            )
        )


@dataclass(frozen=True)
class CollectiveMove(OneSidedSpec, family="coll", op="move"):
    """Moves rows of exact calls: between planes that have room for all that may come, and a line without gaps."""

    to: str = tag("to", one_of=("planes", "line"))
    payloads: RowBytes = tag("p")
    num_ranks: int = tag("r")
    path: str = tag(one_of=("collective",))
    warp_groups: WarpGroups = tag("w")

    def validate(self) -> None:
        self.require(1 <= self.num_ranks <= MAX_RANKS, f"num_ranks is 1..{MAX_RANKS}; got {self.num_ranks}")
        self.require_groups()

    @property
    def groups(self) -> WarpGroups:
        return self.warp_groups

    @property
    def ahead(self) -> int:
        return MOVED_AHEAD

    def useful_blocks(self, slots: int) -> int:
        """Blocks that have something to do if each rank has so many rows."""
        vectors = self.num_ranks * slots * sum(self.payloads.widths) // VECTOR_BYTES
        return max(1, ceil_div(vectors, MOVED_AHEAD * self.block_threads))

    @cached_property
    def params(self) -> ParamStruct:
        planes = self.to == "planes"
        return ParamStruct(
            (
                Param("uint8_t*" if planes else "const uint8_t*", "chunks", "[ranks][chunk bytes]: the planes"),
                *_line(self.num_ranks),
                Param("uint64_t", "planes", "of each payload: bytes from the chunk's begin", len(self.payloads.widths)),
                Param("uint64_t", "chunk_bytes", "of one rank"),
                Param("uint32_t", "rows", "of each rank", self.num_ranks),
                *((Param("uint32_t", "slots", "rows that a chunk has room for"), *_UNUSED_IDS) if planes else ()),
            )
        )


@dataclass(frozen=True)
class CollectiveSum(OneSidedCombine, family="coll", op="sum"):
    """Adds a token's rows up, which have come back from the ranks that it went to."""

    path: str = tag(one_of=("collective",))

    @property
    def pulls(self) -> bool:
        """They are all here."""
        return True

    @cached_property
    def params(self) -> ParamStruct:
        return ParamStruct(
            (
                Param("const uint8_t*", "rows", "[rows, hidden]: what has come back, rank by rank"),
                Param("uint8_t*", "out", "[tokens, hidden]"),
                *self.result.params,
                Param("const uint64_t*", "token_ranks", "[tokens]: bit r: rank r holds an expert of this token"),
                Param("const int32_t*", "token_slots", "[tokens, destinations]: its slot with each of them"),
                Param("const int32_t*", "tokens_sent", "one number: the tokens of that dispatch"),
                Param("Blocks", "receivers", "all blocks"),
                Param("uint32_t", "tokens", "tokens of this rank"),
                Param("uint32_t", "first_rows", "of each rank", self.num_ranks),
            )
        )


@cache
def for_exact(spec: Spec) -> tuple[Spec, ...]:
    """What a call that launches this kernel launches besides if counts cross first: dispatch, whose pack then writes
    headers alone, one that packs and one that moves what came; combine one that moves what goes.
    """
    if isinstance(spec, CollectivePack):
        to_planes = CollectiveMove("planes", spec.payloads, spec.num_ranks, spec.path, spec.warp_groups)
        return replace(spec, exchange="exact"), to_planes
    if isinstance(spec, CollectiveSum):
        return (CollectiveMove("line", RowBytes((spec.row_bytes,)), spec.num_ranks, spec.path, spec.warp_groups),)
    return ()


def chunk_planes(widths: tuple[int, ...], slots: int, stats_words: int) -> list[int]:
    """Where each payload's plane begins in a chunk, and how long the chunk is: bytes."""
    header = ceil_div(4 * (HEADER_WORDS + stats_words), CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
    end = planes((*widths, 1), 1, slots, header)
    return [*end[:-1], ceil_div(end[-1], CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT]


def header_bytes(stats_words: int) -> int:
    """Of headers that cross by themselves, their statistics included."""
    return ceil_div(4 * (HEADER_WORDS + stats_words), VECTOR_BYTES) * VECTOR_BYTES


def part_bytes(widths: tuple[int, ...], rows: Sequence[int]) -> list[int]:
    """Of a line: bytes of each rank's part, as `templates/parts/coll/line.cuh.jinja` lays it out."""
    return [sum(ceil_div(number * width, VECTOR_BYTES) * VECTOR_BYTES for width in widths) for number in rows]
