# SPDX-License-Identifier: Apache-2.0
"""Family `a2a`: where things lie in every rank's symmetric memory, and which blocks of a launch do what."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from moegen.base.regions import offsets
from moegen.codegen.call_words import REGION_BYTES
from moegen.limits import (
    HALVES,
    MAX_PAYLOADS,
    MAX_SENDERS,
    MAX_STATS,
    PACKET_BYTES,
    PACKET_WORDS,
    ceil_div,
)

PLANE_ALIGNMENT = 128


@dataclass(frozen=True)
class Regions:
    """Where things lie in every rank's symmetric memory: byte offsets."""

    presence: int
    calls: int
    counts: int
    stats: int
    flags: int
    planes: int
    tags: int
    rows: int
    expert_rows: int
    end: int

    @property
    def half(self) -> int:
        """Bytes of one half of combine's rows."""
        return (self.expert_rows - self.rows) // HALVES


def regions(num_ranks: int, max_tokens: int, payload_bytes: int, combine_bytes: int, expert_rows: bool) -> Regions:
    """Lays out room for any payloads of `payload_bytes` and any rows of `combine_bytes` per token.

    Args:
        expert_rows: whether experts may write their rows into this memory, too.
    """
    slots = num_ranks * max_tokens
    sizes = (
        num_ranks * 8,
        REGION_BYTES,
        HALVES * num_ranks * PACKET_BYTES,
        HALVES * num_ranks * ceil_div(MAX_STATS, PACKET_WORDS) * PACKET_BYTES,
        num_ranks * MAX_SENDERS * 4,
        slots * payload_bytes + MAX_PAYLOADS * PLANE_ALIGNMENT,
        HALVES * slots * 4,
        HALVES * slots * combine_bytes,
        slots * combine_bytes if expert_rows else 0,
    )
    return Regions(*offsets(sizes))


def planes(widths: tuple[int, ...], num_ranks: int, slots: int, start: int) -> list[int]:
    """Byte offsets of the payloads' planes, for a call with so many slots per source."""
    sizes = (ceil_div(num_ranks * slots * width, PLANE_ALIGNMENT) * PLANE_ALIGNMENT for width in widths)
    return list(accumulate(sizes, initial=start))[:-1]
