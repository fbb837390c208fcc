# SPDX-License-Identifier: Apache-2.0
"""Blocks of a launch, warps and warp groups of a block: measured numbers, but for those of `ll` on GPUs, which are in a
table.
"""

from __future__ import annotations

from moegen.codegen.spec import WarpGroups

HOST_NUM_WARPS = 2

GPU_NUM_WARPS = {"dispatch": 32, "quantising": 16, "combine": 16}
"""Of a block, one to a multiprocessor. Threads that hold sums, or what they quantise, need more registers than 32 warps
leave them: with 32, dispatch that quantises spilled 304 bytes and took 148 us in place of 134 (bench/results).
"""

LAYOUT_NUM_WARPS = 8
"""A token is one load and a few votes: small blocks come and go."""

LAYOUT_MAX_BLOCKS = 128
"""More would count fewer tokens each than they have warps, and only add to the additions at the end."""

COMBINE_RESIDENT_THREADS, COMBINE_RESIDENT_BLOCKS = 256, 2
"""Blocks of combine of `ll` with up to so many threads that a multiprocessor holds; of larger ones, one."""

OPEN_WARP_GROUPS, HOST_OPEN_WARP_GROUPS = WarpGroups(1, 8), WarpGroups(1, 1)
"""Of the kernel that reads the headers of exchanged chunks."""

HOST_WARP_GROUPS = WarpGroups(2, 1)
"""On a CPU more threads only add switches between fibers; two teams keep several rows per block under test."""

ONE_SIDED_GROUPS = (
    (32, WarpGroups(1, 14)),
    (256, WarpGroups(1, 7)),
    (1024, WarpGroups(2, 7)),
    (None, WarpGroups(4, 4)),
)
"""Teams by capacity, for 7168 elements between two H200 (bench/results): as many warps as there are to spare move a
row; 14 and 7 of them divide it.
"""

PULLED_GROUPS = ((256, WarpGroups(1, 14)), (1024, WarpGroups(2, 7)), (None, WarpGroups(4, 4)))
"""The same for combine that reads rows where they are: it has more loads under way with more warps."""

FILLING_HEADROOM = 1.25
FEWEST_FILLING_SMS = 4
"""Of the multiprocessors that DeepEP's interface is told fill a link: by how much they exceed what the model of
`moegen.compat.deep_ep.elastic_sizes` asks for, and how many there are at least.
"""
