# SPDX-License-Identifier: Apache-2.0
"""Every public call with hostile arguments: it may be refused, by whatever exception. It must not crash, hang, give
wrong numbers or leave an object that does not work. `tests.support.fuzz_cases` says what a case is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from support import fuzz_draw
from support.fuzz_cases import Case
from support.fuzz_faults import crash, err, hang
from support.fuzz_worker import Worker

FEW, MANY = 300, 10_000
HOW: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": (Phase.explicit, Phase.generate, Phase.shrink),
}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def test_what_happens_is_told(worker: Worker) -> None:
    assert "ended with -6" in worker(crash)
    assert "no end in 1 s" in worker(hang, seconds=1)
    assert "combine: the result is wrong" in worker(err)
    assert worker(Case("experts-ipc", 1, seed=1)) == ""


@settings(max_examples=FEW, derandomize=True, **HOW)
@given(case=fuzz_draw.cases(fuzz_draw.USUAL))
def test_hostile_calls(worker: Worker, case: Any) -> None:
    assert worker(case) == ""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("start", range(4))
def test_many_hostile_calls(worker: Worker, start: int) -> None:
    @seed(start)
    @settings(max_examples=MANY // 4, **HOW)
    @given(case=fuzz_draw.cases(fuzz_draw.ALL))
    def check(case: Any) -> None:
        assert worker(case) == ""

    check()
