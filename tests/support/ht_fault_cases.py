# SPDX-License-Identifier: Apache-2.0
"""A fault at every wait site of family `ht`, on every device: what a missing peer would have written is written by hand
up to that site, and no further.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import moegen
from moegen.base.roles import Roles
from moegen.codegen.row_spec import CHUNK, RowSpec
from moegen.codegen.spec import Spec
from moegen.errors import PeerTimeoutError
from moegen.high_throughput.regions import Regions, regions
from moegen.high_throughput.roles import roles
from moegen.high_throughput.spec import PHASES
from moegen.limits import FIRST_EPOCH, PACKET_BYTES, PACKET_WORDS
from moegen.runtime.worlds import RankWorld
from support.ht_layer import RowsLayer, RowsShape, expert_outputs
from support.layer import random_routing

SHAPE = RowsShape(2, 4, 2, 64, "token", max_tokens=8)
TIMEOUT = 0.5
ABSENT = 1
LAYOUTS = pytest.mark.parametrize("layout", ["token", "packed"])
MODES = pytest.mark.parametrize("mode", ["capacity", "exact"])
NO_SELECTION = 0xFFFFFFFF
ONE = 0x3F800000
"""The weight 1.0, as bits."""


def start(device: str, **changes: Any) -> RowsLayer:
    return RowsLayer(replace(SHAPE, **changes), device, timeout=TIMEOUT)


def dispatch_regions(layer: RowsLayer) -> Regions:
    return regions(layer.ranks[0].selection.dispatch, layer.shape.max_tokens, 0)


def poke(layer: RowsLayer, offset: int, words: list[int]) -> None:
    """Writes 32-bit words into rank 0's symmetric memory, as its peer would."""
    signed = [word - 2**32 if word >= 2**31 else word for word in words]
    view = layer.ranks[0]._alive().memory.local.view(torch.int32)
    view[offset // 4 : offset // 4 + len(words)] = torch.tensor(signed, dtype=torch.int32)
    if layer.device == "cuda":
        torch.cuda.synchronize()


def tell_counts(layer: RowsLayer) -> None:
    """Rank 1 has one row for rank 0, which selects its first expert."""
    spec = layer.ranks[0].selection.dispatch
    at = dispatch_regions(layer).counts + ABSENT * spec.count_packets * PACKET_BYTES
    poke(layer, at, [1, 1, 0, FIRST_EPOCH])  # its rows for rank 0, by expert
    for packet in range(1, spec.count_packets):  # its tokens, and its rows by rank: for DeepEP's handle only
        poke(layer, at + packet * PACKET_BYTES, [1, 1, 0, FIRST_EPOCH])
    phase = "plan" if layer.ranks[0].mode == "exact" else "whole"
    last = 1 + spec.max_local_experts + spec.source_words  # the call word
    poke(layer, at + last // PACKET_WORDS * PACKET_BYTES + 4 * (last % PACKET_WORDS), [spec.in_phase(phase).call])


TOKEN = 5
"""Rank 1's token which that row is."""


def tell_entry(layer: RowsLayer, packets: tuple[int, ...] = (0, 1)) -> None:
    spec = layer.ranks[0].selection.dispatch
    assert spec.entry_packets == 2
    at = dispatch_regions(layer).entries + ABSENT * SHAPE.max_tokens * spec.entry_packets * PACKET_BYTES
    words = ([TOKEN, 0, NO_SELECTION, FIRST_EPOCH], [ONE, ONE, 0, FIRST_EPOCH])
    for packet in packets:
        poke(layer, at + packet * PACKET_BYTES, words[packet])


def arguments(layer: RowsLayer, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.ones(len(ids), SHAPE.hidden, dtype=torch.bfloat16, device=layer.device)
    return x, torch.tensor(ids, dtype=torch.int64, device=layer.device).reshape(-1, SHAPE.topk)


def dispatch_alone(layer: RowsLayer, ids: list[list[int]], handle: moegen.RowsHandle | None = None) -> None:
    """Rank 0 dispatches; rank 1 does nothing."""

    def work(world: RankWorld) -> None:
        if world.rank == ABSENT:
            return
        x, mine = arguments(layer, ids)
        layer.ranks[0].dispatch(x, None if handle else mine, handle=handle)
        layer.ranks[0].synchronize()

    layer.world.run(work)


def dispatch_together(layer: RowsLayer, ids: list[list[list[int]]]) -> list[moegen.DispatchedRows]:
    def work(world: RankWorld) -> moegen.DispatchedRows:
        x, mine = arguments(layer, ids[world.rank])
        layer.step(world)
        received = layer.ranks[world.rank].dispatch(x, mine)
        layer.ranks[world.rank].synchronize()
        return received

    return layer.world.run(work)


def combine_alone(layer: RowsLayer, received: moegen.DispatchedRows) -> None:
    def work(world: RankWorld) -> None:
        if world.rank != ABSENT:
            layer.ranks[0].combine(expert_outputs(received), received.handle)
            layer.ranks[0].synchronize()

    layer.world.run(work)


def assert_reported(error: PeerTimeoutError, layer: RowsLayer, site: str, index: int, peer: int = ABSENT) -> None:
    assert error.phase == PHASES[site]
    assert (error.rank, error.peer, error.index) == (0, peer, index)
    assert error.expected != error.seen
    assert f"rank {peer}" in str(error)
    Spec.parse(error.op)
    with pytest.raises(PeerTimeoutError):  # the object is poisoned until it is destroyed
        layer.ranks[0].check()
    with pytest.raises(PeerTimeoutError):
        dispatch_alone(layer, [])
    layer.destroy()
    with pytest.raises(moegen.errors.DestroyedError):
        layer.ranks[0].check()


@MODES
@LAYOUTS
def test_a_missing_rank(device: str, layout: str, mode: str) -> None:
    """The first thing that is missed of a rank that does not come at all is how many rows it sends."""
    layer = start(device, layout=layout, mode=mode)
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [[0, 1], [2, 3]])
    assert caught.value.op.endswith("plan" if mode == "exact" else "whole")
    assert_reported(caught.value, layer, "kCounts", -1)


@pytest.mark.parametrize("there", [(), (0,), (1,)])
def test_fault_while_waiting_for_an_entry(device: str, there: tuple[int, ...]) -> None:
    """Of its packets none, or only one, is there."""
    layer = start(device)
    tell_counts(layer)
    tell_entry(layer, there)
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [])
    assert_reported(caught.value, layer, "kEntry", 0)


@LAYOUTS
def test_fault_while_waiting_for_a_row(device: str, layout: str) -> None:
    layer = start(device, layout=layout)
    tell_counts(layer)
    tell_entry(layer)
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [])
    assert_reported(caught.value, layer, "kRow", TOKEN)


@LAYOUTS
def test_fault_while_waiting_for_a_row_by_a_handle(device: str, layout: str) -> None:
    layer = start(device, layout=layout)
    received = dispatch_together(layer, [[], [[2, 3], [3, 0]]])
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [], received[0].handle)
    assert caught.value.op.endswith("rows")
    assert_reported(caught.value, layer, "kRow", 1)


@LAYOUTS
def test_fault_while_waiting_for_a_partial_sum(device: str, layout: str) -> None:
    layer = start(device, layout=layout)
    received = dispatch_together(layer, [[[0, 1], [0, 3]], []])  # rank 0's second token has an expert on rank 1
    with pytest.raises(PeerTimeoutError) as caught:
        combine_alone(layer, received[0])
    assert_reported(caught.value, layer, "kPartial", 1)


def test_fault_while_waiting_for_the_end_of_a_call(device: str) -> None:
    layer = start(device)
    dispatch_together(layer, [[[0, 3]], [[1, 2]]])
    poke(layer, dispatch_regions(layer).consumed + 4 * ABSENT, [0xFFFFFFF0])  # as if rank 1 were some epochs behind
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [])
    assert_reported(caught.value, layer, "kPeerReady", -1)


def test_fault_while_waiting_for_another_block(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one launch wait for each other's counts; launches have all their blocks, so here one is made to expect
    one more: the third chunk is nobody's.
    """

    def one_too_few(spec: RowSpec, blocks: int) -> Roles:
        whole = roles(spec, blocks)
        first, number = whole.receivers
        return replace(whole, receivers=(first, number + 1)) if spec.op == "dispatch" else whole

    monkeypatch.setattr("moegen.high_throughput.ops.roles", one_too_few)
    shape = replace(SHAPE, max_tokens=4 * CHUNK)
    layer = RowsLayer(shape, device, timeout=4 * TIMEOUT, num_sms=3)  # time enough for the others to give up later
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [[0, 3]] * shape.max_tokens)
    assert_reported(caught.value, layer, "kPlanned", 2, peer=0)


def test_every_wait_site_has_a_fault_test() -> None:
    tested = {"kPeerReady", "kPlanned", "kCounts", "kEntry", "kRow", "kPartial"}
    assert tested == set(PHASES)


def test_a_timeout_of_one_call(device: str) -> None:
    """Of its own, in place of the object's; the report names it."""
    layer = RowsLayer(SHAPE, device, timeout=300.0)

    def work(world: RankWorld) -> None:
        if world.rank != ABSENT:
            layer.ranks[0].dispatch(*arguments(layer, [[0, 3]]), timeout=0.3)
            layer.ranks[0].synchronize()

    with pytest.raises(PeerTimeoutError, match=r"0\.3 s"):
        layer.world.run(work)
    layer.destroy()


@MODES
@LAYOUTS
def test_what_was_queued_behind_a_timeout_does_nothing(device: str, layout: str, mode: str) -> None:
    """A dispatch by a handle and a combine behind a dispatch that gave up, as in a graph: what the first would have
    recorded is not there.
    """
    layer = start(device, layout=layout, mode=mode)
    tell_counts(layer)
    rank = layer.ranks[0]
    ops = rank._alive()

    def work(world: RankWorld) -> None:
        if world.rank == ABSENT:
            return
        x, ids = arguments(layer, [[0, 3], [1, 2]])
        numbers, rows = ops.row_memory.numbers(ops.row_memory.empty_numbers()), ops.row_memory.rows(16, selections=True)
        phase, into = ("plan", None) if mode == "exact" else ("whole", rows)
        ops.dispatch(phase, x, None, ids, None, None, numbers, into, None, None, None)
        numbers.memory.fill_(0x3F3F3F3F)  # what fresh memory may hold
        later, out = torch.full_like(rows.tokens, 7), torch.full_like(x, 7)
        again = ops.row_memory.rows(16, selections=False, tokens=later)
        ops.dispatch("rows", x, None, None, None, None, numbers, again, None, None, None)
        handle = rank._result(numbers, rows, 2, None).handle
        ops.combine(rows.tokens, handle, None, (), out, None, True, None, None)
        with pytest.raises(PeerTimeoutError):
            rank.synchronize()
        assert (later == 7).all()
        assert (out == 7).all()

    layer.world.run(work)
    layer.destroy()


@LAYOUTS
def test_nothing_is_written_to_a_peer_that_is_not_ready(device: str, layout: str) -> None:
    layer = start(device, layout=layout)
    dispatch_together(layer, [[[0, 3]], [[1, 2]]])
    at = dispatch_regions(layer)
    poke(layer, at.consumed + 4 * ABSENT, [0xFFFFFFF0])
    peer = layer.ranks[ABSENT]._alive().memory.local
    before = peer[at.calls :].clone()
    with pytest.raises(PeerTimeoutError):
        dispatch_alone(layer, [[0, 3], [2, 3]])
    assert torch.equal(peer[at.calls :], before)
    layer.destroy()


def test_a_late_rank_hears_of_nothing_that_was_not_sent(device: str) -> None:
    """A rank comes after its peer gave up: it gets what the peer sent, whole, or waits in vain too; never a part."""
    layer = start(device)
    with pytest.raises(PeerTimeoutError):
        dispatch_alone(layer, [[2, 3], [0, 1]])

    def work(world: RankWorld) -> moegen.DispatchedRows | None:
        if world.rank != ABSENT:
            return None
        x, ids = arguments(layer, [[0, 3]])
        received = layer.ranks[ABSENT].dispatch(x, ids)
        layer.ranks[ABSENT].synchronize()
        return received

    received = layer.world.run(work)[ABSENT]
    assert received is not None
    assert received.source_starts.tolist() == [0, 1, 2]
    assert received.counts.tolist() == [1, 2]
    assert (received.tokens[:2] == 1).all()

    def combine(world: RankWorld) -> None:
        if world.rank == ABSENT:
            layer.ranks[ABSENT].combine(expert_outputs(received), received.handle)
            layer.ranks[ABSENT].synchronize()

    with pytest.raises(PeerTimeoutError) as caught:  # the token that it sent has an expert on the rank that gave up
        layer.world.run(combine)
    assert (caught.value.rank, caught.value.peer, caught.value.phase) == (ABSENT, 0, PHASES["kPartial"])
    layer.destroy()


@MODES
def test_a_rank_that_fails_does_not_hang_the_others(device: str, mode: str) -> None:
    layer = start(device, mode=mode)

    def work(world: RankWorld) -> None:
        if world.rank == ABSENT:
            raise RuntimeError("this rank fails")
        routing = random_routing(SHAPE, (3, 0), 1)  # type: ignore[arg-type]
        layer.ranks[0].dispatch(routing.x[0].to(device), routing.ids[0].to(device))
        layer.ranks[0].synchronize()

    with pytest.raises(RuntimeError, match="this rank fails"):
        layer.world.run(work)
    layer.destroy()
