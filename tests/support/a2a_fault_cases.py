# SPDX-License-Identifier: Apache-2.0
"""A fault at every wait site of family `a2a`, on every device: what a missing peer would have written is written by
hand up to that site, and no further.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import moegen
from moegen.codegen.spec import Spec
from moegen.errors import PeerTimeoutError
from moegen.limits import FIRST_EPOCH, MAX_RANKS, MAX_SENDERS, MAX_STATS, PACKET_BYTES, PACKET_WORDS, ceil_div
from moegen.one_sided.ops import combine_word, dispatch_word
from moegen.one_sided.spec import PHASES, OneSidedCombine, OneSidedDispatch
from moegen.runtime.streams import current_stream
from moegen.runtime.worlds import RankWorld
from support.a2a_data import PayloadShape
from support.a2a_layer import PayloadLayer

SHAPE = PayloadShape(2, 4, 2, 64, "layer", max_tokens=8)
"""Rank 0 holds experts 0 and 1, rank 1 the others."""
TIMEOUT = 0.5
ABSENT = 1
EVERYONE = 0b11
ROWS = pytest.mark.parametrize("rows", ["pushed", "pulled"])


def start(device: str, rows: str = "pushed", timeout: float = TIMEOUT) -> PayloadLayer:
    return PayloadLayer(replace(SHAPE, rows=rows), device, timeout=timeout)


def poke(layer: PayloadLayer, offset: int, words: list[int]) -> None:
    """Writes 32-bit words into rank 0's symmetric memory, as its peer would."""
    signed = [word - 2**32 if word >= 2**31 else word for word in words]
    view = layer.ranks[0]._alive().memory.local.view(torch.int32)
    view[offset // 4 : offset // 4 + len(words)] = torch.tensor(signed, dtype=torch.int32)
    if layer.device == "cuda":
        torch.cuda.synchronize()


def of_absent(offset: int, bytes_per_source: int, epoch: int = FIRST_EPOCH) -> int:
    """Where rank 1 writes, in a region [half][source]."""
    return offset + ((epoch & 1) * SHAPE.ranks + ABSENT) * bytes_per_source


def tell_counts(layer: PayloadLayer, rows: int, blocks: int, stats_words: int = 0) -> None:
    """Rank 1 has so many rows for rank 0, from so many blocks."""
    at = layer.ranks[0]._alive().at
    widths = tuple(width * dtype.itemsize for width, dtype in SHAPE.columns)
    dtypes = tuple(dtype for _, dtype in SHAPE.columns)
    call = dispatch_word(widths, dtypes, SHAPE.max_tokens, stats_words, EVERYONE)
    words = [rows, call & 0xFFFFFFFF | blocks, call >> 32, FIRST_EPOCH]
    poke(layer, of_absent(at.counts, PACKET_BYTES), words)


def begin_next(layer: PayloadLayer) -> None:
    """Rank 1 has consumed the first dispatch and begun the first combine."""
    at, spec = layer.ranks[0]._alive().at, layer.ranks[0]._combine_spec(torch.bfloat16, torch.bfloat16)
    poke(layer, at.presence + 8 * ABSENT, [FIRST_EPOCH])
    poke(
        layer,
        at.calls + 8 * ((FIRST_EPOCH & 1) * MAX_RANKS + ABSENT),
        [FIRST_EPOCH, combine_word(spec.dtype, spec.pulls, SHAPE.max_tokens, EVERYONE)],
    )


def arguments(layer: PayloadLayer, ids: list[list[int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    selected = torch.tensor(ids, dtype=torch.int64, device=layer.device).reshape(-1, SHAPE.topk)
    payloads = [torch.ones(len(ids), width, device=layer.device).to(dtype) for width, dtype in SHAPE.columns]
    return selected, payloads


def dispatch_alone(layer: PayloadLayer, ids: list[list[int]], **options: Any) -> None:
    """Rank 0 dispatches; rank 1 does nothing."""

    def work(world: RankWorld) -> None:
        if world.rank != ABSENT:
            layer.ranks[0].dispatch(*arguments(layer, ids), **options)
            layer.ranks[0].synchronize()

    layer.world.run(work)


def dispatch_together(layer: PayloadLayer, ids: list[list[list[int]]]) -> list[moegen.DispatchedPayloads]:
    def work(world: RankWorld) -> moegen.DispatchedPayloads:
        given = arguments(layer, ids[world.rank])
        layer.step(world)
        received = layer.ranks[world.rank].dispatch(*given)
        layer.ranks[world.rank].synchronize()
        return received

    return layer.world.run(work)


def outputs(layer: PayloadLayer, rank: int = 0) -> torch.Tensor:
    if layer.shape.rows == "pulled":
        return layer.ranks[rank].expert_rows().fill_(1)
    size = (SHAPE.ranks, SHAPE.max_tokens, SHAPE.hidden)
    return torch.ones(size, dtype=torch.bfloat16, device=layer.device)


def combine_alone(layer: PayloadLayer, received: moegen.DispatchedPayloads, rank: int = 0, **options: Any) -> None:
    def work(world: RankWorld) -> None:
        if world.rank == rank:
            layer.ranks[rank].combine(outputs(layer, rank), received.handle, **options)
            layer.ranks[rank].synchronize()

    layer.world.run(work)


def assert_reported(error: PeerTimeoutError, layer: PayloadLayer, site: str, index: int) -> None:
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
    with pytest.raises(moegen.errors.DestroyedError):
        layer.ranks[0].check()


@pytest.mark.parametrize("ids", [[], [[0, 1], [2, 3]]], ids=["zero tokens", "two tokens"])
def test_a_missing_rank(device: str, ids: list[list[int]]) -> None:
    """The first thing that is missed of a rank that does not come at all is how many rows it sends."""
    layer = start(device)
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, ids)
    assert_reported(caught.value, layer, "kCounts", -1)


def test_fault_while_waiting_for_the_rows_of_a_block(device: str) -> None:
    """The second of two blocks."""
    layer = start(device)
    tell_counts(layer, 2, 2)
    poke(layer, layer.ranks[0]._alive().at.flags + ABSENT * MAX_SENDERS * 4, [FIRST_EPOCH, FIRST_EPOCH - 1])
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [])
    assert_reported(caught.value, layer, "kRows", 1)


def test_fault_while_waiting_for_statistics(device: str) -> None:
    """Of seven numbers, in three packets, the last is missing."""
    layer = start(device)
    tell_counts(layer, 0, 0, stats_words=7)
    place = of_absent(layer.ranks[0]._alive().at.stats, ceil_div(MAX_STATS, PACKET_WORDS) * PACKET_BYTES)
    poke(layer, place, [1, 2, 3, FIRST_EPOCH] * 2)
    stats = torch.ones(7, dtype=torch.int32, device=device)
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [], stats=stats)
    assert_reported(caught.value, layer, "kStats", -1)


def test_fault_while_waiting_for_the_end_of_reading(device: str) -> None:
    """Rows are written where the peer's user may still read those before."""
    layer = start(device)
    dispatch_together(layer, [[[0, 3]], [[1, 2]]])
    with pytest.raises(PeerTimeoutError) as caught:
        dispatch_alone(layer, [[0, 3]])
    assert_reported(caught.value, layer, "kPeerReady", -1)


@ROWS
def test_fault_while_waiting_for_the_beginning_of_combine(device: str, rows: str) -> None:
    """Also where nothing is to come from that rank."""
    layer = start(device, rows)
    received = dispatch_together(layer, [[[0, 1]], [[1, 0]]])
    with pytest.raises(PeerTimeoutError) as caught:
        combine_alone(layer, received[0])
    assert_reported(caught.value, layer, "kPresence", -1)


def test_fault_while_waiting_for_a_row_to_be_added(device: str) -> None:
    """The second of two, of a rank that has begun."""
    layer = start(device)
    received = dispatch_together(layer, [[[0, 3], [1, 0], [2, 3]], []])
    begin_next(layer)
    poke(layer, of_absent(layer.ranks[0]._alive().at.tags, SHAPE.max_tokens * 4), [FIRST_EPOCH])
    with pytest.raises(PeerTimeoutError) as caught:
        combine_alone(layer, received[0])
    assert_reported(caught.value, layer, "kPartial", 1)


def test_every_wait_site_has_a_fault_test() -> None:
    tested = {"kCounts", "kRows", "kStats", "kPeerReady", "kPresence", "kPartial"}
    assert tested == set(PHASES)


def test_a_timeout_of_one_dispatch(device: str) -> None:
    """Of its own, in place of the object's; the report names it."""
    layer = start(device, timeout=300.0)
    with pytest.raises(PeerTimeoutError, match=r"0\.3 s.*a2a_dispatch") as caught:
        dispatch_alone(layer, [[0, 3]], timeout=0.3)
    assert caught.value.timeout == 0.3
    layer.destroy()


@ROWS
def test_a_timeout_of_one_combine(device: str, rows: str) -> None:
    layer = start(device, rows, 300.0)
    received = dispatch_together(layer, [[[0, 3]], []])[0]
    with pytest.raises(PeerTimeoutError, match=r"0\.3 s.*a2a_combine"):
        combine_alone(layer, received, timeout=0.3)
    layer.destroy()


@ROWS
def test_what_was_queued_behind_a_timeout_does_nothing(device: str, rows: str) -> None:
    """A combine behind a dispatch that gave up, as in a graph."""
    layer = start(device, rows)
    rank = layer.ranks[0]
    ops = rank._alive()
    dispatched = next(spec for spec in ops.specs if isinstance(spec, OneSidedDispatch))
    combined = next(spec for spec in ops.specs if isinstance(spec, OneSidedCombine) and spec.rows == rows)

    def work(world: RankWorld) -> None:
        if world.rank == ABSENT:
            return
        ids, payloads = arguments(layer, [[0, 3], [1, 2]])
        memory, addresses = rank._routing(2)
        handle = moegen.PayloadsHandle(rank, 2, SHAPE.max_tokens, memory, addresses, current_stream(rank.device))
        y, out = outputs(layer), torch.full((2, SHAPE.hidden), 7, dtype=torch.bfloat16, device=device)
        everybody = 0b11
        ops.dispatch(
            dispatched, payloads, ids, None, addresses, SHAPE.max_tokens, None, None, None, everybody, None, False
        )
        ops.combine(combined, y, (out.data_ptr(),), handle, everybody, None)
        with pytest.raises(PeerTimeoutError):
            rank.synchronize()
        assert (out == 7).all()

    layer.world.run(work)
    layer.destroy()


def test_no_row_is_written_to_a_peer_that_is_not_ready(device: str) -> None:
    layer = start(device)
    dispatch_together(layer, [[[0, 3]], [[1, 2]]])
    at, peer = layer.ranks[0]._alive().at, layer.ranks[ABSENT]._alive().memory.local
    before = peer[at.flags :].clone()
    with pytest.raises(PeerTimeoutError):
        dispatch_alone(layer, [[0, 3], [2, 3]])
    assert torch.equal(peer[at.flags :], before)
    layer.destroy()


@ROWS
def test_a_late_rank_hears_of_nothing_that_was_not_sent(device: str, rows: str) -> None:
    """A rank comes after its peer gave up: it gets what the peer sent, whole, or waits in vain too; never a part."""
    layer = start(device, rows)
    with pytest.raises(PeerTimeoutError):
        dispatch_alone(layer, [[2, 3], [0, 1]])

    def work(world: RankWorld) -> moegen.DispatchedPayloads | None:
        if world.rank != ABSENT:
            return None
        received = layer.ranks[ABSENT].dispatch(*arguments(layer, [[0, 3]]))
        layer.ranks[ABSENT].synchronize()
        return received

    received = layer.world.run(work)[ABSENT]
    assert received is not None
    assert received.counts.tolist() == [1, 1]
    for plane in received.payloads:
        assert (plane[:, 0].float() == 1).all()
    with pytest.raises(PeerTimeoutError) as caught:  # the token that it sent has an expert on the rank that gave up
        combine_alone(layer, received, ABSENT)
    assert (caught.value.rank, caught.value.peer) == (ABSENT, 0)
    assert caught.value.phase in (PHASES["kPartial"], PHASES["kPresence"])
    layer.destroy()


def test_a_rank_that_fails_does_not_hang_the_others(device: str) -> None:
    layer = start(device)

    def work(world: RankWorld) -> None:
        if world.rank == ABSENT:
            raise RuntimeError("this rank fails")
        layer.ranks[0].dispatch(*arguments(layer, [[0, 3]]))
        layer.ranks[0].synchronize()

    with pytest.raises(RuntimeError, match="this rank fails"):
        layer.world.run(work)
    layer.destroy()
