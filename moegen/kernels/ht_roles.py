# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a launch of family `ht` send and which receive."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.kernels.ht import HighThroughputSpec


@dataclass(frozen=True)
class Roles:
    """Which blocks of a launch send and which receive: (first block, number of blocks)."""

    blocks: int
    senders: tuple[int, int]
    receivers: tuple[int, int]


SEND_SHARES = {
    ("dispatch", "token"): 0.34,
    ("dispatch", "packed"): 0.16,
    ("quantising dispatch", "token"): 0.5,
    ("quantising dispatch", "packed"): 0.3,
    ("combine", "token"): 0.5,
    ("combine", "packed"): 0.5,
}
"""Of a launch's blocks, by op and layout: what was fastest, or within 3% of that, with 8, 24, 64 and 132 blocks between
two H200 (bench/results). A multiprocessor stores some 35 GB/s, to a peer as to its own memory, so that each role needs
its share of what is stored.
"""

SEND_SHARES_OF_MANY = SEND_SHARES | {("dispatch", "token"): 0.26}
"""The same with more than two ranks: four H200 take 496 us in place of 506 in bfloat16, 275 in place of 287 in FP8."""


def roles(spec: HighThroughputSpec, blocks: int) -> Roles:
    """Senders first, so that rows leave at once."""
    if blocks == 1:
        return Roles(1, (0, 1), (0, 1))
    shares = SEND_SHARES if spec.num_ranks <= 2 else SEND_SHARES_OF_MANY
    share = shares["quantising dispatch" if spec.quantises else spec.op, spec.layout]
    send = max(1, min(blocks - 1, round(blocks * share)))
    return Roles(blocks, (0, send), (send, blocks - send))
