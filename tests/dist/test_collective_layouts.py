# SPDX-License-Identifier: Apache-2.0
"""Path collective of layouts `token`, `packed` and `expert` between processes: gloo on CPUs, nccl on GPUs of their own.
What path ipc and the reference give is what is right.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from support.collective_experts_cases import tokens_of
from support.collective_rows_cases import routings
from support.ht_layer import RowsShape, expert_outputs, inputs_of, make, row_weights, same, used_rows
from support.layer import Shape, random_routing
from support.layer import expert_outputs as outputs_by_expert
from support.processes import Processes, make_layer, round_trips

from moegen import errors

LAYOUTS = ("token", "packed")
BOTH = pytest.mark.parametrize("layout", LAYOUTS)
MODES = pytest.mark.parametrize("mode", ["capacity", "exact"])


def groups() -> list[object]:
    """(device, processes)"""
    gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs on this machine")
    others = [pytest.param(("cpu", size), marks=pytest.mark.slow) for size in (1, 2, 3, 5, 6, 7, 8)]
    return [("cpu", 4), *others, pytest.param(("cuda", 2), marks=gpus)]


@pytest.fixture(scope="module", params=groups(), ids=lambda param: f"{param[0]}-{param[1]}")
def group(request: pytest.FixtureRequest, processes: Any) -> Processes:
    kept: Processes = processes(request.param[1], request.param[0])
    return kept


_groups: dict[str, Any] = {}


def group_of(device: str) -> Any:
    """A group whose backend moves this device's tensors."""
    if device == "cpu":
        return torch.distributed.group.WORLD
    if "nccl" not in _groups:
        _groups["nccl"] = torch.distributed.new_group(backend="nccl")
    return _groups["nccl"]


def rows_shape(layout: str, mode: str) -> RowsShape:
    size = torch.distributed.get_world_size()
    return RowsShape(size, 13, 4, 512, layout, "bf16" if layout == "token" else "fp8", 40, mode, alignment=4)


def compare_rows(rank: int, device: str, layout: str, mode: str) -> str:
    """Every result of both paths, bit by bit: dispatch, dispatch by the handle, combine."""
    shape = rows_shape(layout, mode)
    paths = [make(group_of(device), shape, path=path, device=device) for path in ("ipc", "collective")]
    for routing in routings(shape):
        mine = inputs_of(shape, routing, rank, device, biases=1)
        found = []
        for layer in paths:
            received = layer.dispatch(mine.x, mine.ids, mine.weights)
            again = layer.dispatch(mine.x, handle=received.handle)
            sums = row_weights(received) if layout == "token" else None
            combined, summed = layer.combine(expert_outputs(received), received.handle, sums, bias=mine.biases)
            layer.synchronize()
            used = used_rows(received)
            kept = (received.tokens, received.scales, received.topk_idx, received.topk_weights, again.tokens)
            rows = [None if part is None else part[used] for part in kept]
            found.append(
                [used, *rows, received.counts, received.source_starts, received.source_counts, combined, summed]
            )
        for one, two in zip(*found, strict=True):
            assert (one is None) == (two is None)
            assert one is None or same(one, two)
    for layer in paths:
        layer.destroy()
    return "ok"


@MODES
@BOTH
def test_rows_equal_those_of_path_ipc(group: Processes, layout: str, mode: str) -> None:
    assert group.call(compare_rows, layout, mode) == ["ok"] * group.size


def compare_experts(rank: int, device: str) -> str:
    size = torch.distributed.get_world_size()
    shape = Shape(size, 13, 5, 256, 30)
    with make_layer(shape, device, group=group_of(device), path="collective", timeout=30.0) as layer:
        return round_trips(layer, shape, 6)


def test_experts_equal_the_reference(group: Processes) -> None:
    assert group.call(compare_experts) == ["ok"] * group.size


def interleave(rank: int, device: str, times: int) -> int:
    """A layer of experts within one of rows, of different routings; every result equals the first."""
    rows, shape = rows_shape("packed", "capacity"), Shape(torch.distributed.get_world_size(), 9, 3, 128, 24)
    outer = make(group_of(device), rows, path="collective", device=device)
    inner = make_layer(shape, device, group=group_of(device), path="collective")
    mine = inputs_of(rows, routings(rows)[1], rank, device)
    others = random_routing(shape, tokens_of(shape, 1), 1, kind="free")
    other = [part[rank].to(device) for part in (others.x, others.ids, others.weights)]
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    wanted: list[torch.Tensor] = []
    with outer, inner:
        for _ in range(times):
            first = outer.dispatch(mine.x, mine.ids, mine.weights)
            second = inner.dispatch(*other)
            y = expert_outputs(first)
            within = inner.combine(outputs_by_expert(second), second.handle)
            around = outer.combine(y, first.handle)[0]
            wanted = wanted or [within, around]
            wrong += (within != wanted[0]).sum() + (around != wanted[1]).sum()
        outer.synchronize()
        inner.synchronize()
    return int(wrong)


def test_two_layers_interleaved(group: Processes) -> None:
    assert group.call(interleave, 20) == [0] * group.size


@pytest.mark.slow
def test_two_layers_interleaved_1000(group: Processes) -> None:
    if group.size > 4:
        pytest.skip("gloo's threads of so many processes take minutes for it on few cores")
    assert group.call(interleave, 1000) == [0] * group.size


def replay(rank: int, device: str, layout: str) -> str:
    """A graph of dispatch and combine, replayed with other tokens and another routing."""
    shape = rows_shape(layout, "capacity")
    mine = inputs_of(shape, routings(shape)[-1], rank, device)  # full capacity
    with make(group_of(device), shape, path="collective", device=device) as layer:
        layer.warmup()
        x, ids, weights = (part.clone() for part in (mine.x, mine.ids, mine.weights))

        def call() -> torch.Tensor:
            received = layer.dispatch(x, ids, weights)
            y = torch.nan_to_num(received.tokens.float()).bfloat16()
            return layer.combine(y, received.handle)[0]

        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            combined = call()
        for _ in range(3):
            for part in (x, ids):
                part.copy_(part.roll(1, 0))
            graph.replay()
            found = combined.clone()
            assert same(found, call())
        layer.synchronize()
    return "ok"


@BOTH
def test_graph(group: Processes, layout: str) -> None:
    if group.device != "cuda":
        pytest.skip("a CPU has no graphs")
    assert group.call(replay, layout) == ["ok"] * group.size


def mix_up(rank: int, device: str, mode: str) -> str:
    """Rank 0 calls the other of two layers."""
    shape = rows_shape("token", mode)
    one, other = (make(group_of(device), shape, path="collective", device=device) for _ in range(2))
    mine = inputs_of(shape, routings(shape)[4], rank, device)
    layer = one if rank == 0 else other
    with one, other:
        try:
            received = layer.dispatch(mine.x, mine.ids, mine.weights)
            strangers = received.source_counts[1:] if rank == 0 else received.source_counts[:1]
            assert mode == "capacity"
            assert not strangers.any()  # their rows are left out
            layer.synchronize()
        except errors.WorldError as error:
            assert "belongs to another call" in str(error)  # noqa: PT017 - only one of the ranks may see it
            return "noticed"
    return "unnoticed"


@MODES
def test_calls_of_different_layers_are_noticed(group: Processes, mode: str) -> None:
    if group.size > 1:
        assert group.call(mix_up, mode) == ["noticed"] * group.size


def chosen(rank: int, device: str, peer_access: str) -> list[str]:
    os.environ["MOEGEN_PEER_ACCESS"] = peer_access
    try:
        shape = Shape(torch.distributed.get_world_size(), 9, 3, 128, 24)
        with (
            make(group_of(device), rows_shape("token", "capacity"), device=device) as rows,
            make_layer(shape, device, group=group_of(device)) as experts,
        ):
            return [rows.problem.path, experts.problem.path]
    finally:
        del os.environ["MOEGEN_PEER_ACCESS"]


def test_auto_takes_it_without_peer_access(group: Processes) -> None:
    assert group.call(chosen, "0") == [["collective"] * 2] * group.size
    assert group.call(chosen, "1") == [["ipc"] * 2] * group.size
