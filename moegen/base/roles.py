# SPDX-License-Identifier: Apache-2.0
"""Block specialization: which blocks of a launch do what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Roles:
    """Which blocks of a launch send and which receive: (first block, number of blocks)."""

    blocks: int
    senders: tuple[int, int]
    receivers: tuple[int, int]
