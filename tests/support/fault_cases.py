# SPDX-License-Identifier: Apache-2.0
"""A fault at every wait site of family `ll`, on every device: what a missing peer would have written is written by hand
up to that site, and no further.
"""

from __future__ import annotations

import pytest
import torch

import moegen
from moegen.codegen.spec import Spec
from moegen.errors import PeerTimeoutError
from moegen.limits import FIRST_EPOCH
from moegen.low_latency.regions import Regions, regions
from moegen.low_latency.spec import PHASES
from moegen.runtime.streams import current_stream
from support.layer import Layer, Shape, random_routing

SHAPE = Shape(2, 4, 2, 64, 8)
TIMEOUT = 0.5
ABSENT = 1


def make(device: str, wire: str = "row") -> Layer:
    return Layer(SHAPE, device, timeout=TIMEOUT, wire=wire)


def dispatch_regions(layer: Layer) -> Regions:
    return regions(layer.ranks[0].selection.dispatch, SHAPE.max_tokens, 0)


def poke(layer: Layer, offset: int, words: list[int]) -> None:
    """Writes 32-bit words into rank 0's symmetric memory, as its peer would."""
    ops = layer.ranks[0]._alive()
    signed = [word - 2**32 if word >= 2**31 else word for word in words]
    view = ops.memory.local.view(torch.int32)
    view[offset // 4 : offset // 4 + len(words)] = torch.tensor(signed, dtype=torch.int32)
    if layer.device == "cuda":
        torch.cuda.synchronize()


def dispatch_alone(layer: Layer, ids: list[list[int]]) -> moegen.Dispatched:
    """Rank 0 dispatches; rank 1 does nothing."""

    def work(world: moegen.runtime.worlds.RankWorld) -> moegen.Dispatched | None:
        if world.rank == ABSENT:
            return None
        x = torch.ones(len(ids), SHAPE.hidden, dtype=torch.bfloat16, device=layer.device)
        rank = layer.ranks[0]
        mine = torch.tensor(ids, dtype=torch.int64, device=layer.device).reshape(-1, SHAPE.topk)
        received = rank.dispatch(x, mine)
        rank.synchronize()
        return received

    return layer.world.run(work)[0]


def dispatch_together(layer: Layer, ids: list[list[list[int]]]) -> list[moegen.Dispatched]:
    def work(world: moegen.runtime.worlds.RankWorld) -> moegen.Dispatched:
        mine = torch.tensor(ids[world.rank], dtype=torch.int64, device=layer.device).reshape(-1, SHAPE.topk)
        x = torch.ones(len(mine), SHAPE.hidden, dtype=torch.bfloat16, device=layer.device)
        received = layer.ranks[world.rank].dispatch(x, mine)
        layer.ranks[world.rank].synchronize()
        return received

    return layer.world.run(work)


def combine_alone(layer: Layer, received: moegen.Dispatched, tokens: int, *, late: bool) -> None:
    def work(world: moegen.runtime.worlds.RankWorld) -> None:
        if world.rank != ABSENT:
            weights = torch.ones(tokens, SHAPE.topk, device=layer.device) if late else None
            layer.ranks[0].combine(received.tokens, received.handle, weights)
            layer.ranks[0].synchronize()

    layer.world.run(work)


def assert_reported(error: PeerTimeoutError, layer: Layer, site: str, index: int) -> None:
    assert error.phase == PHASES[site]
    assert (error.rank, error.peer, error.index) == (0, ABSENT, index)
    assert error.expected != error.seen
    assert f"rank {ABSENT}" in str(error)
    Spec.parse(error.op)
    with pytest.raises(PeerTimeoutError):  # the object is poisoned until it is destroyed
        layer.ranks[0].check()
    with pytest.raises(PeerTimeoutError):
        dispatch_alone(layer, [])
    layer.destroy()


def routes_of_peer(layer: Layer) -> int:
    """Where rank 1's routes lie in rank 0's memory, in the half of the first epoch."""
    packets = 1 + SHAPE.max_tokens * layer.ranks[0].selection.dispatch.route_packets
    return dispatch_regions(layer).routes + ABSENT * packets * 16


def announce_a_token(layer: Layer) -> None:
    """Rank 1 tells that it has one token."""
    poke(layer, routes_of_peer(layer), [1, 0, 0, FIRST_EPOCH])


def announce_one_row(layer: Layer) -> None:
    """Rank 1's one token selects rank 0's first expert, and nothing else."""
    announce_a_token(layer)
    poke(layer, routes_of_peer(layer) + 16, [0xFFFF0000, 0xFFFFFFFF, 0xFFFFFFFF, FIRST_EPOCH])


def test_fault_while_waiting_for_a_number_of_tokens(device: str) -> None:
    layer = make(device)
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [[0, 1]])
    assert_reported(caught.value, layer, "kRoutes", -1)


def test_fault_while_waiting_for_a_route(device: str) -> None:
    layer = make(device)
    announce_a_token(layer)
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [[0, 1]])
    assert_reported(caught.value, layer, "kRoutes", 0)


@pytest.mark.parametrize("wire", ["inline", "row"])
def test_fault_while_waiting_for_a_row(device: str, wire: str) -> None:
    layer = make(device, wire)
    announce_one_row(layer)
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [])
    assert_reported(caught.value, layer, "kRow", 0)


@pytest.mark.parametrize("missing", ["head", "last unit"])
def test_fault_while_waiting_for_a_unit_of_an_inline_row(device: str, missing: str) -> None:
    layer = make(device, "inline")
    announce_one_row(layer)
    spec = layer.ranks[0].selection.dispatch
    record = dispatch_regions(layer).rows + ABSENT * SHAPE.max_tokens * spec.slot_bytes
    first = spec.head_units if missing == "head" else 0
    units = spec.row_units if missing == "head" else spec.head_units + spec.row_units - 1
    poke(layer, record + first * 16, [0, 0, 0, FIRST_EPOCH] * units)
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [])
    assert_reported(caught.value, layer, "kRow", 0)


def test_fault_while_waiting_for_a_free_buffer(device: str) -> None:
    layer = make(device)
    dispatch_together(layer, [[[0, 3]], [[1, 2]]])
    consumed = dispatch_regions(layer).consumed
    poke(layer, consumed + 4 * ABSENT, [0xFFFFFFF0])  # as if rank 1 were still some epochs behind
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [])
    assert_reported(caught.value, layer, "kPeerReady", -1)


def test_fault_while_waiting_for_weights(device: str) -> None:
    layer = make(device)
    received = dispatch_together(layer, [[], [[0, 3]]])  # rank 1's token has an expert on rank 0
    with pytest.raises(PeerTimeoutError) as caught:
        combine_alone(layer, received[0], 0, late=True)
    assert_reported(caught.value, layer, "kWeights", 0)


def test_a_late_rank_gets_no_sum_of_some_of_its_terms(device: str) -> None:
    """Its peer has waited for its weights in vain, and sends nothing that looks like a sum."""
    layer = make(device, "inline")
    received = dispatch_together(layer, [[], [[0, 3]]])
    with pytest.raises(PeerTimeoutError):
        combine_alone(layer, received[0], 0, late=True)

    def work(world: moegen.runtime.worlds.RankWorld) -> None:
        if world.rank == ABSENT:
            rank, mine = layer.ranks[ABSENT], received[ABSENT]
            rank.combine(mine.tokens, mine.handle, torch.ones(1, SHAPE.topk, device=device))
            rank.synchronize()

    with pytest.raises(PeerTimeoutError) as caught:
        layer.world.run(work)
    assert caught.value.phase == PHASES["kPartial"]
    layer.destroy()


@pytest.mark.parametrize("wire", ["inline", "row"])
def test_fault_while_waiting_for_a_partial_sum(device: str, wire: str) -> None:
    layer = make(device, wire)
    received = dispatch_together(layer, [[[0, 3]], []])  # rank 0's token has an expert on rank 1
    with pytest.raises(PeerTimeoutError) as caught:
        combine_alone(layer, received[0], 1, late=False)
    assert_reported(caught.value, layer, "kPartial", 0)


def test_what_was_queued_behind_a_timeout_does_nothing(device: str) -> None:
    """A combine behind a dispatch that gave up, as in a graph: what dispatch would have recorded is not there."""
    layer = make(device)
    announce_one_row(layer)
    ops = layer.ranks[0]._alive()
    rows = ops.received.tokens_shape

    def work(world: moegen.runtime.worlds.RankWorld) -> None:
        if world.rank == ABSENT:
            return
        x = torch.ones(2, SHAPE.hidden, dtype=torch.bfloat16, device=device)
        ids = torch.tensor([[0, 3], [1, 2]], device=device)
        received = ops.received.allocate(layer.ranks[0], 2, current_stream(layer.ranks[0].device))
        ops.dispatch(x, ids, None, None, received, None, False)
        received.handle.memory.fill_(0x3F3F3F3F)  # what fresh memory may hold
        out = torch.full_like(x, 7)
        ops.combine(torch.ones(rows, dtype=torch.bfloat16, device=device), received.handle, None, out, False)
        with pytest.raises(PeerTimeoutError):
            layer.ranks[0].synchronize()
        assert (out == 7).all()

    layer.world.run(work)
    layer.destroy()


@pytest.mark.parametrize("wire", ["inline", "row"])
def test_nothing_is_written_to_a_peer_that_is_not_ready(device: str, wire: str) -> None:
    layer = make(device, wire)
    dispatch_together(layer, [[[0, 3]], [[1, 2]]])
    poke(layer, dispatch_regions(layer).consumed + 4 * ABSENT, [0xFFFFFFF0])
    peer = layer.ranks[ABSENT]._alive().memory.local
    start = dispatch_regions(layer).routes
    before = peer[start:].clone()
    with pytest.raises(PeerTimeoutError):
        dispatch_alone(layer, [[0, 3], [2, 3]])
    assert torch.equal(peer[start:], before)
    layer.destroy()


def test_every_wait_site_has_a_fault_test() -> None:
    tested = {"kRoutes", "kRow", "kPeerReady", "kWeights", "kPartial"}
    assert tested == set(PHASES)


def test_a_rank_that_fails_does_not_hang_the_others(device: str) -> None:
    layer = make(device)

    def work(world: moegen.runtime.worlds.RankWorld) -> None:
        if world.rank == ABSENT:
            raise RuntimeError("this rank fails")
        routing = random_routing(SHAPE, (3, 0), 1)
        layer.ranks[0].dispatch(routing.x[0].to(device), routing.ids[0].to(device))
        layer.ranks[0].synchronize()

    with pytest.raises(RuntimeError, match="this rank fails"):
        layer.world.run(work)
    layer.destroy()
