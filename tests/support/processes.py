# SPDX-License-Identifier: Apache-2.0
"""A few processes in one gloo group, kept alive between tests."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

import moegen
from moegen import reference
from support.forked import context, take_environment
from support.layer import RankResult, Routing, Shape, expert_outputs, random_routing

ANSWER_SECONDS = 240

CPU_RANKS = 4


def devices(*, gpu_each: bool = False) -> list[Any]:
    """The CPU, and GPUs where a test can have them; `gpu_each`: two at least, no rank shares one."""
    if gpu_each:
        needed = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs on this machine")
    else:
        needed = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
    return ["cpu", pytest.param("cuda", marks=needed)]


def ranks_on(device: str, on_cpu: int = CPU_RANKS) -> int:
    """One for each GPU of this machine; two at least, which then share the only one."""
    return on_cpu if device == "cpu" else max(2, torch.cuda.device_count())


class Processes:
    """`size` processes; rank r uses the CPU, or GPU r modulo the number of GPUs."""

    def __init__(self, size: int, device: str) -> None:
        self.size = size
        self.device = device
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._ends: list[Connection] = []
        self._processes = []
        self.lost = False
        """Whether one of them has died, or has not answered."""
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, device, port, dict(os.environ)), daemon=True
            )
            process.start()
            self._ends.append(ours)
            self._processes.append(process)

    def call(self, fn: Callable[..., Any], *args: Any, dead: Collection[int] = ()) -> list[Any]:
        """`fn(rank, device, *args)` in every process; raises the first error. Ranks that are `dead` will not answer."""
        self.lost |= bool(dead)
        for end in self._ends:
            end.send((fn, args))
        answers: list[Any] = []
        for rank, end in enumerate(self._ends):
            if rank in dead:
                answers.append(None)
                continue
            if not end.poll(ANSWER_SECONDS):
                self.lost = True
                raise TimeoutError(f"rank {rank} did not answer within {ANSWER_SECONDS} s")
            try:
                ok, value = end.recv()
            except EOFError:
                self.lost = True
                raise
            if not ok:
                raise RuntimeError(f"rank {rank}:\n{value}")
            answers.append(value)
        return answers

    @property
    def take_turns(self) -> bool:
        """Several of them share a GPU, on which each wait for one another costs milliseconds."""
        return self.device == "cuda" and torch.cuda.device_count() < self.size

    def stop(self) -> None:
        for end in self._ends:
            with contextlib.suppress(BrokenPipeError):
                end.send(None)
        for process in self._processes:
            process.join(0 if self.lost else 20)  # a group waits for members that are dead
            if process.is_alive():
                process.kill()


def _serve(pipe: Connection, rank: int, size: int, device: str, port: int, environment: dict[str, str]) -> None:
    take_environment(environment)
    torch.set_num_threads(1)
    if device == "cuda":
        if torch.cuda.device_count() < size:
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        torch.cuda.set_device(rank % torch.cuda.device_count())
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    while (task := pipe.recv()) is not None:
        fn, args = task
        try:
            pipe.send((True, fn(rank, device, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    torch.distributed.destroy_process_group()


def make_layer(shape: Shape, device: str, *, group: Any = None, **options: Any) -> moegen.ExpertParallel:
    return moegen.ExpertParallel(
        torch.distributed.group.WORLD if group is None else group,
        num_experts=shape.experts,
        num_topk=shape.topk,
        hidden=shape.hidden,
        max_tokens_per_rank=shape.max_tokens,
        device=device,
        **{"timeout": 30.0, **options},
    )


def round_trip_in_process(rank: int, device: str, shape: Shape, rounds: int) -> str:
    with make_layer(shape, device) as layer:
        return round_trips(layer, shape, rounds)


def round_trips(layer: moegen.ExpertParallel, shape: Shape, rounds: int) -> str:
    """Random round trips, each compared with the reference by the rank that owns the tokens."""
    for seed in range(rounds):
        verified_round_trip(layer, shape, routing_of(shape, seed), late=seed % 2 == 1)
    return "ok"


def routing_of(shape: Shape, seed: int) -> Routing:
    """Ranks with no tokens among them."""
    tokens = [(7 * r + 13 * seed) % (shape.max_tokens // 2) for r in range(shape.ranks)]
    return random_routing(shape, tokens, seed, kind=("uniform", "free", "one")[seed % 3])


def verified_round_trip(layer: moegen.ExpertParallel, shape: Shape, routing: Routing, *, late: bool) -> RankResult:
    """What this rank got, on the CPU, compared with the reference. Collective."""
    inputs = [part[layer.rank].to(layer.device) for part in (routing.x, routing.ids, routing.weights)]
    received = layer.dispatch(inputs[0], inputs[1], None if late else inputs[2])
    y = expert_outputs(received)
    combined = layer.combine(y, received.handle, inputs[2] if late else None)
    layer.synchronize()
    mine = RankResult(*(t.cpu() for t in (received.tokens, received.counts, received.ranges, y, combined)))
    _verify_rank(layer.rank, shape, routing, mine, layer.world.exchange(mine.y))
    return mine


def _verify_rank(rank: int, shape: Shape, routing: Any, mine: RankResult, outputs: list[torch.Tensor]) -> None:
    expected = reference.dispatch(routing.x, routing.ids, shape.experts, shape.max_tokens)
    want = expected[rank]
    assert torch.equal(mine.counts, want.counts)
    assert torch.equal(mine.ranges, want.ranges)
    for expert, count in enumerate(want.counts.tolist()):
        assert torch.equal(mine.tokens[expert, :count], want.tokens[expert, :count])
    sums = reference.combine(outputs, expected, routing.ids, routing.weights, shape.experts)[rank]
    assert ((mine.combined.double() - sums.exact).abs() <= sums.bound).all()
