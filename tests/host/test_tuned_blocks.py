# SPDX-License-Identifier: Apache-2.0
"""The blocks of a launch: the constructor's limit, else the table's, for each op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moegen.codegen.problem import Problem
from moegen.codegen.spec import Spec
from moegen.low_latency import api, ops
from moegen.low_latency.api import ExpertParallel
from moegen.low_latency.select import Selection, select
from moegen.runtime.worlds import LocalWorld


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

    real: Any = ops.roles
    monkeypatch.setattr(api, "select", tuned)
    monkeypatch.setattr(ops, "roles", roles)
    with ExpertParallel(
        LocalWorld(1).ranks[0], num_experts=4, num_topk=2, hidden=64, max_tokens_per_rank=8, num_sms=num_sms
    ) as ep:
        ep.warmup()
    assert room == most
