# SPDX-License-Identifier: Apache-2.0
"""Family `ll`: where things lie in every rank's symmetric memory."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.base.regions import offsets
from moegen.codegen import call_words
from moegen.limits import HALVES, PACKET_BYTES, PACKET_WORDS, ceil_div
from moegen.low_latency.spec import LowLatencyCombine, LowLatencyDispatch


@dataclass(frozen=True)
class Regions:
    """Where one op's parts lie in every rank's symmetric memory: byte offsets."""

    consumed: int
    calls: int
    routes: int
    rows: int
    tags: int
    weights: int
    end: int


def regions(spec: LowLatencyDispatch | LowLatencyCombine, max_tokens: int, start: int) -> Regions:
    """Lays an op's regions out from byte `start` on: two halves of each, for even and odd epochs."""
    rows = HALVES * spec.num_ranks * max_tokens
    sizes = (
        spec.num_ranks * 4,
        0 if isinstance(spec, LowLatencyDispatch) else call_words.REGION_BYTES,
        _routes_bytes(spec, max_tokens) if isinstance(spec, LowLatencyDispatch) else 0,
        rows * spec.slot_bytes,
        rows * 8 if spec.wire == "row" else 0,
        # Reserved for either combine, so that weights may come at combine on any call.
        0 if isinstance(spec, LowLatencyDispatch) else rows * ceil_div(spec.num_topk, PACKET_WORDS) * PACKET_BYTES,
    )
    return Regions(*offsets(sizes, start))


def _routes_bytes(spec: LowLatencyDispatch, max_tokens: int) -> int:
    return HALVES * spec.num_ranks * (1 + max_tokens * spec.route_packets) * PACKET_BYTES
