# SPDX-License-Identifier: Apache-2.0
"""Each limit once: what kernels can be rendered for, what callers may ask for, and the sizes that hardware and
symmetric memory prescribe.
"""

from __future__ import annotations

MAX_RANKS = 64
"""A token's ranks are the bits of one 64-bit word."""

MAX_EXPERTS = 1024
MAX_TOPK = 32
MAX_ROW_BYTES = 64 * 1024

MAX_TOKENS_PER_RANK = 1 << 20
"""With MAX_EXPERTS, rows of the output are counted in 31 bits."""

MAX_ROWS = 2**31 - 1
"""Of a result that a caller gives or asks for."""

MAX_ALIGNMENT = 1 << 16
"""Rows, of which an expert's first one is a multiple in layout `packed`."""

MAX_BIASES = 2
"""Tensors that combine adds to its sums: kernels have a parameter for each."""

MAX_PAYLOADS = 16
MAX_STATS = 1024
MAX_SENDERS = 256
"""Blocks that send payloads in one launch; each signals for itself."""

MAX_SMS = 1024
"""Thread blocks per launch that a caller may ask for."""

MAX_SLOTS = 16
"""Calls of one object whose hooks may be open."""

MAX_LOCAL_RANKS = 1024
"""Of one process: each is a thread. It is more than any kernel is for, whose Specs say how many that is."""

WARP_SIZE = 32
MAX_BLOCK_WARPS = 32

MAX_TEAMS = 15
"""Of several warps in a block, each with a barrier of its own: a block has sixteen, and the first is for all of it."""

MAX_SHARED_BYTES = 48 * 1024
"""Static shared memory of a block on every GPU."""

MAX_STAGE_BYTES = 200 * 1024
"""Of all stages of a block's bulk copies: an H100 grants 227 KiB of shared memory."""

VECTOR_BYTES = 16
"""What one access of a thread moves; addresses and lengths of rows are multiples of it."""

PACKET_BYTES = VECTOR_BYTES
"""A vector that carries its epoch: one access is never seen in halves (`templates/device/packets.cuh`)."""

PACKET_WORDS = PACKET_BYTES // 4 - 1
"""32-bit words of it that are not the epoch."""

WORD_BYTES = 4
"""Of the numbers that kernels leave for the host and each other."""

CONTROL_WORDS = 32
"""32-bit words of a struct Control in device memory: a 128-byte line of its own, so that launches share none."""

REGION_ALIGNMENT = 256
"""Bytes: of every region in symmetric memory."""

CHUNK_ALIGNMENT = 128
"""Bytes: of every chunk of an all-to-all."""

HALVES = 2
"""Receive buffers of an op, for even and odd epochs, so that a sender need not wait until the previous epoch has been
read: whoever begins an epoch has seen all ranks begin the one before, and so end the one before that.
"""

FIRST_EPOCH = 2
"""See `epoch_after` in `templates/device/epoch.cuh`."""

MAX_EPOCH = 2**32 - 1


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
