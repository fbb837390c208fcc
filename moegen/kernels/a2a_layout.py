# SPDX-License-Identifier: Apache-2.0
"""Family `a2a`: where things lie in every rank's symmetric memory, and which blocks of a launch do what."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from moegen.kernels.a2a import (
    MAX_PAYLOADS,
    MAX_SENDERS,
    MAX_STATS,
    PIECE_BYTES,
    PIECE_WORDS,
    OneSidedCombine,
    OneSidedDispatch,
)
from moegen.kernels.call_words import REGION_BYTES
from moegen.kernels.ll import REGION_ALIGNMENT, ceil_div

HALVES = 2
"""Of what is staged, for even and odd epochs: whoever begins an epoch has seen all ranks begin the one before, and so
end the one before that.
"""

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
        HALVES * num_ranks * PIECE_BYTES,
        HALVES * num_ranks * ceil_div(MAX_STATS, PIECE_WORDS) * PIECE_BYTES,
        num_ranks * MAX_SENDERS * 4,
        slots * payload_bytes + MAX_PAYLOADS * PLANE_ALIGNMENT,
        HALVES * slots * 4,
        HALVES * slots * combine_bytes,
        slots * combine_bytes if expert_rows else 0,
    )
    ends = accumulate((ceil_div(size, REGION_ALIGNMENT) * REGION_ALIGNMENT for size in sizes), initial=0)
    return Regions(*ends)


def planes(widths: tuple[int, ...], num_ranks: int, slots: int, start: int) -> list[int]:
    """Byte offsets of the payloads' planes, for a call with so many slots per source."""
    sizes = (ceil_div(num_ranks * slots * width, PLANE_ALIGNMENT) * PLANE_ALIGNMENT for width in widths)
    return list(accumulate(sizes, initial=start))[:-1]


@dataclass(frozen=True)
class Roles:
    """Which blocks of a launch send and which receive: (first block, number of blocks)."""

    blocks: int
    senders: tuple[int, int]
    receivers: tuple[int, int]


COMBINE_SEND_SHARE = 0.5
"""As in family `ht`, whose combine moves the same rows."""


def roles(spec: OneSidedDispatch | OneSidedCombine, max_tokens: int, resident: int) -> Roles:
    """Senders first, so that rows leave at once. `resident`: blocks that fit on the device together."""
    if resident == 1:
        return Roles(1, (0, 1), (0, 1))
    rows = ceil_div(max_tokens * max(1, spec.num_ranks - 1), spec.teams)
    tokens = ceil_div(max_tokens, spec.teams)
    if isinstance(spec, OneSidedDispatch):
        senders = min(tokens, resident - 1, MAX_SENDERS)
        return Roles(senders + 1, (0, senders), (senders, 1))
    if spec.pulls:
        blocks = min(tokens, resident)
        return Roles(blocks, (0, 0), (0, blocks))
    senders, receivers = rows, tokens
    if senders + receivers > resident:
        senders = min(senders, max(1, round(resident * COMBINE_SEND_SHARE)))
        receivers = min(receivers, resident - senders)
    return Roles(senders + receivers, (0, senders), (senders, receivers))
