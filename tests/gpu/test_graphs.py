# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs: capture once, replay with other tokens, other routing, and other graphs on other ranks."""

from __future__ import annotations

import pytest
import torch
from support.layer import Layer, RankResult, Shape, random_routing
from support.ll_graph_cases import Replayed

import moegen
from moegen import reference

SHAPE = Shape(2, 8, 3, 256, 32)
REPLAYS = 1000


def replay_on_both_ranks(graphs_of_rank: list[list[str]], ops_per_round: int) -> None:
    """Every rank replays its list of graphs in turn, REPLAYS of them; a round of `ops_per_round` has one routing."""
    layer = Layer(SHAPE, "cuda")
    kinds = ("uniform", "free", "one")
    routings = [
        random_routing(SHAPE, (step * 5 % 33, (31 * step + 7) % 33), step, kind=kinds[step % 3]) for step in range(6)
    ]
    golden = [layer.round_trip(routing) for routing in routings]
    for routing, results in zip(routings, golden, strict=True):
        layer.verify(routing, results)

    def work(world: moegen.runtime.worlds.RankWorld) -> int:
        r = world.rank
        names = graphs_of_rank[r]
        graphs: dict[str, Replayed] = {}
        for turn in range(world.size):
            if turn == r:
                layer.ranks[r].synchronize()
                graphs.update({name: Replayed(layer.ranks[r], SHAPE, name) for name in names})
                torch.cuda.synchronize()
            world.barrier()
        inputs = [[part[r].to(world.device) for part in (s.x, s.ids, s.weights)] for s in routings]
        wanted = [RankResult(*(part.to(world.device) for part in vars(results[r]).values())) for results in golden]
        wrong = torch.zeros((), dtype=torch.int64, device=world.device)
        ops = 0
        for step in range(REPLAYS // len(names) * len(names)):
            name = names[step % len(names)]
            chosen = ops // ops_per_round % len(routings)
            wrong += graphs[name].replay(inputs[chosen], wanted[chosen])
            ops += len(name)
        layer.ranks[r].synchronize()
        return int(wrong)

    assert layer.world.run(work) == [0, 0]
    layer.destroy()


@pytest.mark.parametrize("ops", ["D", "DC", "DCD"])
def test_graph_of_1_2_3_ops(ops: str) -> None:
    replay_on_both_ranks([[ops], [ops]], len(ops))


def test_ranks_replay_different_graphs() -> None:
    replay_on_both_ranks([["DC", "DCDC", "DCDCDC"], ["DCDCDC", "DCDC", "DC"]], 12)


def test_mask_in_a_graph() -> None:
    """A rank that stops replaying is marked by the others' graphs, and left out."""
    layer = Layer(SHAPE, "cuda", active_ranks=True, timeout=1.0)
    routing = random_routing(SHAPE, (20, 31), 1)
    golden = layer.round_trip(routing)
    alone = reference.dispatch(routing.x, routing.ids, SHAPE.experts, SHAPE.max_tokens, missing=[[1], [0]])[0]

    def work(world: moegen.runtime.worlds.RankWorld) -> int:
        r = world.rank
        rank = layer.ranks[r]
        inputs = [part[r].to(world.device) for part in (routing.x, routing.ids, routing.weights)]
        want = RankResult(*(part.to(world.device) for part in vars(golden[r]).values()))
        for turn in range(world.size):
            if turn == r:
                rank.synchronize()
                graph = Replayed(rank, SHAPE, "DC")
                torch.cuda.synchronize()
            world.barrier()
        wrong = torch.zeros((), dtype=torch.int64, device=world.device)
        for _ in range(10):
            wrong += graph.replay(inputs, want)
        rank.synchronize()
        world.barrier()
        if r == 0:
            for _ in range(3):
                graph.replay(inputs, want)
                rank.synchronize()
                assert rank.active_ranks.tolist() == [1, 0]
                assert graph.counts[0].tolist() == alone.counts.tolist()
        world.barrier()
        return int(wrong)

    assert layer.world.run(work) == [0, 0]
    layer.destroy()


def test_load_during_capture_says_warmup() -> None:
    from moegen.errors import MissingKernelError
    from moegen.kernels.spec import Spec
    from moegen.runtime.kernel import load

    spec = Spec.parse("ll_dispatch_bf16_expert_r1_h64_k1_e1_ipc_w1x1_inline_whole")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(MissingKernelError, match="warmup"), torch.cuda.graph(graph):
        load(spec, torch.device("cuda", 0))
