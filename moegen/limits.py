# SPDX-License-Identifier: Apache-2.0
"""Each limit once: what kernels can be rendered for, and the sizes that hardware and symmetric memory prescribe."""

from __future__ import annotations

MAX_RANKS = 64
"""A token's ranks are the bits of one 64-bit word."""

MAX_EXPERTS = 1024
MAX_TOPK = 32
MAX_ROW_BYTES = 64 * 1024

MAX_TOKENS_PER_RANK = 1 << 20
"""With MAX_EXPERTS, rows of the output are counted in 31 bits."""

WARP_SIZE = 32
MAX_BLOCK_WARPS = 32

MAX_SHARED_BYTES = 48 * 1024
"""Static shared memory of a block on every GPU."""

REGION_ALIGNMENT = 256
"""Bytes: of every region in symmetric memory."""

CHUNK_ALIGNMENT = 128
"""Bytes: of every chunk of an all-to-all."""

FIRST_EPOCH = 2
"""See `epoch_after` in `templates/device/epoch.cuh`."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
