# SPDX-License-Identifier: Apache-2.0
"""Shares of a launch's blocks that do one thing, measured."""

from __future__ import annotations

FEW_RANKS = 2
"""Up to here the first of two shares counts, above the one `OF_MANY`."""

LOW_LATENCY_SEND_SHARE = {"dispatch": (1, 3), "combine": (1, 2)}
"""Of the blocks, where there are not enough for a team per row. Dispatch receives more than it sends: rows fan out."""

LOW_LATENCY_SEND_SHARE_OF_MANY = LOW_LATENCY_SEND_SHARE | {"combine": (7, 10)}
"""The same with more than two ranks, each of which returns a row of most tokens: of 512 tokens, four ranks' combine
takes 74.6 us in place of 78.6 (bench/results/sweeps)."""

ROW_SEND_SHARES = {
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

ROW_SEND_SHARES_OF_MANY = ROW_SEND_SHARES | {("dispatch", "token"): 0.26}
"""The same with more than two ranks: four H200 take 496 us in place of 506 in bfloat16, 275 in place of 287 in FP8."""

LOW_LATENCY_BLOCKS_PER_TELLER = 8
"""Of the blocks of a dispatch, at most one in so many tells the routes."""

ONE_SIDED_COMBINE_SEND_SHARE = 0.5
"""As of rows in `ROW_SEND_SHARES`, of which combine moves the same."""
