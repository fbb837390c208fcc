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


FEW_BLOCKS = 48
SEND_SHARES = {
    ("dispatch", "token"): (0.34, 0.25),
    ("dispatch", "packed"): (0.17, 0.2),
    ("combine", "token"): (0.5, 0.4),
    ("combine", "packed"): (0.5, 0.4),
}
"""Of a launch's blocks, by op and layout: where they are fewer than FEW_BLOCKS, and otherwise. Between two H200
(bench/results) a multiprocessor stored some 35 GB/s, to a peer as to its own memory, so that with few of them each role
needs its share of what is stored; with many the link is the limit. With 132 and 24 blocks shares near these were
measured; FEW_BLOCKS lies between.
"""


def roles(spec: HighThroughputSpec, blocks: int) -> Roles:
    """Senders first, so that rows leave at once."""
    if blocks == 1:
        return Roles(1, (0, 1), (0, 1))
    few, many = SEND_SHARES[spec.op, spec.layout]
    share = few if blocks < FEW_BLOCKS else many
    send = max(1, min(blocks - 1, round(blocks * share)))
    return Roles(blocks, (0, send), (send, blocks - send))
