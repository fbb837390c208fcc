# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes: gloo groups on the CPU, and on all GPUs of the machine (two ranks share a single one).

The processes are spawned once per device and number of ranks; each test sends them one function to run.
"""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from support.layer import Shape
from support.processes import Processes, devices, make_layer, ranks_on, round_trip_in_process

SHAPES = (Shape(4, 16, 4, 128, 64), Shape(4, 10, 3, 512, 80))


@pytest.fixture(scope="module", params=devices())
def group(request: pytest.FixtureRequest, processes: Any) -> Processes:
    kept: Processes = processes(ranks_on(request.param), request.param)
    return kept


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trips_equal_reference(group: Processes, shape: Shape) -> None:
    shape = Shape(group.size, shape.experts, shape.topk, shape.hidden, shape.max_tokens)
    assert group.call(round_trip_in_process, shape, 3) == ["ok"] * group.size


def test_no_shared_memory_is_left_behind(group: Processes) -> None:
    left = [name for name in os.listdir("/dev/shm") if name.startswith("moegen-")]
    assert left == []


def seconds_per_pair(rank: int, device: str, pairs: int) -> float:
    shape = Shape(torch.distributed.get_world_size(), 16, 4, 128, 32)
    with make_layer(shape, device) as layer:
        x = torch.randn(32, shape.hidden, device=device).bfloat16()
        ids = torch.randint(0, 16, (32, 4), device=device)
        start = time.perf_counter()
        for _ in range(pairs):
            received = layer.dispatch(x, ids)
            layer.combine(received.tokens, received.handle)
        layer.synchronize()
        return (time.perf_counter() - start) / pairs


def test_back_to_back_between_processes(group: Processes) -> None:
    seconds = group.call(seconds_per_pair, 10 if group.take_turns else 100)
    print(f"\n{group.size} processes on {group.device}: {1e3 * max(seconds):.1f} ms per pair")


def halves_and_streams(rank: int, device: str) -> str:
    """Hooks of two micro-batches, and calls on the object's own stream, give what plain calls give."""
    shape = Shape(torch.distributed.get_world_size(), 16, 4, 128, 32)
    with make_layer(shape, device, slots=2) as layer:
        x = torch.randn(32, shape.hidden, device=device).bfloat16()
        ids = torch.randint(0, 16, (32, 4), device=device)
        plain = layer.dispatch(x, ids)
        wanted = layer.combine(plain.tokens, plain.handle)
        for _ in range(20):
            one, receive_one = layer.dispatch(x, ids, return_recv_hook=True)
            two, receive_two = layer.dispatch(x, ids, return_recv_hook=True)
            receive_one()
            receive_two()
            for received in (one, two):
                assert torch.equal(received.counts, plain.counts)
            late, event = layer.dispatch(x, ids, async_finish=True)
            event.wait()
            combined, event = layer.combine(late.tokens, late.handle, async_finish=True)
            event.wait()
            assert torch.equal(combined, wanted)
            combined, receive = layer.combine(two.tokens, two.handle, return_recv_hook=True)
            receive()
            assert torch.allclose(combined.float(), wanted.float(), rtol=2**-6, atol=2**-6)
        layer.synchronize()
    return "ok"


def test_hooks_and_streams_between_processes(group: Processes) -> None:
    assert group.call(halves_and_streams) == ["ok"] * group.size
