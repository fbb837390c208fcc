# SPDX-License-Identifier: Apache-2.0
"""The blocks of a launch: the constructor's limit, else the table's, for each op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moegen import expert_parallel
from moegen.expert_parallel import ExpertParallel
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec
from moegen.runtime import low_latency
from moegen.runtime.worlds import LocalWorld
from moegen.select import Selection, select


@pytest.mark.parametrize(
    ("num_sms", "most"), [(None, {"dispatch": 2, "combine": 1}), (3, {"dispatch": 3, "combine": 3})]
)
def test_the_constructor_wins_over_the_table(
    monkeypatch: pytest.MonkeyPatch, num_sms: int | None, most: dict[str, int]
) -> None:
    room: dict[str, int] = {}

    def tuned(problem: Problem) -> Selection:
        return replace(select(problem), dispatch_sms=2, combine_sms=1)

    def roles(spec: Spec, max_tokens: int, resident_blocks: int) -> Any:
        room[spec.op] = resident_blocks
        return real(spec, max_tokens, resident_blocks)

    real: Any = low_latency.roles
    monkeypatch.setattr(expert_parallel, "select", tuned)
    monkeypatch.setattr(low_latency, "roles", roles)
    with ExpertParallel(
        LocalWorld(1).ranks[0], num_experts=4, num_topk=2, hidden=64, max_tokens_per_rank=8, num_sms=num_sms
    ) as ep:
        ep.warmup()
    assert room == most
