# SPDX-License-Identifier: Apache-2.0
"""A MoE layer's communication on virtual ranks, and routed tokens to send through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import moegen
from moegen import reference


@dataclass(frozen=True)
class Shape:
    """What kernels are compiled for; `max_tokens` decides the wire format."""

    ranks: int
    experts: int
    topk: int
    hidden: int
    max_tokens: int

    def __str__(self) -> str:
        return f"r{self.ranks}-e{self.experts}-k{self.topk}-h{self.hidden}-m{self.max_tokens}"


@dataclass
class Routing:
    """Per rank: tokens, ids, weights; all on the CPU."""

    x: list[torch.Tensor]
    ids: list[torch.Tensor]
    weights: list[torch.Tensor]


def random_routing(shape: Shape, tokens: Sequence[int], seed: int, *, kind: str = "uniform") -> Routing:
    """Routing of `kind`: "uniform" (distinct experts), "free" (-1 and repeats), "none" (all -1), "one" (one expert)."""
    generator = torch.Generator().manual_seed(seed)
    routing = Routing([], [], [])
    for count in tokens:
        routing.x.append(torch.randn(count, shape.hidden, generator=generator).bfloat16())
        routing.weights.append(torch.rand(count, shape.topk, generator=generator))
        if kind == "uniform":
            scores = torch.rand(count, shape.experts, generator=generator)
            ids = scores.topk(shape.topk, dim=1).indices
        elif kind == "free":
            ids = torch.randint(-1, shape.experts, (count, shape.topk), generator=generator)
        elif kind == "none":
            ids = torch.full((count, shape.topk), -1)
        else:
            ids = torch.full((count, shape.topk), seed % shape.experts)
        routing.ids.append(ids)
    return routing


def expert_outputs(received: moegen.Dispatched) -> torch.Tensor:
    """What stands in for experts: each multiplies by its own small factor, exactly; padding rows become NaN."""
    experts, rows, _ = received.tokens.shape
    factors = torch.arange(experts, device=received.tokens.device) % 3 + 1
    beyond = torch.arange(rows, device=received.tokens.device)[None, :] >= received.counts[:, None]
    y = received.tokens * factors[:, None, None].to(received.tokens.dtype)
    return y.masked_fill_(beyond[:, :, None], float("nan"))


class Layer:
    """`ExpertParallel` objects on all ranks of a LocalWorld, kept between calls."""

    def __init__(self, shape: Shape, device: str, **options: object) -> None:
        self.shape = shape
        self.device = device
        self.world = moegen.LocalWorld(shape.ranks, device)
        settings = {"timeout": 30.0, **options}
        self.ranks = self.world.run(
            lambda rank: moegen.ExpertParallel(
                rank,
                num_experts=shape.experts,
                num_topk=shape.topk,
                hidden=shape.hidden,
                max_tokens_per_rank=shape.max_tokens,
                **settings,  # type: ignore[arg-type]
            )
        )

    def destroy(self) -> None:
        for rank in self.ranks:
            rank.destroy()

    def round_trip(
        self, routing: Routing, *, late: bool = False, narrow_ids: bool = False, in_step: bool = False
    ) -> list[RankResult]:
        """One dispatch and combine on every rank; weights given to combine if `late`, else to dispatch.

        `in_step`: no rank goes on before all are done, so that torch may load kernels in between.
        """

        def work(world: moegen.runtime.worlds.RankWorld) -> RankResult:
            layer = self.ranks[world.rank]

            def step() -> None:
                if in_step:
                    layer.synchronize()
                    world.barrier()

            x = routing.x[world.rank].to(self.device)
            ids = routing.ids[world.rank].to(self.device, torch.int32 if narrow_ids else torch.int64)
            weights = routing.weights[world.rank].to(self.device)
            step()
            received = layer.dispatch(x, ids, None if late else weights)
            step()
            y = expert_outputs(received)
            step()
            combined = layer.combine(y, received.handle, weights if late else None)
            layer.synchronize()
            return RankResult(
                received.tokens.cpu(), received.counts.cpu(), received.ranges.cpu(), y.cpu(), combined.cpu()
            )

        return self.world.run(work)

    def verify(self, routing: Routing, results: Sequence[RankResult]) -> None:
        """Dispatch bit by bit, combine within the reference's bound."""
        shape = self.shape
        expected = reference.dispatch(routing.x, routing.ids, shape.experts, shape.max_tokens)
        for rank, (want, got) in enumerate(zip(expected, results, strict=True)):
            assert torch.equal(got.counts, want.counts), f"rank {rank}: counts"
            assert torch.equal(got.ranges, want.ranges), f"rank {rank}: ranges"
            for expert, count in enumerate(want.counts.tolist()):
                assert torch.equal(got.tokens[expert, :count], want.tokens[expert, :count]), f"rank {rank}, {expert}"
        exact = reference.combine([r.y for r in results], expected, routing.ids, routing.weights, shape.experts)
        for rank, (sums, got) in enumerate(zip(exact, results, strict=True)):
            assert not got.combined.isnan().any(), f"rank {rank}: a padding row was summed"
            excess = (got.combined.double() - sums.exact).abs() - sums.bound
            assert not (excess > 0).any(), f"rank {rank}: {excess.max():.3g} over the bound"


@dataclass(frozen=True)
class RankResult:
    """What one rank got, on the CPU."""

    tokens: torch.Tensor
    counts: torch.Tensor
    ranges: torch.Tensor
    y: torch.Tensor
    combined: torch.Tensor
