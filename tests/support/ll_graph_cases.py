# SPDX-License-Identifier: Apache-2.0
"""`ExpertParallel` in CUDA graphs: captured once, replayed with other tokens and routings."""

from __future__ import annotations

import torch

import moegen
from support.capturing import captured
from support.layer import RankResult, Shape, expert_outputs
from support.processes import routing_of, verified_round_trip


class Replayed:
    """One rank's static inputs and a graph of `ops`: D dispatches, C combines what was dispatched last."""

    def __init__(self, layer: moegen.ExpertParallel, shape: Shape, ops: str) -> None:
        self.layer = layer
        self.x = torch.zeros(shape.max_tokens, shape.hidden, dtype=torch.bfloat16, device=layer.device)
        self.ids = torch.zeros(shape.max_tokens, shape.topk, dtype=torch.int64, device=layer.device)
        self.weights = torch.zeros(shape.max_tokens, shape.topk, device=layer.device)
        self.count = torch.zeros(1, dtype=torch.int32, device=layer.device)
        self.counts: list[torch.Tensor] = []
        self.combined: list[torch.Tensor] = []
        self.graph = torch.cuda.CUDAGraph()
        with captured(self.graph):
            for op in ops:
                self._record(op)

    def _record(self, op: str) -> None:
        if op == "D":
            self.received = self.layer.dispatch(self.x, self.ids, self.weights, num_tokens=self.count)
            self.counts.append(self.received.counts)
        else:
            self.combined.append(self.layer.combine(expert_outputs(self.received), self.received.handle))

    def replay(self, inputs: list[torch.Tensor], want: RankResult) -> torch.Tensor:
        """Replays with these tokens; how many numbers differ from what is wanted."""
        self.count.fill_(len(inputs[0]))
        for static, value in zip((self.x, self.ids, self.weights), inputs, strict=True):
            static[: len(value)].copy_(value)
        self.graph.replay()
        wrong = torch.zeros((), dtype=torch.int64, device=self.count.device)
        for counts in self.counts:
            wrong += (counts != want.counts).sum()
        for combined in self.combined:
            wrong += (combined[: len(inputs[0])] != want.combined).sum()
        return wrong


def replays(layer: moegen.ExpertParallel, shape: Shape, graphs: list[str], times: int) -> int:
    """Numbers in which replays of `graphs` in turn differ from calls that the reference has verified. Collective."""
    rank, device = layer.rank, layer.device
    routings = [routing_of(shape, seed) for seed in range(6)]
    results = [verified_round_trip(layer, shape, routing, late=False) for routing in routings]
    wanted = [RankResult(*(part.to(device) for part in vars(result).values())) for result in results]
    inputs = [[part[rank].to(device) for part in (given.x, given.ids, given.weights)] for given in routings]
    layer.world.barrier()
    captured = [Replayed(layer, shape, ops) for ops in graphs]
    torch.cuda.synchronize()
    layer.world.barrier()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for turn in range(times):
        for graph in captured:
            wrong += graph.replay(inputs[turn % len(inputs)], wanted[turn % len(inputs)])
    layer.synchronize()
    return int(wrong)
