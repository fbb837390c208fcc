# SPDX-License-Identifier: Apache-2.0
"""What a thread has under way at once: what was fastest, or as much as registers hold without spilling."""

from __future__ import annotations

ROW_AHEAD = {"dispatch": 7, "combine": 4}
"""16-byte vectors of a part of `ht`, and of `coll` with its layouts. Seven divide rows of 7168 elements; combine has
three parts under way, and sums of one.
"""

LOW_LATENCY_STEPS = 8
"""Vectors of a row of `ll` that a thread holds."""

TWO_ROWS_VECTORS = 2048
"""Of a row of `ll`, with all threads of a multiprocessor: up to here combine has its parts of two rows ahead."""

ROUTES_AHEAD_PACKETS = 8
ROUTES_AHEAD_RANKS = 4
ROUTES_AHEAD_THREADS = 128
"""Packets of routes of `ll` that a thread asks for at once: with more ranks than these, in blocks of up to so many
threads. With few ranks there are few, and more text takes longer to fetch than that saves; only small blocks have the
registers.
"""

PAYLOAD_AHEAD = 7
"""Units of a payload of `a2a`; seven divide rows of 7168 bf16 between 128 threads."""

PAYLOAD_STAGES = 2
"""Rows of a team that travel by bulk copies: while one leaves, the next arrives."""

MOVED_AHEAD = 4
"""Vectors of `coll_move`: with 448 threads of 132 blocks, 3.8 MB."""

SUMS, FEWER_SUMS = 32, 16
"""That a thread of combine of `a2a` holds, besides the vectors that it adds; the second where one of the following
three is exceeded.
"""

SUMS_THREADS, QUANTIZED_SUMS_THREADS = 512, 256
"""Of a block; the second where fp32 rows are quantized."""

PULLED_SUMS_RANKS = 2
"""Whose rows are read in place."""

PULLED_VECTORS, WIDE_PULLED_VECTORS, FEWEST_PULLED_VECTORS = 16, 8, 4
"""Of a token's rows that a thread asks for at once where it reads them in place: the second of fp32 rows and of those
that are quantized, the third in blocks of more than SUMS_THREADS.
"""
