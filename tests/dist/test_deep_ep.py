# SPDX-License-Identifier: Apache-2.0
"""DeepEP's low-latency calls between processes: gloo groups on the CPU, and on GPUs of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.deep_ep_cases import FP8, Case
from support.deep_ep_table import every_mode, table
from support.processes import Processes

from moegen.runtime.worlds import GroupWorld


def devices() -> list[object]:
    gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs on this machine")
    return ["cpu", pytest.param("cuda", marks=gpus)]


@pytest.fixture(scope="module", params=devices())
def group(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(2, request.param)
    yield processes
    processes.stop()


def in_process(rank: int, device: str, case: Case) -> str:
    every_mode(GroupWorld(device=device), case)
    return "ok"


def test_every_mode_of_one_shape(group: Processes) -> None:
    assert group.call(in_process, Case(2, 16, 4, 512, FP8)) == ["ok"] * 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", [case for case in table() if case.ranks == 2], ids=str)
def test_every_mode(group: Processes, case: Case) -> None:
    assert group.call(in_process, case) == ["ok"] * 2
