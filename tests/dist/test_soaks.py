# SPDX-License-Identifier: Apache-2.0
"""Many calls between processes, each of which is late now and then, and graphs replayed on GPUs of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import a2a_graph_cases, a2a_process_cases, ht_graph_cases, ht_process_cases, ll_graph_cases
from support.a2a_data import PayloadShape
from support.ht_layer import RowsShape
from support.layer import Shape
from support.ll_cases import delay
from support.processes import Processes, devices, make_layer, ranks_on, routing_of, verified_round_trip

from moegen.runtime.worlds import GroupWorld

LL = Shape(4, 16, 4, 128, 64)
HT = (
    RowsShape(4, 16, 4, 512, "token", "fp8_ue8m0", max_tokens=150, mode="exact"),
    RowsShape(4, 256, 8, 1024, "packed", "given", max_tokens=64, alignment=4),
)
A2A = (
    PayloadShape(4, 16, 10, 8, "fp8", "pulled", "fp16", "fp32"),
    PayloadShape(4, 16, 2, 512, "sixteen", "pushed", "bf16", max_tokens=150),
)
"""With kernels of the other tests of processes."""

GRAPHS = (["D"], ["DC"], ["DCD"], ["DC", "DCDC", "DCDCDC"])


@pytest.fixture(scope="module", params=devices(gpu_each=True))
def group(request: pytest.FixtureRequest, processes: Any) -> Processes:
    kept: Processes = processes(ranks_on(request.param), request.param)
    return kept


def pairs_of(group: Processes) -> int:
    return 1000 if group.device == "cuda" else 200


# ---- back to back -----------------------------------------------------------------------------------


def low_latency_pairs(rank: int, device: str, shape: Shape, pairs: int) -> int:
    """Numbers in which a sum differs from that of the call that was verified."""
    generator = torch.Generator().manual_seed(rank)
    with make_layer(shape, device) as layer:
        routings = [routing_of(shape, seed) for seed in range(4)]
        wanted = [verified_round_trip(layer, shape, routing, late=False) for routing in routings]
        inputs = [[part[rank].to(device) for part in (given.x, given.ids, given.weights)] for given in routings]
        y, sums = ([getattr(got, name).to(device) for got in wanted] for name in ("y", "combined"))
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        for step in range(pairs):
            delay(device, generator)
            received = layer.dispatch(*inputs[step % 4])
            wrong += (layer.combine(y[step % 4], received.handle) != sums[step % 4]).sum()
        layer.synchronize()
        return int(wrong)


@pytest.mark.slow
def test_low_latency(group: Processes) -> None:
    assert group.call(low_latency_pairs, replace(LL, ranks=group.size), pairs_of(group)) == [0] * group.size


@pytest.mark.slow
@pytest.mark.parametrize("shape", HT, ids=str)
def test_high_throughput(group: Processes, shape: RowsShape) -> None:
    shape = replace(shape, ranks=group.size)
    assert group.call(ht_process_cases.back_to_back, shape, pairs_of(group), True) == [0] * group.size


@pytest.mark.slow
@pytest.mark.parametrize("shape", A2A, ids=str)
def test_one_sided(group: Processes, shape: PayloadShape) -> None:
    shape = replace(shape, ranks=group.size)
    assert group.call(a2a_process_cases.back_to_back, shape, pairs_of(group), True) == [0] * group.size


# ---- graphs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpus(processes: Any) -> Processes:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two GPUs on this machine")
    kept: Processes = processes(torch.cuda.device_count(), "cuda")
    return kept


def on_a_stream(rank: int, device: str, replays: Callable[..., int], *args: Any) -> int:
    """Graphs cannot be captured on the default stream."""
    with torch.cuda.stream(torch.cuda.Stream()):
        return replays(GroupWorld(device=device), *args)


def low_latency_replays(world: GroupWorld, shape: Shape, graphs: list[str], times: int) -> int:
    with make_layer(shape, "cuda") as layer:
        return ll_graph_cases.replays(layer, shape, graphs, times)


@pytest.mark.parametrize("graphs", GRAPHS, ids="-".join)
def test_replays_of_low_latency_on_cuda(gpus: Processes, graphs: list[str]) -> None:
    shape = replace(LL, ranks=gpus.size)
    assert gpus.call(on_a_stream, low_latency_replays, shape, graphs, 1000 // len(graphs)) == [0] * gpus.size


@pytest.mark.parametrize("shape", ht_graph_cases.SHAPES, ids=str)
def test_replays_of_high_throughput_on_cuda(gpus: Processes, shape: RowsShape) -> None:
    assert gpus.call(on_a_stream, ht_graph_cases.replays, replace(shape, ranks=gpus.size)) == [0] * gpus.size


@pytest.mark.parametrize("shape", a2a_graph_cases.SHAPES[:2], ids=str)
def test_replays_of_one_sided_on_cuda(gpus: Processes, shape: PayloadShape) -> None:
    assert gpus.call(on_a_stream, a2a_graph_cases.replays, replace(shape, ranks=gpus.size)) == [0] * gpus.size
