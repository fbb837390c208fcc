# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: capture once, replay with other tokens, other routing, and other graphs on other ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.layer import Layer, Shape, expert_outputs, random_routing

import moegen

SHAPE = Shape(2, 8, 3, 256, 32)
REPLAYS = 1000


class Replayed:
    """One rank's static inputs, its graph and what it must give: `ops` pairs in one graph."""

    def __init__(self, layer: moegen.ExpertParallel, pairs: int) -> None:
        self.layer = layer
        device = layer.device
        self.x = torch.zeros(SHAPE.max_tokens, SHAPE.hidden, dtype=torch.bfloat16, device=device)
        self.ids = torch.zeros(SHAPE.max_tokens, SHAPE.topk, dtype=torch.int64, device=device)
        self.weights = torch.zeros(SHAPE.max_tokens, SHAPE.topk, device=device)
        self.count = torch.zeros(1, dtype=torch.int32, device=device)
        self.outs: list[torch.Tensor] = []
        self.graph = torch.cuda.CUDAGraph()
        layer.synchronize()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            for _ in range(pairs):
                self.outs.append(self.pair())

    def pair(self) -> torch.Tensor:
        received = self.layer.dispatch(self.x, self.ids, self.weights, num_tokens=self.count)
        return self.layer.combine(expert_outputs(received), received.handle)

    def load(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.count.fill_(len(x))
        for static, value in ((self.x, x), (self.ids, ids), (self.weights, weights)):
            static[: len(value)].copy_(value, non_blocking=True)


def replay(pairs_of_rank: Callable[[int], list[int]]) -> None:
    """`pairs_of_rank(rank)`: pairs in each graph that the rank replays, one after another, REPLAYS pairs in all."""
    layer = Layer(SHAPE, "cuda")
    routings = [
        random_routing(SHAPE, (step * 5 % 33, (31 * step + 7) % 33), step, kind=["uniform", "free"][step % 2])
        for step in range(6)
    ]
    golden = [layer.round_trip(routing) for routing in routings]
    for routing, results in zip(routings, golden, strict=True):
        layer.verify(routing, results)

    def work(world: moegen.runtime.worlds.RankWorld) -> int:
        r = world.rank
        sizes = pairs_of_rank(r)
        graphs = {size: None for size in sizes}
        for size in graphs:
            graphs[size] = Replayed(layer.ranks[r], size)  # type: ignore[assignment]
            world.barrier()
        wrong = torch.zeros((), dtype=torch.int64, device=world.device)
        inputs = [[part[r].to(world.device) for part in (s.x, s.ids, s.weights)] for s in routings]
        wanted = [results[r].combined.to(world.device) for results in golden]
        done = step = 0
        while done < REPLAYS:
            graph: Replayed = graphs[sizes[step % len(sizes)]]  # type: ignore[assignment]
            # All pairs of one epoch range must see the same routing on every rank, however they are cut into graphs.
            chosen = done // 6 % len(routings)
            graph.load(*inputs[chosen])
            graph.graph.replay()
            for out in graph.outs:
                wrong += (out[: len(wanted[chosen])] != wanted[chosen]).sum()
            done += len(graph.outs)
            step += 1
        layer.ranks[r].synchronize()
        return int(wrong)

    assert layer.world.run(work) == [0, 0]
    layer.destroy()


@pytest.mark.parametrize("pairs", [1, 2, 3])
def test_graph_of_pairs(pairs: int) -> None:
    replay(lambda rank: [pairs])


def test_ranks_replay_different_graphs() -> None:
    replay(lambda rank: [[1, 2, 3], [3, 2, 1]][rank])


def test_single_ops_as_graphs() -> None:
    """Dispatch and combine captured apart, replayed 1,000 times in turn."""
    layer = Layer(SHAPE, "cuda")
    routing = random_routing(SHAPE, (32, 9), 3)
    wanted = layer.round_trip(routing)

    def work(world: moegen.runtime.worlds.RankWorld) -> int:
        r, rank = world.rank, layer.ranks[world.rank]
        inputs = [part[r].to(world.device) for part in (routing.x, routing.ids, routing.weights)]
        rank.synchronize()
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        with torch.cuda.graph(first, stream=stream, capture_error_mode="thread_local"):
            received = rank.dispatch(*inputs)
        y = torch.empty_like(received.tokens)
        with torch.cuda.graph(second, stream=stream, capture_error_mode="thread_local"):
            y.copy_(expert_outputs(received))
            combined = rank.combine(y, received.handle)
        wrong = torch.zeros((), dtype=torch.int64, device=world.device)
        for _ in range(REPLAYS):
            first.replay()
            second.replay()
            wrong += (combined != wanted[r].combined.to(world.device)).sum()
        rank.synchronize()
        return int(wrong)

    assert layer.world.run(work) == [0, 0]
    layer.destroy()


def test_load_during_capture_says_warmup() -> None:
    from moegen.errors import MissingKernelError
    from moegen.kernels.spec import Spec
    from moegen.runtime.kernel import load

    spec = Spec.parse("ll_dispatch_bf16_expert_r1_h64_k1_e1_ipc_w1x1_inline")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(MissingKernelError, match="warmup"), torch.cuda.graph(graph):
        load(spec, torch.device("cuda", 0))
