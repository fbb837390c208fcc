# SPDX-License-Identifier: Apache-2.0
"""What links and an all-to-all of torch.distributed take, measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What an all-to-all of torch.distributed takes.

    Attributes:
        bytes_per_second: of large ones, what a rank sends to the others.
        round_trip: seconds that an exchange of counts delays a dispatch, the host's waiting included.
    """

    bytes_per_second: float
    round_trip: float


NCCL = Link(280e9, 450e-6)
"""Two H200: 256 MiB per rank, half of it to the other, in 482 us; and a pair of 64 tokens called from Python in 387 us
padded, in 846 us exact (bench/results/coll_h200_processes_r2_h7168_k4_e16).
"""

GLOO = Link(0.6e9, 2.5e-3)
"""Four processes on two cores: 16 MiB to each other rank in 85 ms, a few bytes in 2.5 ms; two processes: 25 and 0.4."""

NVLINK_GBS = 430.0
"""Of 18 links of the fourth generation, in one direction, what is left for rows."""
