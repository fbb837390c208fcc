# SPDX-License-Identifier: Apache-2.0
"""Processes that are killed in a call: without a mask the others name them, with one they go on without them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping

import pytest
import torch
from support.layer import Routing, Shape, expert_outputs, random_routing
from support.processes import Processes, devices, make_layer, ranks_on

import moegen
from moegen import reference
from moegen.errors import PeerTimeoutError

ENOUGH_TO_SEND, ENOUGH_TO_DIE = 0.6, 1.2
"""Seconds: the victim makes its call and is killed in it; then the others make theirs."""


def gpus(needed: int) -> pytest.MarkDecorator:
    return pytest.mark.skipif(torch.cuda.device_count() < needed, reason=f"needs {needed} GPUs, a process has its own")


def kill_in(op: str, victims: Mapping[str, int], rank: int, layer: moegen.ExpertParallel) -> None:
    """Called before `op`: its victim makes the call and waits there for the others until it is killed."""
    if op not in victims:
        return
    layer.synchronize()
    if rank == victims[op]:
        threading.Timer(ENOUGH_TO_SEND, os.kill, (os.getpid(), signal.SIGKILL)).start()
    else:
        time.sleep(ENOUGH_TO_DIE)


def inputs_of(rank: int, device: str, routing: Routing) -> list[torch.Tensor]:
    return [part[rank].to(device) for part in (routing.x, routing.ids, routing.weights)]


def shape_of_group() -> Shape:
    return Shape(torch.distributed.get_world_size(), 16, 4, 128, 32)


# ---- without a mask ---------------------------------------------------------------------------------


def die_and_be_named(rank: int, device: str, victims: Mapping[str, int]) -> str:
    shape = shape_of_group()
    layer = make_layer(shape, device, timeout=2.0)
    routing = random_routing(shape, [32] * shape.ranks, 1)
    start = time.monotonic()
    try:
        for step in range(3):
            now = victims if step == 1 else {}
            kill_in("dispatch", now, rank, layer)
            received = layer.dispatch(*inputs_of(rank, device, routing))
            layer.synchronize()
            kill_in("combine", now, rank, layer)
            layer.combine(expert_outputs(received), received.handle)
            layer.synchronize()
    except PeerTimeoutError as error:
        layer.destroy()
        return f"missing {error.peer} after {time.monotonic() - start < 30}"
    return "nothing was noticed"


@pytest.mark.parametrize("op", ["dispatch", "combine"])
@pytest.mark.parametrize("device", devices(gpu_each=True))
def test_a_killed_rank_is_named_by_the_others(device: str, op: str) -> None:
    processes = Processes(ranks_on(device, on_cpu=3), device)
    answers = processes.call(die_and_be_named, {op: 1}, dead=[1])
    assert [answer for rank, answer in enumerate(answers) if rank != 1] == ["missing 1 after True"] * (len(answers) - 1)
    processes.stop()


# ---- with a mask ------------------------------------------------------------------------------------


def die_and_be_left_out(rank: int, device: str, victims: Mapping[str, int]) -> list[list[int]]:
    """The masks after rounds in which nobody, the first victim, nobody, the second one, nobody is killed."""
    layer = make_layer(shape_of_group(), device, timeout=1.0, active_ranks=True)
    seen = []
    plan: list[Mapping[str, int]] = [{}]
    for op, victim in victims.items():
        plan += [{op: victim}, {}]
    for seed, now in enumerate(plan):
        routing = random_routing(shape_of_group(), [32] * layer.num_ranks, seed, kind="free")
        kill_in("dispatch", now, rank, layer)
        received = layer.dispatch(*inputs_of(rank, device, routing))
        layer.synchronize()
        silent = masked_by(layer)
        kill_in("combine", now, rank, layer)
        combined = layer.combine(expert_outputs(received), received.handle, renormalize=True)
        layer.synchronize()
        verify(layer, routing, received, silent, combined)
        seen.append(layer.active_ranks.tolist())
    layer.destroy()
    return seen


def masked_by(layer: moegen.ExpertParallel) -> list[int]:
    return [peer for peer, active in enumerate(layer.active_ranks.tolist()) if not active]


def verify(
    layer: moegen.ExpertParallel,
    routing: Routing,
    received: moegen.Dispatched,
    silent: list[int],
    combined: torch.Tensor,
) -> None:
    """This rank's results, without what the ranks have not sent that were masked then."""
    shape, rank = shape_of_group(), layer.rank
    everything = reference.dispatch(routing.x, routing.ids, shape.experts, shape.max_tokens)
    missing: list[list[int]] = [[]] * shape.ranks
    missing[rank] = silent
    want = reference.dispatch(routing.x, routing.ids, shape.experts, shape.max_tokens, missing=missing)[rank]
    assert received.counts.tolist() == want.counts.tolist()
    for expert, count in enumerate(want.counts.tolist()):
        assert torch.equal(received.tokens[expert, :count].cpu(), want.tokens[expert, :count])
    outputs = [part.tokens * (torch.arange(len(part.tokens)) % 3 + 1)[:, None, None] for part in everything]
    missing[rank] = masked_by(layer)
    sums = reference.combine(
        outputs, everything, routing.ids, routing.weights, shape.experts, missing=missing, renormalize=True
    )[rank]
    assert ((combined.cpu().double() - sums.exact).abs() <= sums.bound).all()


@pytest.mark.parametrize(
    ("device", "victims"),
    [
        ("cpu", {"dispatch": 3, "combine": 2}),
        pytest.param("cuda", {"dispatch": 1}, marks=gpus(2)),
        pytest.param("cuda", {"combine": 1}, marks=gpus(2)),
        pytest.param("cuda", {"dispatch": 3, "combine": 2}, marks=gpus(4)),
    ],
)
def test_the_others_go_on_without_killed_ranks(device: str, victims: dict[str, int]) -> None:
    size = ranks_on(device)
    processes = Processes(size, device)
    answers = processes.call(die_and_be_left_out, victims, dead=victims.values())
    for rank in sorted(set(range(size)) - set(victims.values())):
        first, *_, last = answers[rank]
        assert first == [1] * size
        assert last == [int(peer not in victims.values()) for peer in range(size)]
    processes.stop()
