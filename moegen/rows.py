# SPDX-License-Identifier: Apache-2.0
"""`DispatchedRows` and `RowsHandle`: what dispatch of layouts `token` and `packed` returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict, cast

import torch

from moegen.runtime.ownership import ProcessBound

Given = tuple[torch.Tensor, torch.Tensor]
"""FP8 tokens and their scales."""


@dataclass(frozen=True, eq=False, slots=True)
class Layout:
    """Where a rank's tokens go, on the device.

    Attributes:
        tokens_per_rank: int32 [ranks]: tokens that select an expert of each rank.
        tokens_per_expert: int32 [experts]: tokens that select each expert.
        token_in_rank: bool [T, ranks]: whether a token selects an expert of a rank.
    """

    tokens_per_rank: torch.Tensor
    tokens_per_expert: torch.Tensor
    token_in_rank: torch.Tensor


@dataclass(frozen=True, eq=False, slots=True)
class RowsHandle(ProcessBound):
    """A routing, for combine and for further dispatches by it. Opaque; owns its memory and pins no buffer, so any
    number may live.

    Attributes:
        owner: the object that made it; only that object takes it.
        num_tokens: rows of the token tensor that was dispatched.
        rows: rows of `DispatchedRows.tokens`: of what combine takes.
        memory: the device memory behind `addresses`, from which `HighThroughput.handle_of` makes another handle.
        addresses: of token_ranks, tokens_sent, first_rows, row_tokens, row_slots, row_weights, own_rows, in that order.
        stream: the CUDA stream that its memory was allocated on, as a number; 0 on the CPU.
        numbers: the parts of that memory which the result shows (`moegen.runtime.row_memory.Numbers`).
        host_counts: see `DispatchedRows`.
        host_arrivals: how many (token, rank) rows came, in mode "exact"; else None.
    """

    _noun: ClassVar[str] = "handle"
    _belongs_to: ClassVar[str] = "its process and its HighThroughput"

    owner: object
    num_tokens: int
    rows: int
    memory: torch.Tensor
    addresses: tuple[int, ...]
    stream: int
    numbers: Any
    host_counts: list[int] | None
    host_arrivals: int | None = None

    def __repr__(self) -> str:
        return f"RowsHandle(num_tokens={self.num_tokens}, rows={self.rows})"


@dataclass(frozen=True, eq=False, slots=True)
class DispatchedRows:
    """The tokens that came to this rank, layout `token` or `packed`.

    Attributes:
        tokens: [rows, hidden], bfloat16 or float8_e4m3fn. Layout `token`: a row for each token that selects an expert
            of this rank, by source rank and then by the source's token. Layout `packed`: a row for each of this rank's
            experts that it selects; expert e's are tokens[expert_starts[e]:][:counts[e]], in that order. Rows that
            nothing came for are undefined. If the object was made with `borrow`, [ranks, max_tokens_per_rank, hidden].
        scales: of FP8 tokens, [rows, hidden / 128] float32 or, packed UE8M0, [rows, hidden / 512] int32. Else None.
        topk_idx: int64 [rows, topk], layout `token`: the expert of each selection, counted among this rank's; -1 where
            another rank holds it, and in rows that nothing came for. Else None.
        topk_weights: float32, [rows, topk] in layout `token`, 0 where topk_idx is -1; [rows] in layout `packed`: the
            weight of the row's selection (of a token that selects an expert twice, their sum).
        counts: int32 [local experts], on the device: rows that select each expert.
        expert_starts: int32 [local experts + 1], layout `packed`: first row of each expert, a multiple of the
            alignment, and in the end how many rows are used. Else None.
        source_starts: int32 [ranks + 1]: how many (token, rank) rows came from lower ranks, and in the end from all. In
            layout `token` those of source r are tokens[source_starts[r]:source_starts[r + 1]].
        row_tokens: int32 [ranks * max_tokens_per_rank]: which of its source's tokens each of those rows is.
        source_counts: int32 [ranks, 1 + ranks]: the tokens of each source, and how many of them go to each rank.
        host_counts: `counts` as a list, in mode "exact"; else None.
        packed: whether the layout is `packed`.
        handle: give it to combine, or to another dispatch with the same routing.
    """

    tokens: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    packed: bool
    handle: RowsHandle

    @property
    def counts(self) -> torch.Tensor:
        """See above; like the next ones a view, made when it is asked for."""
        return cast(torch.Tensor, self.handle.numbers.counts)

    @property
    def expert_starts(self) -> torch.Tensor | None:
        return cast(torch.Tensor, self.handle.numbers.first_slots) if self.packed else None

    @property
    def source_starts(self) -> torch.Tensor:
        return cast(torch.Tensor, self.handle.numbers.first_rows)

    @property
    def row_tokens(self) -> torch.Tensor:
        return cast(torch.Tensor, self.handle.numbers.row_tokens)

    @property
    def source_counts(self) -> torch.Tensor:
        return cast(torch.Tensor, self.handle.numbers.source_counts)

    @property
    def host_counts(self) -> list[int] | None:
        return self.handle.host_counts

    @property
    def allocations(self) -> tuple[torch.Tensor | None, ...]:
        """The memory behind all of it, but for what is borrowed: that is the object's."""
        made = (self.tokens, self.scales) if self.tokens.dim() == 2 else ()
        return (*made, self.topk_idx, self.topk_weights, self.handle.memory)


class RowDispatchOptions(TypedDict, total=False):
    """Keyword arguments of `HighThroughput.dispatch`, which describes them."""

    handle: RowsHandle | None
    num_tokens: torch.Tensor | None
    max_rows: int | None
    out: torch.Tensor | None
    out_scales: torch.Tensor | None
    total_counts: torch.Tensor | None
    mode: str | None
    zero_unused: bool
    scales_by_column: bool
    num_sms: int | None
    timeout: float | None


class RowCombineOptions(TypedDict, total=False):
    """Keyword arguments of `HighThroughput.combine`, which describes them."""

    bias: torch.Tensor | Sequence[torch.Tensor]
    weighted: bool
    out: torch.Tensor | None
    num_sms: int | None
    timeout: float | None


def tensors_in(options: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Of keyword arguments: the tensors, also those in tuples and lists."""
    for value in options.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, torch.Tensor):
                yield part
