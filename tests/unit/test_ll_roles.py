# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a low-latency launch tell, send and receive."""

from __future__ import annotations

import pytest

from moegen.kernels.ll_roles import Roles, roles
from moegen.kernels.spec import Spec

BLOCKS = (1, 2, 3, 7, 131, 132, 264, 396)
TOKENS = (1, 2, 19, 128, 4096)
RANKS = (1, 2, 3, 8, 64)


def made(op: str, ranks: int, tokens: int, blocks: int, phase: str = "whole") -> Roles:
    weights = "_atdispatch" if op == "combine" else ""
    stem = f"ll_{op}_bf16_expert_r{ranks}_h128_k8_e64_ipc_w1x1_row_{phase}{weights}"
    return roles(Spec.parse(stem), tokens, blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["dispatch", "combine"])
@pytest.mark.parametrize("phase", ["whole", "send", "receive"])
def test_every_role_has_blocks_of_the_launch(op: str, phase: str) -> None:
    for ranks in RANKS:
        for tokens in TOKENS:
            for blocks in BLOCKS:
                who = made(op, ranks, tokens, blocks, phase)
                assert 1 <= who.blocks <= blocks
                assert (who.senders[1] > 0) == (phase != "receive"), who
                assert (who.receivers[1] > 0) == (phase != "send"), who
                assert who.tellers <= who.blocks
                for first, number in (who.senders, who.receivers):
                    assert first + number <= who.blocks


def test_few_tokens_are_split_over_teams() -> None:
    assert made("dispatch", 8, 1, 132).shares == 7
    assert made("dispatch", 8, 1, 132).senders[1] == 7
    assert made("dispatch", 8, 1, 132, "send").shares == 8  # this rank's own rows go through staging too
    assert made("dispatch", 2, 1, 132).shares == 1


@pytest.mark.parametrize("ranks", RANKS)
def test_a_block_per_token_is_not_split(ranks: int) -> None:
    assert made("dispatch", ranks, 128, 396).shares == 1


def test_more_ranks_get_more_senders_in_combine() -> None:
    assert made("combine", 2, 512, 264).senders[1] == 132
    assert made("combine", 4, 512, 264).senders[1] == 184
