# SPDX-License-Identifier: Apache-2.0
"""The committed results that published tables and sentences are made of: every file is named here, and only here."""

from __future__ import annotations

from moegen.bench.committed import Run

# ---- two H200 ----

LL, LL_FP8 = Run("ll_h200_processes_r2.json"), Run("ll_h200_processes_r2_fp8.json")
HT, HT_TOKENS = Run("ht_h200_processes_r2.json"), Run("ht_h200_processes_r2_tokens.json")
A2A = Run("a2a_h200_processes_r2.json")
A2A_FEW_EXPERTS = Run("a2a_h200_processes_r2_h7168_k4_e16.json")
COLL = Run("coll_h200_processes_r2_h7168_k4_e16.json")

# ---- four H200 ----

NODE_FOUR = Run("node_h200_processes_r4_uniform.txt")
LL_FOUR, HT_FOUR, A2A_FOUR = (Run(NODE_FOUR.file, part) for part in ("ll", "ht", "a2a"))
_LL_SWEEP, _HT_SHARES = "sweeps/ll_h200_r4_announced_later.txt", "sweeps/ht_h200_r4_shares.txt"
LL_SWEEP = Run(_LL_SWEEP)
LL_SWEEP_OF_TWO = Run(_LL_SWEEP, section="Two of them, the same kernels:")
LL_SWEEP_BEFORE = Run(_LL_SWEEP, section="Two of them, the kernels before rows went back in turn:")
HT_SHARE = Run(_HT_SHARES, section="share 0.26")
HT_LARGER_SHARE = Run(_HT_SHARES, section="share 0.42")
"""Of the blocks that send: the share that dispatch of layout `token` has, and a larger one."""

# ---- H100 ----

NODE_H100 = Run("node_h100_processes_r2.json")
PARTS_H100 = tuple(Run(NODE_H100.file, part) for part in ("ll", "ll_fp8", "ht", "a2a", "coll", "coll_many"))
LL_H100, LL_FP8_H100, HT_H100, A2A_H100, COLL_H100, COLL_MANY_H100 = PARTS_H100
NODE_VIRTUAL = Run("node_h100_virtual_r8.json")
ALONE_H100 = tuple(
    Run(f"{name}.json")
    for name in ("ll_h100_processes_r2", "ll_h100_processes_r2_fp8", "ht_h100_processes_r2", "a2a_h100_processes_r2")
)

FILES = (LL, LL_FP8, HT, HT_TOKENS, A2A, A2A_FEW_EXPERTS, COLL, NODE_FOUR, NODE_H100, *ALONE_H100, NODE_VIRTUAL)
"""Every result but the sweeps, in the order of the index."""

MOST = 4096
"""Tokens per rank that tables of layouts `token` and `packed` are of."""
