# SPDX-License-Identifier: Apache-2.0
"""The table of DeepEP's low-latency calls: ranks, hidden, top-k, experts and formats; each in every mode.

Of every number of ranks: each hidden with two formats that it can have, each top-k, few and many experts.
"""

from __future__ import annotations

import pytest

import moegen
from moegen.compat import deep_ep
from moegen.runtime.worlds import RankWorld
from support.deep_ep_cases import BF16, FP8, MODES, ROUNDED, UE8M0, Case, round_trip_of_rank

HIDDEN = (2048, 2880, 3584, 7168, 8192, 7168)
FORMATS = ((FP8, BF16, UE8M0, ROUNDED, BF16, UE8M0), (ROUNDED, BF16, FP8, UE8M0, FP8, BF16))
TOPK = (1, 5, 6, 8, 10, 16)
EXPERTS = {1: (8, 64, 192), 2: (8, 128, 384), 3: (9, 96, 384), 4: (8, 256, 384), 8: (8, 256, 384)}


def table() -> list[Case]:
    cases = []
    for turn, (ranks, experts) in enumerate(EXPERTS.items()):
        for row, hidden in enumerate(HIDDEN):
            topk = TOPK[(row + turn) % len(TOPK)]
            number = experts[row % 3] if experts[row % 3] >= topk else 2 * experts[row % 3]
            cases.append(Case(ranks, number, topk, hidden, FORMATS[turn % 2][row]))
    return cases


def every_mode(rank: RankWorld, case: Case, modes: tuple[str, ...] = MODES) -> None:
    buffer = deep_ep.Buffer(rank, low_latency_mode=True)
    for mode in modes:
        for given in (False, True):
            round_trip_of_rank(buffer, rank, case, mode, given=given)
    buffer.destroy()


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", table(), ids=str)
def test_every_mode(device: str, case: Case) -> None:
    alone = device == "cuda" and case.ranks > 1  # virtual ranks on one GPU have one hardware queue each
    modes = tuple(mode for mode in MODES if not (alone and mode == "async"))
    moegen.LocalWorld(case.ranks, device).run(every_mode, case, modes)
