# SPDX-License-Identifier: Apache-2.0
"""What `OneSided` returns: `DispatchedPayloads` with their `PayloadsHandle`, and `Quantised` sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from moegen.runtime.ownership import ProcessBound


class ExchangedRows(NamedTuple):
    """Of a dispatch that exchanged counts first.

    Attributes:
        came: rows from each source.
        sent: rows to each rank.
    """

    came: tuple[int, ...]
    sent: tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class PayloadsHandle(ProcessBound):
    """A routing, for combine. Opaque; owns its memory and pins no buffer, so any number may live.

    Attributes:
        owner: the object that made it; only that object takes it.
        num_tokens: T as given to dispatch.
        max_tokens: rows that a source could send in that call.
        memory: the device memory behind `addresses`.
        addresses: of token_ranks, token_slots, tokens_sent and counts.
        stream: the CUDA stream that its memory was allocated on, as a number; 0 on the CPU.
        exchanged: what the host knows of an exact dispatch, whose combine is exact, too; else None.
    """

    _noun: ClassVar[str] = "handle"
    _belongs_to: ClassVar[str] = "its process and its OneSided"

    owner: object
    num_tokens: int
    max_tokens: int
    memory: torch.Tensor
    addresses: tuple[int, ...]
    stream: int
    exchanged: ExchangedRows | None = None

    def __repr__(self) -> str:
        return f"PayloadsHandle(num_tokens={self.num_tokens}, max_tokens={self.max_tokens})"


@dataclass(frozen=True, eq=False, slots=True)
class DispatchedPayloads:
    """What came to this rank, layout `rank`.

    Attributes:
        payloads: [ranks, max_tokens, width] each, of the dtypes given. Row (s, i) is of the i-th of source s's tokens
            that select an expert of this rank; rows from counts[s] on were not written. They are views of the receive
            buffer, valid until this rank's next call, combine's kernel included: other ranks may then write again. On
            path collective, rows of a source lie side by side, and sources further apart.
        counts: int32 [ranks] on the device: rows from each source.
        stats: int32 [ranks, words]: every rank's statistics, if they were given; else None.
        handle: for combine.
    """

    payloads: tuple[torch.Tensor, ...]
    counts: torch.Tensor
    stats: torch.Tensor | None
    handle: PayloadsHandle


@dataclass(frozen=True, eq=False, slots=True)
class Quantised:
    """Numbers of few bits whose groups share scales, [T, hidden]. An element stands for data * scale, NVFP4 besides
    divided by the `output_scale` that it was made with.

    Attributes:
        data: MXFP8: float8_e4m3fn [T, hidden]; NVFP4: uint8 [T, hidden / 2], two e2m1 in a byte, the first in its low
            half.
        scales: MXFP8: uint8, E8M0 (2**(byte - 127)), one per 32 elements; NVFP4: float8_e4m3fn, one per 16. Layout
            "linear": [T, groups]. Layout "128x4": [ceil(T / 128) * 128, ceil(groups / 4) * 4], as the tensor cores of
            Blackwell take them: tiles of 128 tokens and 4 groups, of 512 bytes, one after the other along a row of
            tiles; in a tile the scale of token m and group k is at (m % 32) * 16 + (m % 128) // 32 * 4 + k % 4.
    """

    data: torch.Tensor
    scales: torch.Tensor
