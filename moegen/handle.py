# SPDX-License-Identifier: Apache-2.0
"""`Handle` and `Dispatched`: what dispatch returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypedDict

import torch

from moegen.admission import Span
from moegen.runtime.ownership import ProcessBound


@dataclass(frozen=True)
class NumbersLayout:
    """Where a dispatch's 32-bit numbers lie in their one allocation, in words."""

    local_experts: int
    ranks: int
    rows: int
    ranges: int
    counts: int
    row_tokens: int


@dataclass(frozen=True, eq=False, slots=True)
class Handle(ProcessBound):
    """What combine needs to know of its dispatch. Opaque; owns its memory and pins no buffer, so any number may live.

    Attributes:
        owner: the object that made it; only that object's combine takes it.
        num_tokens: rows of the token tensor that was dispatched; -1: nothing was.
        memory: the device memory behind `addresses`.
        addresses: of first_rows, row_origin, row_slots, row_weights, token_ranks, tokens_sent, in that order; where
            ranks may be missing, then of selected_ranks, selected_weights. On path collective, of
            `moegen.runtime.received.FOR_COLLECTIVE`.
        stream: the CUDA stream that its memory was allocated on, as a number; 0 on the CPU.
        replaced: whether its memory holds the results of a later dispatch.
    """

    _noun: ClassVar[str] = "handle"
    _belongs_to: ClassVar[str] = "its process and its ExpertParallel"

    owner: object
    num_tokens: int
    memory: torch.Tensor
    addresses: tuple[int, ...]
    stream: int = 0
    replaced: bool = False

    def __repr__(self) -> str:
        return f"Handle(num_tokens={self.num_tokens})"


@dataclass(frozen=True, eq=False, slots=True)
class GivenNumbers:
    """The user's own tensors for a dispatch's numbers, in place of its memory; shapes as in `Dispatched`."""

    counts: torch.Tensor | None = None
    ranges: torch.Tensor | None = None
    row_tokens: torch.Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Dispatched:
    """The tokens that came to this rank, layout `expert`.

    Attributes:
        tokens: [local experts, ranks * max_tokens_per_rank, hidden], bfloat16, or float8_e4m3fn if quantised. Expert
            e's rows are tokens[e, :counts[e]], by source rank and then by the source's token; what lies beyond is
            undefined. A token that selects an expert twice has one row there.
        scales: of quantised tokens, [local experts, rows, hidden / 128] float32 or, packed UE8M0, [..., hidden / 512]
            int32; rows lie side by side in memory (stride 1), as grouped GEMMs take them. Else None.
        handle: give it to combine.
    """

    tokens: torch.Tensor
    scales: torch.Tensor | None
    handle: Handle
    layout: NumbersLayout
    given: GivenNumbers = GivenNumbers()
    spans: list[Span] = field(default_factory=list, repr=False)
    """Where its memory is, once it was given to a dispatch as `out`."""

    @property
    def counts(self) -> torch.Tensor:
        """int32 [local experts], on the device: rows of each expert."""
        if self.given.counts is not None:
            return self.given.counts
        memory = self.handle.memory
        return memory.as_strided((self.layout.local_experts,), (1,), memory.storage_offset() + self.layout.counts)

    @property
    def ranges(self) -> torch.Tensor:
        """int32 [local experts, ranks, 2], on the device: number of rows of each source rank, and the first of them.

        Read as one int64 each, they are `first << 32 | number`.
        """
        if self.given.ranges is not None:
            return self.given.ranges
        experts, ranks = self.layout.local_experts, self.layout.ranks
        memory = self.handle.memory
        start = memory.storage_offset() + self.layout.ranges
        return memory.as_strided((experts, ranks, 2), (2 * ranks, 2, 1), start)

    @property
    def row_tokens(self) -> torch.Tensor:
        """int32 [local experts, ranks * max_tokens_per_rank]: which of its source's tokens a row is."""
        if self.given.row_tokens is not None:
            return self.given.row_tokens
        experts, rows = self.layout.local_experts, self.layout.rows
        memory = self.handle.memory
        return memory.as_strided((experts, rows), (rows, 1), memory.storage_offset() + self.layout.row_tokens)

    @property
    def allocations(self) -> tuple[torch.Tensor | None, ...]:
        """The memory behind all of it."""
        given = self.given
        return self.tokens, self.scales, self.handle.memory, given.counts, given.ranges, given.row_tokens

    def refilled(self, num_tokens: int) -> None:
        """Another call has written its results here: this is its result now, with a handle of its own, and what has
        kept the old handle is to learn that it is void. Frozen for everyone else.
        """
        old = self.handle
        object.__setattr__(old, "replaced", True)
        object.__setattr__(self, "handle", Handle(old.owner, num_tokens, old.memory, old.addresses, old.stream))


class DispatchOptions(TypedDict, total=False):
    """Keyword arguments of `ExpertParallel.dispatch`, which describes them."""

    num_tokens: torch.Tensor | None
    out: torch.Tensor | Dispatched | None
    total_counts: torch.Tensor | None
    timeout: float | None
    waited_ns: torch.Tensor | None


class CombineOptions(TypedDict, total=False):
    """Keyword arguments of `ExpertParallel.combine`, which describes them."""

    out: torch.Tensor | None
    timeout: float | None
    waited_ns: torch.Tensor | None
    renormalize: bool
