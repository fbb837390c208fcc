# SPDX-License-Identifier: Apache-2.0
"""Path collective between processes: gloo on CPUs, nccl on GPUs of their own. What path ipc gives is what is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.collective_cases import compare_with_ipc, inputs, make, outputs, slow_link
from support.processes import Processes, devices, ranks_on

from moegen import errors


@pytest.fixture(scope="module", params=devices(gpu_each=True))
def group(request: pytest.FixtureRequest, processes: Any) -> Processes:
    kept: Processes = processes(ranks_on(request.param), request.param)
    return kept


_groups: dict[str, Any] = {}


def group_of(device: str) -> Any:
    """A group whose backend moves this device's tensors."""
    if device == "cpu":
        return torch.distributed.group.WORLD
    if "nccl" not in _groups:
        _groups["nccl"] = torch.distributed.new_group(backend="nccl")
    return _groups["nccl"]


def compare(rank: int, device: str, rounds: int, exchange: str) -> str:
    return compare_with_ipc(group_of(device), device, rounds, exchange)


@pytest.mark.parametrize("exchange", ["padded", "exact"])
def test_equals_path_ipc(group: Processes, exchange: str) -> None:
    assert group.call(compare, 9, exchange) == ["ok"] * group.size


def interleave(rank: int, device: str, times: int, exchanges: tuple[str, str]) -> int:
    """Two layers, one inside the other; every result equals the layer's first."""
    size = torch.distributed.get_world_size()
    group, (first_exchange, other_exchange) = group_of(device), exchanges
    with (
        make(group, device, "collective", exchange=first_exchange) as outer,
        make(group, device, "collective", exchange=other_exchange) as inner,
    ):
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        wanted: list[torch.Tensor | None] = [None, None]
        for _ in range(times):
            ids, payloads = inputs(rank, size, 1, device)
            other_ids, other = inputs(rank, size, 2, device)
            first = outer.dispatch(ids, payloads)
            y = outputs(first, rank)
            second = inner.dispatch(other_ids, other)
            within = inner.combine(outputs(second, rank), second.handle)
            around = outer.combine(y, first.handle)
            for place, found in enumerate((within, around)):
                before = wanted[place]
                wanted[place] = found if before is None else before
                wrong += 0 if before is None else (found != before).sum()
        outer.synchronize()
        return int(wrong)


@pytest.mark.parametrize("exchanges", [("padded", "padded"), ("exact", "padded"), ("exact", "exact")])
def test_two_layers_interleaved(group: Processes, exchanges: tuple[str, str]) -> None:
    assert group.call(interleave, 20, exchanges) == [0] * group.size


@pytest.mark.slow
def test_two_layers_interleaved_1000(group: Processes) -> None:
    assert group.call(interleave, 1000, ("exact", "padded")) == [0] * group.size


def mix_up(rank: int, device: str, exchange: str) -> str:
    """Rank 0 calls the other of two layers."""
    size, group = torch.distributed.get_world_size(), group_of(device)
    with (
        make(group, device, "collective", exchange=exchange) as one,
        make(group, device, "collective", exchange=exchange) as other,
    ):
        ids, payloads = inputs(rank, size, 1, device)
        for layer in (one, other):
            layer.dispatch(ids, payloads)  # loads its kernel, on all ranks
        layer = one if rank == 0 else other
        received = layer.dispatch(ids, payloads)
        try:
            layer.synchronize()
        except errors.WorldError as error:
            assert "belongs to another call" in str(error)  # noqa: PT017 - only one of the ranks may see it
            strangers = received.counts[1:] if rank == 0 else received.counts[:1]
            assert not strangers.any()  # their rows are left out
            return "noticed"
    return "unnoticed"


@pytest.mark.parametrize("exchange", ["padded", "exact"])
def test_calls_of_different_layers_are_noticed(group: Processes, exchange: str) -> None:
    assert group.call(mix_up, exchange) == ["noticed"] * group.size


def capture(rank: int, device: str, exchange: str) -> str:
    """One graph of a dispatch and its combine; an object that would take exact calls makes padded ones in it."""
    size, group = torch.distributed.get_world_size(), group_of(device)
    with slow_link(), make(group, device, "collective", exchange=exchange) as layer:
        ids, payloads = inputs(rank, size, 1, device)
        eager = layer.dispatch(ids, payloads)
        assert (eager.handle.exchanged is None) == (exchange == "padded")
        wanted = layer.combine(outputs(eager, rank), eager.handle)
        y = outputs(eager, rank).clone()
        layer.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                received = layer.dispatch(ids, payloads)
                combined = layer.combine(y, received.handle)
        except errors.InputError as error:
            return str(error)
        for _ in range(3):
            combined.zero_()
            graph.replay()
            layer.synchronize()
            assert torch.equal(combined, wanted)
        assert received.handle.exchanged is None
        return "ok"


def test_graphs_hold_padded_calls(group: Processes) -> None:
    if group.device == "cpu":
        pytest.skip("graphs are a GPU's")
    assert group.call(capture, "auto") == ["ok"] * group.size
    assert group.call(capture, "padded") == ["ok"] * group.size
    assert all("cannot be captured" in answer for answer in group.call(capture, "exact"))


def chosen(rank: int, device: str, monkeypatched: bool) -> str:
    import os

    os.environ["MOEGEN_PEER_ACCESS"] = "0" if monkeypatched else "1"
    try:
        with make(group_of(device), device, "auto") as layer:
            return layer.problem.path
    finally:
        del os.environ["MOEGEN_PEER_ACCESS"]


def test_auto_takes_it_without_peer_access(group: Processes) -> None:
    assert group.call(chosen, True) == ["collective"] * group.size
    assert group.call(chosen, False) == ["ipc"] * group.size
