# SPDX-License-Identifier: Apache-2.0
"""Path collective of `ExpertParallel`: what the reference gives is what is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moegen
from moegen import errors
from support.layer import Layer, Shape, random_routing
from support.mode_cases import SHAPE, TOKENS, check_tokens, hooked_round_trip, inputs

# Ranks 1..8, experts that divide and do not, selections whose weights fill 16 bytes and do not.
SHAPES = (
    Shape(1, 4, 2, 8, 8),
    Shape(2, 13, 8, 2880, 65),
    Shape(3, 10, 3, 24, 100),
    Shape(5, 7, 2, 16, 3),
    Shape(8, 20, 6, 128, 30),
)
KINDS = ("uniform", "free", "one", "none")


def tokens_of(shape: Shape, seed: int) -> list[int]:
    """Uneven ones, and ranks that have none."""
    return [(7 * rank + 5 * seed + 3) % (shape.max_tokens + 1) * (rank % 3 != seed) for rank in range(shape.ranks)]


@pytest.mark.parametrize("late", [False, True], ids=["at_dispatch", "at_combine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(shape: Shape, late: bool, device: str) -> None:
    layer = Layer(shape, device, path="collective")
    for seed, kind in enumerate(KINDS):
        routing = random_routing(shape, tokens_of(shape, seed), seed, kind=kind)
        layer.verify(routing, layer.round_trip(routing, late=late, narrow_ids=seed == 1))
    full = random_routing(shape, [shape.max_tokens] * shape.ranks, 9, kind="free")
    layer.verify(full, layer.round_trip(full, late=late))
    layer.destroy()


@pytest.mark.parametrize("kind", ["fp8", "fp8_pow2", "fp8_ue8m0"])
def test_quantised_tokens_equal_those_of_path_ipc(kind: str, device: str) -> None:
    routing = random_routing(SHAPE, TOKENS, 3, kind="free")

    def received(layer: Layer) -> list[moegen.Dispatched]:
        def work(world: Any) -> moegen.Dispatched:
            rank = layer.ranks[world.rank]
            found = rank.dispatch(*inputs(routing, world))
            rank.synchronize()
            return found

        return layer.world.run(work)

    layer = Layer(SHAPE, device, path="collective", quantize=kind)
    check_tokens(SHAPE, routing, kind, received(layer))
    layer.destroy()


@pytest.mark.parametrize("late", [False, True], ids=["at_dispatch", "at_combine"])
def test_hooks_have_nothing_left_to_do(late: bool, device: str) -> None:
    """Results are those of whole calls, bit by bit, also when inputs change between the halves."""
    layer = Layer(SHAPE, device, path="collective", slots=2)
    for seed, kind in enumerate(KINDS):
        routing = random_routing(SHAPE, TOKENS, seed, kind=kind)
        whole, halves = layer.round_trip(routing, late=late), hooked_round_trip(layer, routing, late=late)
        for one, two in zip(whole, halves, strict=True):
            assert torch.equal(one.combined, two.combined)
    layer.destroy()


@pytest.mark.parametrize("only_ipc", [{"active_ranks": True}, {"wire": "row"}, {"warp_groups": "1x2"}], ids=str)
def test_what_only_path_ipc_has(only_ipc: dict[str, Any], device: str) -> None:
    with pytest.raises(errors.InputError, match="path collective has no active_ranks, wire and warp_groups"):
        Layer(SHAPE, device, path="collective", **only_ipc)
