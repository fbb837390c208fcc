# SPDX-License-Identifier: Apache-2.0
"""Family `ht`: where things lie in every rank's symmetric memory."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.base.regions import offsets
from moegen.codegen.call_words import REGION_BYTES
from moegen.high_throughput.spec import HighThroughputCombine, HighThroughputDispatch
from moegen.limits import PACKET_BYTES


@dataclass(frozen=True)
class Regions:
    """Where one op's parts lie in every rank's symmetric memory: byte offsets."""

    consumed: int
    calls: int
    counts: int
    entries: int
    rows: int
    tags: int
    end: int


def regions(spec: HighThroughputDispatch | HighThroughputCombine, max_tokens: int, start: int) -> Regions:
    """Lays an op's regions out from byte `start` on."""
    rows = spec.num_ranks * max_tokens
    counts = entries = 0
    if isinstance(spec, HighThroughputDispatch):
        counts, entries = spec.num_ranks * spec.count_packets, rows * spec.entry_packets
    sizes = (
        spec.num_ranks * 4,
        REGION_BYTES,
        counts * PACKET_BYTES,
        entries * PACKET_BYTES,
        rows * spec.slot_bytes,
        rows * 8,
    )
    return Regions(*offsets(sizes, start))
