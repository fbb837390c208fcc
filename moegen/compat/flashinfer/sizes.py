# SPDX-License-Identifier: Apache-2.0
"""Where things lie in a workspace row, and how long it has to be: FlashInfer's formulas. All numbers are bytes."""

from __future__ import annotations

_NAMES = (
    "FLAG_VAL",
    "LOCAL_TOKEN_COUNTER",
    "SEND_COUNTERS",
    "RECV_COUNTERS",
    "DISPATCH_COMPLETION_FLAGS",
    "COMBINE_COMPLETION_FLAGS",
    "TOPK_TARGET_RANKS",
    "TOPK_SEND_INDICES",
    "EPLB_GATHERED_STATS",
    "PAYLOAD_DATA",
)

METAINFO_INDEX = {f"{name}_OFFSET_INDEX": index for index, name in enumerate(_NAMES)} | {
    "NUM_METAINFO_FIELDS": len(_NAMES)
}
"""Which element of the metainfo tensor holds which offset."""

TABLE_TOPK = 22
"""Selections per token for which the tables of a row have room, whatever top_k is."""

_ALIGNMENT = 128
_INT32 = 4


def offsets(ep_size: int, max_num_tokens: int, eplb_stats_num_experts: int = 0) -> tuple[int, ...]:
    """Of everything that METAINFO_INDEX names, from the beginning of a row."""
    table = max_num_tokens * TABLE_TOPK * _INT32
    flags, stats = ep_size * _INT32, ep_size * eplb_stats_num_experts * _INT32
    found: list[int] = []
    at = 0
    for size, aligned in (
        (_INT32, False),
        (_INT32, False),
        (flags, False),
        (flags, False),
        (flags, True),
        (flags, True),
        (table, True),
        (table, True),
        (stats, True),
        (0, True),
    ):
        at = rounded_up(at) if aligned else at
        found.append(at)
        at += size
    return tuple(found)


def aux_bytes(ep_size: int, max_num_tokens: int, eplb_stats_num_experts: int = 0) -> int:
    """What comes before the payloads."""
    return offsets(ep_size, max_num_tokens, eplb_stats_num_experts)[-1]


def workspace_bytes(
    ep_size: int, max_num_tokens: int, dispatch_bytes: int, combine_bytes: int, eplb_stats_num_experts: int = 0
) -> int:
    """A row for `dispatch_bytes` and `combine_bytes` per token."""
    rows = ep_size * max_num_tokens
    aux = aux_bytes(ep_size, max_num_tokens, eplb_stats_num_experts)
    return aux + rounded_up(rows * dispatch_bytes) + rounded_up(rows * combine_bytes)


def model_bytes(
    ep_size: int, top_k: int, max_num_tokens: int, hidden_size: int, extra: int = 0, eplb_stats_num_experts: int = 0
) -> int:
    """A row for 16-bit tokens that travel with int32 ids, 32-bit weights and `extra` bytes per token."""
    row = 2 * hidden_size
    return workspace_bytes(ep_size, max_num_tokens, row + 8 * top_k + extra, row, eplb_stats_num_experts)


def combine_offset(payload_offset: int, ep_size: int, max_tokens: int, dispatch_bytes: int) -> int:
    """Where the rows for combine begin behind received payloads of `dispatch_bytes` per token."""
    return rounded_up(payload_offset + ep_size * max_tokens * dispatch_bytes)


def rounded_up(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
