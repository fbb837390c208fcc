# SPDX-License-Identifier: Apache-2.0
"""Path collective of `HighThroughput`: what path ipc gives, and the reference, is what is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moegen import errors
from support.ht_cases import EDGES
from support.ht_layer import RowsLayer, RowsShape, assert_same_results
from support.layer import Routing, random_routing

# Ranks 1..8, experts that divide and do not, all formats in both layouts, both modes, alignments.
SHAPES = (
    RowsShape(1, 5, 3, 24, "token"),
    RowsShape(2, 13, 4, 512, "packed", "fp8_ue8m0", alignment=128),
    RowsShape(2, 64, 8, 512, "token", "given_ue8m0", mode="exact"),
    RowsShape(3, 9, 5, 2880, "token"),
    RowsShape(3, 10, 3, 24, "packed", mode="exact", alignment=4, max_tokens=150),
    RowsShape(4, 256, 8, 128, "packed", "given"),
    RowsShape(5, 7, 2, 128, "token", "fp8_pow2", mode="exact"),
    RowsShape(8, 8, 8, 256, "packed", "fp8", alignment=4),
    RowsShape(8, 33, 6, 128, "token"),
)
TOKEN, PACKED = SHAPES[3], replace(SHAPES[4], mode="capacity", max_tokens=40)
BOTH = pytest.mark.parametrize("shape", [TOKEN, PACKED], ids=str)


def routings(shape: RowsShape) -> list[Routing]:
    """Uneven and no tokens, ids of -1 and repeats, all to one rank, nothing anywhere, full capacity."""
    most, ranks = shape.max_tokens, range(shape.ranks)
    tokens = [[(7 * rank + 5 * seed) % (most + 1) * (rank % 3 != seed) for rank in ranks] for seed in range(4)]
    kinds = ("uniform", "free", "one", "none")
    some = [random_routing(shape, tokens[seed], seed, kind=kind) for seed, kind in enumerate(kinds)]  # type: ignore[arg-type]
    return [*some, random_routing(shape, [most] * shape.ranks, 9, kind="free")]  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_path_ipc_and_the_reference(shape: RowsShape, device: str) -> None:
    right, layer = (RowsLayer(shape, device, path=path) for path in ("ipc", "collective"))
    for number, routing in enumerate(routings(shape)):
        how: dict[str, Any] = {
            "biases": number % 3,
            "weighted": number != 1,
            "narrow": number == 2,
            "padding": 16 if number == 3 else None,
        }
        wanted, found = (each.round_trip(routing, sums=shape.layout == "token", **how) for each in (right, layer))
        layer.verify(routing, found, weighted=how["weighted"], biases=how["biases"])
        assert_same_results(wanted, found)
    right.destroy()
    layer.destroy()


@pytest.mark.slow
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_edges_of_the_domain(shape: RowsShape, device: str) -> None:
    """Many ranks, experts and selections, the widest rows, more tokens than blocks plan at once."""
    if device == "cuda" and shape.ranks > 9:
        pytest.skip("as on path ipc")
    layer = RowsLayer(shape, device, path="collective")
    for seed, kind in enumerate(("uniform", "free", "one")):
        tokens = [(shape.max_tokens + 3 * rank * seed) % (shape.max_tokens + 1) for rank in range(shape.ranks)]
        routing = random_routing(shape, tokens, seed, kind=kind)  # type: ignore[arg-type]
        layer.verify(routing, layer.round_trip(routing, sums=shape.layout == "token"))
    layer.destroy()


def test_what_only_path_ipc_has(device: str) -> None:
    with pytest.raises(errors.InputError, match="leave borrow out"):
        RowsLayer(TOKEN, device, path="collective", borrow=True)


@pytest.mark.parametrize("shape", [TOKEN, TOKEN.other_mode], ids=str)
def test_stages_are_timed_on_request(shape: RowsShape, device: str) -> None:
    layer = RowsLayer(shape, device, path="collective")
    routing = routings(shape)[0]
    layer.round_trip(routing)
    for rank in layer.ranks:
        assert rank.stage_seconds() == {}
        rank.time_stages()
    layer.round_trip(routing)
    layer.round_trip(routing)
    exchanges = ("plan", "dispatch") if shape.mode == "exact" else ("dispatch",)
    names = {f"{name}_{stage}" for name in exchanges for stage in ("pack", "collective", "compact")}
    for rank in layer.ranks:
        noted = rank.stage_seconds()
        assert set(noted) == names | {"combine_pack", "combine_collective", "combine_reduce"}
        assert all(len(seconds) == 2 and min(seconds) >= 0 for seconds in noted.values())
    layer.destroy()
    ipc = RowsLayer(shape, device, path="ipc")
    with pytest.raises(errors.InputError, match="single launches"):
        ipc.ranks[0].time_stages()
    ipc.destroy()
