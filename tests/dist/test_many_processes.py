# SPDX-License-Identifier: Apache-2.0
"""Eight processes, on a CPU or on as many GPUs as there are: right results, whatever the time they take. Of several
processes on a GPU each waits for its turn before it can wait for a peer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import a2a_process_cases, collective_cases, ht_process_cases
from support.a2a_data import PayloadShape
from support.ht_layer import RowsShape
from support.layer import Shape
from support.processes import Processes, devices, round_trip_in_process

SIZE = 8
LL = Shape(SIZE, 20, 3, 64, 16)
HT = (
    RowsShape(SIZE, 20, 3, 128, "token", max_tokens=12),
    RowsShape(SIZE, 20, 3, 128, "packed", "given", max_tokens=12),
)
A2A = (
    PayloadShape(SIZE, 20, 3, 64, "layer", "pulled", max_tokens=24),
    PayloadShape(SIZE, 20, 3, 64, "layer", "pushed", max_tokens=24),
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", params=devices())
def group(request: pytest.FixtureRequest, processes: Any) -> Processes:
    kept: Processes = processes(SIZE, request.param)
    return kept


def test_low_latency(group: Processes) -> None:
    assert group.call(round_trip_in_process, LL, 3) == ["ok"] * SIZE


@pytest.mark.parametrize("shape", HT, ids=str)
def test_high_throughput(group: Processes, shape: RowsShape) -> None:
    assert group.call(ht_process_cases.round_trips, shape, 3) == ["ok"] * SIZE


@pytest.mark.parametrize("shape", A2A, ids=str)
def test_one_sided(group: Processes, shape: PayloadShape) -> None:
    assert group.call(a2a_process_cases.round_trips, shape, 3) == ["ok"] * SIZE


def collective(rank: int, device: str, rounds: int) -> str:
    return collective_cases.compare_with_ipc(torch.distributed.group.WORLD, device, rounds)


def test_collective(group: Processes) -> None:
    if group.device == "cuda":
        pytest.skip("gloo exchanges no tensors of GPUs, and nccl wants one for each process")
    assert group.call(collective, 3) == ["ok"] * SIZE
