# SPDX-License-Identifier: Apache-2.0
"""Calls of objects whose ranks may be missing, and what right means for them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

import moegen
from moegen import errors, reference
from moegen.runtime.worlds import RankWorld
from support.layer import Layer, Routing, Shape, expert_outputs

SHAPE = Shape(3, 10, 4, 136, 12)
TOKENS = (12, 7, 9)
PAIR = Shape(2, 4, 2, 64, 8)
TIMEOUT = 0.4
PLENTY = 30.0
"""Seconds, where nobody is missing."""
EVERYBODY = (0, 1, 2)
OTHERS = (0, 1)
ABSENT = 2


@dataclass
class Got:
    """What one rank has of a dispatch and a combine, on the CPU."""

    received: moegen.Dispatched
    counts: torch.Tensor
    ranges: torch.Tensor
    y: torch.Tensor
    combined: torch.Tensor | None = None


@dataclass(frozen=True)
class How:
    """Options of a round trip."""

    late: bool = False
    halves: bool = False
    renormalize: bool = False
    timeout: float | None = None


def make(device: str, *, shape: Shape = SHAPE, **options: Any) -> Layer:
    settings = {"timeout": TIMEOUT, "active_ranks": True, **options}
    return Layer(shape, device, **settings)


def persist(call: Callable[[], None], left_out: list[errors.LeftOutError] | None) -> None:
    """Makes a call again that a rank which expects to be left out could not make, for that reason."""
    try:
        call()
    except errors.LeftOutError as error:
        if left_out is None:
            raise
        left_out.append(error)
        call()


def dispatch(
    rank: moegen.ExpertParallel, routing: Routing, how: How, left_out: list[errors.LeftOutError] | None = None
) -> Got:
    r = rank.rank
    x, ids, weights = (part[r].to(rank.device) for part in (routing.x, routing.ids, routing.weights))
    options: dict[str, Any] = {"timeout": how.timeout}
    given = None if how.late else weights
    if how.halves:
        received, receive = rank.dispatch(x, ids, given, return_recv_hook=True, **options)
        persist(receive, left_out)
    else:
        received = rank.dispatch(x, ids, given, **options)
    quantised = rank.problem.dtype != "bf16"
    y = torch.ones(received.tokens.shape, device=rank.device).bfloat16() if quantised else expert_outputs(received)
    persist(rank.synchronize, left_out)
    return Got(received, received.counts.cpu(), received.ranges.cpu(), y)


def combine(
    rank: moegen.ExpertParallel,
    routing: Routing,
    got: Got,
    how: How,
    left_out: list[errors.LeftOutError] | None = None,
) -> None:
    weights = routing.weights[rank.rank].to(rank.device) if how.late else None
    options: dict[str, Any] = {"timeout": how.timeout, "renormalize": how.renormalize}
    if how.halves:
        combined, receive = rank.combine(got.y, got.received.handle, weights, return_recv_hook=True, **options)
        persist(receive, left_out)
    else:
        combined = rank.combine(got.y, got.received.handle, weights, **options)
    persist(rank.synchronize, left_out)
    got.combined = combined.cpu()


def verify(
    shape: Shape,
    routing: Routing,
    results: dict[int, Got],
    how: How,
    *,
    dispatching: Collection[int],
    combining: Collection[int],
) -> None:
    """Of the ranks that made both calls, against the reference without those that did not."""
    everybody = range(shape.ranks)
    silent = [[r for r in everybody if r not in dispatching]] * shape.ranks
    expected = reference.dispatch(routing.x, routing.ids, shape.experts, shape.max_tokens, missing=silent)
    for r in combining:
        want, got = expected[r], results[r]
        assert torch.equal(got.counts, want.counts), f"rank {r}: counts"
        assert torch.equal(got.ranges, want.ranges), f"rank {r}: ranges"
        for expert, count in enumerate(want.counts.tolist()):
            assert torch.equal(got.received.tokens[expert, :count].cpu(), want.tokens[expert, :count])
    shape_of_y = next(iter(results.values())).y.shape
    outputs = [results[r].y.cpu() if r in results else torch.zeros(shape_of_y) for r in everybody]
    missing = [[q for q in everybody if q not in combining] if r in combining else everybody for r in everybody]
    sums = reference.combine(
        outputs,
        expected,
        routing.ids,
        routing.weights,
        shape.experts,
        in_halves=how.halves,
        missing=missing,
        renormalize=how.renormalize,
    )
    for r in combining:
        combined = results[r].combined
        assert combined is not None
        assert not combined.isnan().any(), f"rank {r}: what did not come was summed"
        excess = (combined.double() - sums[r].exact).abs() - sums[r].bound
        assert not (excess > 0).any(), f"rank {r}: {excess.max():.3g} over the bound"


def round_trip(
    layer: Layer,
    routing: Routing,
    how: How,
    *,
    dispatching: Collection[int] = EVERYBODY,
    combining: Collection[int] = EVERYBODY,
) -> dict[int, Got]:
    """A dispatch of some ranks and a combine of some of those; the others make no call."""

    def work(world: RankWorld) -> Got | None:
        if world.rank not in dispatching:
            return None
        rank = layer.ranks[world.rank]
        got = dispatch(rank, routing, how)
        if world.rank in combining:
            combine(rank, routing, got, how)
        return got

    results = {r: got for r, got in enumerate(layer.world.run(work)) if got is not None}
    verify(layer.shape, routing, results, how, dispatching=dispatching, combining=combining)
    return results


def masks(layer: Layer, ranks: Collection[int]) -> list[list[int]]:
    return [layer.ranks[r].active_ranks.tolist() for r in ranks]
