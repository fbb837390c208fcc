# SPDX-License-Identifier: Apache-2.0
"""`Handle` and `Dispatched`: what dispatch returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False, slots=True)
class Handle:
    """What combine needs to know of its dispatch. Opaque; owns its memory and pins no buffer, so any number may live.

    Attributes:
        owner: the object that made it; only that object's combine takes it.
        num_tokens: rows of the token tensor that was dispatched.
        memory: the device memory behind `addresses`.
        addresses: of rows_received, row_origin, row_slots, row_weights, token_ranks, tokens_sent, in that order.
        stream: the CUDA stream that it was made on; None on the CPU.
    """

    owner: object
    num_tokens: int
    memory: torch.Tensor
    addresses: tuple[int, int, int, int, int, int]
    stream: torch.cuda.Stream | None = None

    def __repr__(self) -> str:
        return f"Handle(num_tokens={self.num_tokens})"

    def __reduce__(self) -> Any:
        raise TypeError("a moegen handle belongs to its process and its ExpertParallel; it cannot be pickled or copied")


@dataclass(frozen=True, eq=False, slots=True)
class Dispatched:
    """The tokens that came to this rank, layout `expert`.

    Attributes:
        tokens: [local experts, ranks * max_tokens_per_rank, hidden]. Expert e's rows are tokens[e, :counts[e]], by
            source rank and then by the source's token; what lies beyond is undefined. A token that selects an expert
            twice has one row there.
        scales: None for unquantised payloads.
        counts: int32 [local experts], on the device.
        ranges: int32 [local experts, ranks, 2], on the device: first row and number of rows of each source rank.
        handle: give it to combine.
    """

    tokens: torch.Tensor
    scales: torch.Tensor | None
    counts: torch.Tensor
    ranges: torch.Tensor
    handle: Handle
