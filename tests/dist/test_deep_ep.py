# SPDX-License-Identifier: Apache-2.0
"""DeepEP's calls between processes: gloo groups on the CPU, and on all GPUs of the machine, each its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import deep_ep_elastic_cases as elastic
from support import deep_ep_normal_cases as normal
from support.deep_ep_cases import FP8, Case
from support.deep_ep_table import every_mode, table
from support.processes import Processes, devices, ranks_on

from moegen.compat import deep_ep
from moegen.runtime.worlds import GroupWorld


@pytest.fixture(scope="module", params=devices(gpu_each=True))
def group(request: pytest.FixtureRequest, processes: Any) -> Processes:
    kept: Processes = processes(ranks_on(request.param, on_cpu=2), request.param)
    return kept


def in_process(rank: int, device: str, case: Case) -> str:
    every_mode(GroupWorld(device=device), case)
    return "ok"


def test_every_mode_of_one_shape(group: Processes) -> None:
    assert group.call(in_process, Case(group.size, 16, 4, 512, FP8)) == ["ok"] * group.size


def on_all_ranks(case: normal.Case) -> normal.Case:
    """With as many experts on each."""
    ranks = torch.distributed.get_world_size()
    return replace(case, ranks=ranks, experts=case.experts // case.ranks * ranks)


def normal_in_process(rank: int, device: str, asynchronous: bool) -> str:
    deep_ep.Buffer.set_num_sms(normal.NUM_SMS)
    normal.round_trip(normal.Rank(GroupWorld(device=device), on_all_ranks(normal.CASES[1])), asynchronous=asynchronous)
    return "ok"


def growing_in_process(rank: int, device: str) -> str:
    """Only one rank has more tokens than before; all make room."""
    buffer, ranks = deep_ep.Buffer(torch.distributed.group.WORLD), torch.distributed.get_world_size()
    for tokens in (5, 150, 300):
        mine = tokens if rank == 1 else 1
        x = torch.full((mine, 512), rank + 1.0, dtype=torch.bfloat16, device=device)
        ids = torch.zeros(mine, 4, dtype=torch.int64, device=device)
        layout = buffer.get_dispatch_layout(ids, 4 * ranks)
        weights = torch.ones(mine, 4, device=device)
        rows, *_, handle, _ = buffer.dispatch(x, None, layout[0], None, layout[3], layout[2], ids, weights)
        everything = [1.0] + [2.0] * tokens + [source + 1.0 for source in range(2, ranks)]
        assert rows[:, 0].tolist() == (everything if rank == 0 else [])  # type: ignore[call-overload]
        combined, _, _ = buffer.combine(rows, handle)  # type: ignore[arg-type]
        assert torch.equal(combined, x)
    torch.distributed.barrier()
    buffer.destroy()
    return "ok"


def elastic_in_process(rank: int, device: str, expand: bool, sync: bool) -> str:
    elastic.round_trip(elastic.Rank(GroupWorld(device=device), on_all_ranks(elastic.TWO)), expand, sync, alignment=8)
    return "ok"


@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
def test_normal_mode(group: Processes, asynchronous: bool) -> None:
    assert group.call(normal_in_process, asynchronous) == ["ok"] * group.size


def test_normal_mode_grows(group: Processes) -> None:
    assert group.call(growing_in_process) == ["ok"] * group.size


@pytest.mark.parametrize("sync", [False, True], ids=["capacity", "exact"])
@pytest.mark.parametrize("expand", [False, True], ids=["token", "expand"])
def test_elastic(group: Processes, expand: bool, sync: bool) -> None:
    assert group.call(elastic_in_process, expand, sync) == ["ok"] * group.size


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", [case for case in table() if case.ranks == 2], ids=str)
def test_every_mode(group: Processes, case: Case) -> None:
    assert group.call(in_process, replace(case, ranks=group.size)) == ["ok"] * group.size
