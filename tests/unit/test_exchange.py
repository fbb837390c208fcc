# SPDX-License-Identifier: Apache-2.0
"""The cost rule of path collective: when counts are exchanged first."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from moegen.kernels.problem import Problem
from moegen.tuning.exchange import GLOO, NCCL, ExchangeRule, share_of_tokens

PROBLEM = Problem(8, 256, 8, 7168, 4096, layout="rank", path="collective")
ROW_BYTES = 4 * 7168


@pytest.mark.parametrize(("ranks", "experts", "topk"), [(2, 4, 2), (3, 7, 2), (4, 5, 3), (1, 4, 4)])
def test_share_of_tokens_is_the_average_of_all_routings(ranks: int, experts: int, topk: int) -> None:
    problem = Problem(ranks, experts, topk, 128, 16)
    holders = [rank for rank in range(ranks) for _ in problem.local_experts(rank)]
    hit = [len({holders[expert] for expert in chosen}) for chosen in combinations(range(experts), topk)]
    assert share_of_tokens(problem) == pytest.approx(sum(hit) / len(hit) / ranks)


def test_few_tokens_are_padded_and_many_are_not() -> None:
    rule = ExchangeRule(PROBLEM, "auto")
    assert [rule.is_exact(slots, ROW_BYTES) for slots in (1, 128, 1024, 2048, 4096)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert rule.padding_bytes(2048, ROW_BYTES) > NCCL.bytes_per_second * NCCL.round_trip


def test_nothing_is_padded_between_two_ranks_that_hold_all_that_is_selected() -> None:
    """Top-8 of 256: a token misses one of two ranks once in 300."""
    assert not ExchangeRule(replace(PROBLEM, num_ranks=2), "auto").is_exact(4096, ROW_BYTES)


def test_a_slow_link_makes_padding_dear() -> None:
    host = ExchangeRule(replace(PROBLEM, on_host=True), "auto")
    assert GLOO.bytes_per_second * GLOO.round_trip < NCCL.bytes_per_second * NCCL.round_trip
    assert host.is_exact(128, ROW_BYTES)


def test_who_says_what_he_wants_gets_it() -> None:
    assert ExchangeRule(PROBLEM, "exact").is_exact(1, 16)
    assert not ExchangeRule(PROBLEM, "padded").is_exact(65536, 1 << 20)
    assert not ExchangeRule(replace(PROBLEM, path="ipc"), "exact").is_exact(65536, 1 << 20)
