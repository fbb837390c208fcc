# SPDX-License-Identifier: Apache-2.0
"""Arguments that must be equal on all ranks and are not: every rank that receives from the other names them at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import moegen
from moegen import errors
from moegen.runtime.worlds import RankWorld
from support.a2a_data import PayloadShape
from support.a2a_layer import PayloadLayer
from support.ht_layer import RowsLayer, RowsShape
from support.layer import Layer, Shape

TIMEOUT = 0.4
RANKS, EXPERTS, TOPK, HIDDEN, MOST = 2, 4, 2, 64, 8
BOTH, FIRST, LAST, OWN = [0, 2], [0, 1], [2, 3], None
"""Experts of every token: of both ranks, of rank 0, of rank 1, of its own rank."""

Work = Callable[[RankWorld], Any]
LAYOUTS = pytest.mark.parametrize("layout", ["token", "packed"])


def tokens_of(world: RankWorld, experts: list[int] | None) -> tuple[torch.Tensor, torch.Tensor]:
    number = 3
    chosen = [2 * world.rank, 2 * world.rank + 1] if experts is None else experts
    x = torch.full((number, HIDDEN), 1.0 + world.rank, device=world.device).bfloat16()
    return x, torch.tensor([chosen] * number, device=world.device)


def step(layer: Any, world: RankWorld) -> None:
    """Nobody goes on before all are here."""
    layer.ranks[world.rank].synchronize()
    world.barrier()


def heard(layer: Any, work: Work) -> list[errors.MoegenError | None]:
    """What each rank raises, at the latest when a wait has timed out."""

    def guarded(world: RankWorld) -> errors.MoegenError | None:
        try:
            work(world)
            layer.ranks[world.rank].synchronize()
        except errors.MoegenError as error:
            return error
        return None

    began = time.monotonic()
    found = layer.world.run(guarded)
    assert time.monotonic() - began < 50 * TIMEOUT
    return found


def assert_named(
    layer: Any, found: list[errors.MoegenError | None], argument: str, *, by: tuple[int, ...] = (0, 1)
) -> None:
    for rank, error in enumerate(found):
        if rank not in by:
            assert error is None
            continue
        assert isinstance(error, errors.DifferentCallError)
        assert isinstance(error, errors.WorldError)
        assert (error.rank, error.peer) == (rank, 1 - rank)
        assert [argument in named for named in error.arguments] == [True]
        with pytest.raises(errors.DifferentCallError):  # unusable until it is destroyed
            layer.ranks[rank].check()
    layer.destroy()


# ---- ll -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("wire", ["inline", "row"])
@pytest.mark.parametrize(("experts", "by"), [(BOTH, (0, 1)), (FIRST, (0, 1)), (LAST, (0,)), (OWN, ())], ids=str)
def test_weights_at_combine_on_one_rank(
    device: str, wire: str, masked: bool, experts: list[int] | None, by: tuple[int, ...]
) -> None:
    """Rank 0 waits for weights that rank 1 never sends, or receives sums with other weights. Rank 1 waits for no row
    where its tokens stay: it cannot notice.
    """
    layer = Layer(Shape(RANKS, EXPERTS, TOPK, HIDDEN, MOST), device, timeout=TIMEOUT, wire=wire, active_ranks=masked)

    def work(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        x, ids = tokens_of(world, experts)
        weights = torch.full(ids.shape, 0.5, device=world.device)
        received = rank.dispatch(x, ids, weights)
        y = received.tokens.clone()
        step(layer, world)
        rank.combine(y, received.handle, weights if world.rank == 0 else None)

    found = heard(layer, work)
    if masked and device == "cpu":
        assert all(rank.active_ranks.tolist() == [1, 1] for rank in layer.ranks)  # nobody is missing
    assert_named(layer, found, "topk_weights", by=by)


def test_weights_at_combine_with_hooks_on_one_rank(device: str) -> None:
    layer = Layer(Shape(3, 10, 4, 512, 24), device, timeout=TIMEOUT, slots=2)

    def work(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        x = torch.ones(2, 512, device=world.device).bfloat16()
        ids = torch.tensor([[0, 3, 4, 9]] * 2, device=world.device)
        weights = torch.full(ids.shape, 0.25, device=world.device)
        received = rank.dispatch(x, ids, weights)
        y = received.tokens.clone()
        step(layer, world)
        _, receive = rank.combine(y, received.handle, weights if world.rank == 1 else None, return_recv_hook=True)
        receive()

    for rank, error in enumerate(heard(layer, work)):
        assert isinstance(error, errors.DifferentCallError)
        assert "topk_weights" in str(error)
        assert error.peer == 1 or rank == 1
    layer.destroy()


# ---- ht -------------------------------------------------------------------------------------------


def rows_layer(device: str, layout: str, **options: Any) -> RowsLayer:
    shape = RowsShape(RANKS, EXPERTS, TOPK, HIDDEN, layout, max_tokens=MOST)
    return RowsLayer(shape, device, **{"timeout": TIMEOUT, **options})


def combine_of(layer: RowsLayer, experts: list[int] | None, options: Callable[[Any, int], dict[str, Any]]) -> Work:
    def work(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        received = rank.dispatch(*tokens_of(world, experts))
        y = received.tokens.clone()
        given = options(received, world.rank)
        step(layer, world)
        rank.combine(y, received.handle, **given)

    return work


def test_weighted_on_one_rank(device: str) -> None:
    layer = rows_layer(device, "packed")
    found = heard(layer, combine_of(layer, BOTH, lambda _, rank: {"weighted": rank == 0}))
    assert_named(layer, found, "weighted (")


def test_weighted_where_it_makes_no_difference(device: str) -> None:
    """Layout `token` adds rows up without weights; and where no row crosses, nothing can be noticed."""
    for layout, experts in (("token", BOTH), ("packed", OWN)):
        layer = rows_layer(device, layout)
        assert heard(layer, combine_of(layer, experts, lambda _, rank: {"weighted": rank == 0})) == [None, None]
        layer.destroy()


@LAYOUTS
def test_weights_beside_rows_on_one_rank(device: str, layout: str) -> None:
    layer = rows_layer(device, layout)
    work = combine_of(layer, BOTH, lambda received, rank: {"topk_weights": received.topk_weights} if rank else {})
    assert_named(layer, heard(layer, work), "topk_weights (")


@LAYOUTS
@pytest.mark.parametrize(("mode", "others"), [("capacity", "exact"), ("capacity", "handle"), ("exact", "handle")])
def test_dispatch_in_another_way_on_one_rank(device: str, layout: str, mode: str, others: str) -> None:
    """Rank 1 in another mode, or by a handle."""
    layer = rows_layer(device, layout)

    def work(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        x, ids = tokens_of(world, BOTH)
        handle = rank.dispatch(x, ids).handle
        step(layer, world)
        if world.rank == 0:
            rank.dispatch(x, ids, mode=mode)
        elif others == "handle":
            rank.dispatch(x, handle=handle)
        else:
            rank.dispatch(x, ids, mode=others)

    found = heard(layer, work)
    assert ("a handle on rank" if others == "handle" else f'"{others}" on rank') in str(found[0])
    assert_named(layer, found, "mode or handle")


def test_another_op_is_a_timeout_that_says_so(device: str) -> None:
    layer = rows_layer(device, "token", timeout=0.5)

    def work(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        x, ids = tokens_of(world, BOTH)
        received = rank.dispatch(x, ids)
        y = received.tokens.clone()
        step(layer, world)
        if world.rank == 0:
            rank.combine(y, received.handle)
        else:
            rank.dispatch(x, ids)

    for error in heard(layer, work):
        assert isinstance(error, errors.PeerTimeoutError)
        assert "do all ranks make the same calls in the same order" in str(error)
    layer.destroy()


def test_path_collective_compares_too(device: str) -> None:
    shape = RowsShape(3, 10, 3, 24, "packed", alignment=4)
    layer = RowsLayer(shape, device, path="collective")

    def work(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        x = torch.ones(2, shape.hidden, device=world.device).bfloat16()
        received = rank.dispatch(x, torch.tensor([[0, 4, 7]] * 2, device=world.device))
        rank.combine(received.tokens.clone(), received.handle, weighted=world.rank == 0)

    for error in heard(layer, work):
        assert isinstance(error, errors.DifferentCallError)
        assert "weighted (" in str(error)
    layer.destroy()


# ---- a2a ------------------------------------------------------------------------------------------

PAYLOADS = PayloadShape(RANKS, EXPERTS, TOPK, HIDDEN, "layer", max_tokens=MOST)


def payload_layer(device: str, **options: Any) -> PayloadLayer:
    return PayloadLayer(PAYLOADS, device, **{"timeout": TIMEOUT, "expert_rows": True, **options})


def payloads_of(world: RankWorld, x: torch.Tensor) -> list[torch.Tensor]:
    ids = torch.zeros(len(x), TOPK, dtype=torch.int32, device=world.device)
    return [x, ids, torch.ones(len(x), TOPK, device=world.device)]


Given = tuple[list[torch.Tensor], dict[str, Any]]
DISPATCHES: dict[str, tuple[str, Callable[[list[torch.Tensor]], Given]]] = {
    "max_tokens": ("max_tokens (", lambda parts: (parts, {"max_tokens": MOST - 2})),
    "stats": ("stats (", lambda parts: (parts, {"stats": torch.ones(3, dtype=torch.int32, device=parts[0].device)})),
    "order": ("payloads", lambda parts: ([parts[0], parts[2], parts[1]], {})),
    "dtype": ("payloads", lambda parts: ([parts[0], parts[1].float(), parts[2]], {})),
    "number": ("payloads", lambda parts: (parts[:2], {})),
}


@pytest.mark.parametrize("name", DISPATCHES)
@pytest.mark.parametrize("experts", [BOTH, OWN], ids=str)
def test_another_dispatch_of_payloads_on_one_rank(device: str, name: str, experts: list[int] | None) -> None:
    """Counts cross between all ranks, so that all of them notice."""
    argument, change = DISPATCHES[name]
    layer = payload_layer(device)

    def work(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        x, ids = tokens_of(world, experts)
        parts = payloads_of(world, x)
        changed, options = change(parts)
        rank.dispatch(ids, changed)  # loads its kernel, on all ranks
        step(layer, world)
        rank.dispatch(ids, *((changed,) if world.rank else (parts,)), **(options if world.rank else {}))

    assert_named(layer, heard(layer, work), argument)


def test_another_mask_on_one_rank(device: str) -> None:
    """Rank 0 leaves out rank 2, which nobody else does: those that it writes to name the mask, rank 2 times out."""
    shape = PayloadShape(3, 10, 4, 64, "layer", max_tokens=MOST)
    layer = PayloadLayer(shape, device, timeout=0.7)

    def work(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        x = torch.ones(2, shape.hidden, device=world.device).bfloat16()
        ids = torch.tensor([[0, 4, 5, 9]] * 2, device=world.device)
        parts = [x, ids.int(), torch.ones(2, 4, device=world.device)]
        rank.dispatch(ids, parts)
        step(layer, world)
        rank.dispatch(ids, parts, active_ranks=0b011 if world.rank == 0 else None)

    found = heard(layer, work)
    assert [type(error) for error in found] == [errors.DifferentCallError] * 2 + [errors.PeerTimeoutError]
    assert "active_ranks" in str(found[0])
    assert "active_ranks" in str(found[1])
    assert "equal arguments where they must be equal" in str(found[2])
    layer.destroy()


COMBINES: dict[str, tuple[str, Callable[[moegen.OneSided, torch.Tensor], torch.Tensor]]] = {
    "dtype": ("dtype of y (", lambda rank, y: y.half()),
    "rows": ("expert_rows() as y (", lambda rank, y: rank.expert_rows().copy_(y)),
}


@pytest.mark.parametrize("name", COMBINES)
@pytest.mark.parametrize("experts", [BOTH, OWN], ids=str)
def test_another_combine_of_payloads_on_one_rank(device: str, name: str, experts: list[int] | None) -> None:
    """Every rank hears from every rank that combine begins, so that all of them notice."""
    argument, change = COMBINES[name]
    layer = payload_layer(device)

    def work(world: RankWorld) -> None:
        rank = layer.ranks[world.rank]
        x, ids = tokens_of(world, experts)
        received = rank.dispatch(ids, payloads_of(world, x))
        y = received.payloads[0].clone()
        rank.combine(change(rank, y), received.handle)  # loads its kernel, on all ranks
        step(layer, world)
        rank.combine(change(rank, y) if world.rank else y, received.handle)

    assert_named(layer, heard(layer, work), argument)
