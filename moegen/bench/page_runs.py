# SPDX-License-Identifier: Apache-2.0
"""The committed results that published tables and sentences are made of."""

from __future__ import annotations

from moegen.bench.committed import Run

LL, LL_FP8 = Run("ll_h200_processes_r2.json"), Run("ll_h200_processes_r2_fp8.json")
HT, HT_TOKENS = Run("ht_h200_processes_r2.json"), Run("ht_h200_processes_r2_tokens.json")
A2A = Run("a2a_h200_processes_r2.json")
A2A_FEW_EXPERTS = Run("a2a_h200_processes_r2_h7168_k4_e16.json")
COLL = Run("coll_h200_processes_r2_h7168_k4_e16.json")
IN_TURN_HT = Run("node_h200_processes_r4_uniform.txt", "ht")
IN_TURN_A2A = Run("node_h200_processes_r4_uniform.txt", "a2a")
SHARE_26 = Run("sweeps/ht_h200_r4_shares.txt", section="share 0.26")
LL_IN_TURN = Run("sweeps/ll_h200_r4_announced_later.txt")
MOST = 4096


def before(ranks: int, part: str) -> Run:
    """A part of the suite between so many H200, when rows still went back one rank after the other."""
    return Run(f"before_turns/node_h200_processes_r{ranks}.json", part)


def h100(part: str) -> Run:
    return Run("node_h100_processes_r2.json", part)
