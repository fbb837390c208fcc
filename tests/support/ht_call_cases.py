# SPDX-License-Identifier: Apache-2.0
"""Calls of `HighThroughput` with all that they take: handles, counts on the device, outputs of the caller's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moegen import errors, reference_rows
from moegen.runtime.worlds import RankWorld
from support.ht_cases import BOTH, PACKED, POOL, SCALED, TOKEN, Layers, some
from support.ht_layer import (
    RowsResult,
    RowsShape,
    assert_same_results,
    assert_within,
    expected_of,
    expert_outputs,
    same,
    strided,
    verify_dispatch,
)
from support.layer import Routing


@SCALED
def test_scales_of_any_strides(shape: RowsShape, layers: Layers) -> None:
    """Rows side by side, as grouped GEMMs take them, and words apart; in memory that is not theirs nothing changes."""
    layer = layers[shape]
    routing = some(shape, [(9 * rank + 5) % 40 for rank in range(shape.ranks)], 3)
    wanted = layer.round_trip(routing)
    for strides in ("side by side", "apart"):

        def work(world: RankWorld, strides: str = strides) -> RowsResult:
            rank = layer.ranks[world.rank]
            memory = rank.row_memory
            rows, words = memory.capacity, rank.selection.dispatch.scale_words
            whole = torch.full((words, rows + 1), 77, dtype=memory.scales_dtype, device=world.device)
            scales = whole[:, :rows].t()
            if strides == "apart":
                whole = torch.full((rows, 2 * words + 1), 77, dtype=memory.scales_dtype, device=world.device)
                scales = whole[:, 1::2]
            result = layer.pair(world, layer.inputs(routing, world.rank), out_scales=scales)
            others = whole[:, rows:] if strides == "side by side" else whole[:, ::2]
            assert (others == 77).all()
            return result

        assert_same_results(layer.world.run(work), wanted)


@pytest.mark.parametrize("shape", [TOKEN, PACKED.other_mode, POOL[2], POOL[3], POOL[7], POOL[6]], ids=str)
def test_a_handle_gives_what_a_fresh_dispatch_gives(shape: RowsShape, layers: Layers) -> None:
    """Other tokens by the same routing, also into given tensors, from a routing with -1 and repeats."""
    layer = layers[shape]
    tokens = [(23 * rank + 11) % 40 for rank in range(shape.ranks)]
    first, second = some(shape, tokens, 5, "free"), some(shape, tokens, 6, "free")
    second = Routing(second.x, first.ids, first.weights)
    wanted = layer.round_trip(second)
    expected = expected_of(shape, second)

    def work(world: RankWorld) -> list[RowsResult]:
        rank = layer.ranks[world.rank]
        inputs, others = layer.inputs(first, world.rank), layer.inputs(second, world.rank, padding=16)
        layer.step(world)
        handle = rank.dispatch(inputs.x, inputs.ids, inputs.weights).handle
        made = rank.row_memory.rows(handle.rows, selections=False)
        return [
            layer.pair(world, others, handle=handle),
            layer.pair(world, others, handle=handle, out=made.tokens, out_scales=made.scales),
        ]

    results = layer.world.run(work)
    for step in range(2):
        by_handle = [of_rank[step] for of_rank in results]
        assert_same_results(by_handle, wanted, by_handle=True)
        for rank, got in enumerate(by_handle):
            verify_dispatch(rank, shape, expected[rank], got.received, by_handle=True)


@pytest.mark.parametrize("shape", [TOKEN, PACKED, PACKED.other_mode], ids=str)
def test_many_handles_live(shape: RowsShape, layers: Layers) -> None:
    layer = layers[shape]
    routings = [some(shape, (step, 40, 9 * step), step, "free") for step in range(5)]
    wanted = [layer.round_trip(routing) for routing in routings]

    def work(world: RankWorld) -> list[RowsResult]:
        rank = layer.ranks[world.rank]
        parts = [layer.inputs(routing, world.rank) for routing in routings]
        layer.step(world)
        received = [rank.dispatch(part.x, part.ids, part.weights) for part in parts]
        results = []
        for step in (3, 0, 4, 1, 2, 3):
            results.append(layer.finish(world, received[step]))
            if step % 2:  # and dispatch once more by an old one
                layer.pair(world, parts[step], handle=received[step].handle)
        return results

    results = layer.world.run(work)
    for number, step in enumerate((3, 0, 4, 1, 2, 3)):
        assert_same_results([of_rank[number] for of_rank in results], wanted[step])


@pytest.mark.parametrize("shape", [TOKEN, PACKED, PACKED.other_mode], ids=str)
def test_num_tokens_on_the_device(shape: RowsShape, layers: Layers) -> None:
    layer = layers[shape]
    full = some(shape, (9, 20, 37), 11)
    counts, told = (4, 0, 37), (4, -3, 1000)  # below 0 is none, and more than there are is all
    cut = Routing(*([part[:n] for part, n in zip(p, counts, strict=True)] for p in (full.x, full.ids, full.weights)))

    def work(world: RankWorld) -> list[RowsResult]:
        inputs = layer.inputs(full, world.rank)
        number = torch.tensor([told[world.rank]], dtype=torch.int32, device=world.device)
        layer.step(world)
        received = layer.ranks[world.rank].dispatch(inputs.x, inputs.ids, inputs.weights, num_tokens=number)
        number.fill_(40)  # read when the kernel runs, and never again
        fresh = layer.finish(world, received)
        return [fresh, layer.pair(world, inputs, handle=received.handle)]

    results = layer.world.run(work)
    wanted = layer.round_trip(cut)
    for step in range(2):
        got = [
            replace(of_rank[step], combined=of_rank[step].combined[:n])
            for of_rank, n in zip(results, counts, strict=True)
        ]
        assert_same_results(got, wanted, by_handle=step == 1)


@pytest.mark.parametrize("shape", [TOKEN, PACKED, PACKED.other_mode], ids=str)
def test_total_counts_add_up(shape: RowsShape, layers: Layers) -> None:
    layer = layers[shape]
    routings = [some(shape, (step, 17, 40 - step), step, "free") for step in range(3)]

    def work(world: RankWorld) -> torch.Tensor:
        totals = torch.full((len(layer.ranks[world.rank].local_experts),), 5, dtype=torch.int32, device=world.device)
        for routing in routings:
            layer.pair(world, layer.inputs(routing, world.rank), total_counts=totals)
        return totals.cpu()

    expected = [expected_of(shape, routing) for routing in routings]
    for rank, got in enumerate(layer.world.run(work)):
        assert torch.equal(got, 5 + sum(each[rank].counts for each in expected))


@BOTH
def test_given_outputs(shape: RowsShape, layers: Layers) -> None:
    """`out` of dispatch and combine; its rows are how many rows the result has."""
    layer = layers[shape]
    routing = some(shape, (5, 9, 0), 2)
    wanted = layer.round_trip(routing)

    def work(world: RankWorld) -> RowsResult:
        rank, inputs = layer.ranks[world.rank], layer.inputs(routing, world.rank)
        tokens = torch.empty(60, shape.hidden, dtype=torch.bfloat16, device=world.device)
        sums = torch.empty(len(inputs.ids), shape.hidden, dtype=torch.bfloat16, device=world.device)
        layer.step(world)
        received = rank.dispatch(inputs.x, inputs.ids, inputs.weights, out=tokens)
        assert received.tokens is tokens
        assert received.handle.rows == 60
        result = layer.finish(world, received, out=sums)
        assert same(sums.cpu(), result.combined)
        return result

    assert_same_results(layer.world.run(work), wanted)


ROOM = 6


@BOTH
def test_strided_outputs_and_biases(shape: RowsShape, layers: Layers) -> None:
    """Also such that do not begin on 16 bytes."""
    layer = layers[shape]
    routing = some(shape, (5, 9, 30), 2)

    def work(world: RankWorld) -> list[torch.Tensor]:
        rank, inputs = layer.ranks[world.rank], layer.inputs(routing, world.rank, biases=1)
        layer.step(world)
        received = rank.dispatch(inputs.x, inputs.ids, inputs.weights)
        layer.step(world)
        y, bias = expert_outputs(received), inputs.biases[0]
        whole = torch.zeros(y.numel() + 1, dtype=y.dtype, device=world.device)
        shifted = whole[1:].view(y.shape).copy_(y)
        results = []
        for outputs, added in ((y, bias), (strided(y, 3), strided(bias, 16)), (shifted, strided(bias, 1))):
            layer.step(world)
            results.append(rank.combine(outputs, received.handle, bias=added)[0])
        rank.synchronize()
        return results

    for results in layer.world.run(work):
        for other in results[1:]:
            assert same(results[0], other)


@BOTH
def test_too_little_room(shape: RowsShape, layers: Layers) -> None:
    """What has no room is left out and reported; nothing is written behind the rows; the next call is whole."""
    layer = layers[shape]
    routing = some(shape, (12, 3, 20), 8)
    expected = expected_of(shape, routing)

    def work(world: RankWorld) -> torch.Tensor:
        rank, inputs = layer.ranks[world.rank], layer.inputs(routing, world.rank)
        memory = torch.full((ROOM + 40, shape.hidden), 7, dtype=torch.bfloat16, device=world.device)
        layer.step(world)
        received = rank.dispatch(inputs.x, inputs.ids, inputs.weights, max_rows=ROOM, out=memory[:ROOM])
        with pytest.raises(errors.CapacityError, match=r"had room for fewer.*max_rows=\d+"):
            rank.synchronize()
        rank.check()  # told once
        layer.step(world)
        rank.dispatch(inputs.x, handle=received.handle)
        with pytest.raises(errors.CapacityError):
            rank.synchronize()
        layer.step(world)
        return memory.cpu()

    for want, memory in zip(expected, layer.world.run(work), strict=True):
        assert len(want.tokens) > ROOM
        used = torch.zeros(len(want.tokens), dtype=torch.bool)
        used[want.rows[want.rows >= 0]] = True
        assert same(memory[:ROOM][used[:ROOM]], want.tokens[:ROOM][used[:ROOM]])
        assert (memory[ROOM:] == 7).all()
    layer.verify(routing, layer.round_trip(routing))


@BOTH
def test_combine_of_what_had_too_little_room(shape: RowsShape, layers: Layers) -> None:
    """It reads no row that is not there."""
    layer = layers[shape]
    routing = some(shape, (12, 3, 20), 8)
    sums = shape.layout == "token"

    def work(world: RankWorld) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        rank, inputs = layer.ranks[world.rank], layer.inputs(routing, world.rank)
        beyond = torch.full((ROOM + 400, shape.hidden), float("nan"), dtype=torch.bfloat16, device=world.device)
        beside = torch.full((ROOM + 400, shape.topk), float("nan"), device=world.device)
        layer.step(world)
        received = rank.dispatch(inputs.x, inputs.ids, inputs.weights, max_rows=ROOM)
        with pytest.raises(errors.CapacityError):
            rank.synchronize()
        layer.step(world)
        y = beyond[:ROOM].copy_(expert_outputs(received))
        given = None
        if sums:
            assert received.topk_weights is not None
            given = beside[:ROOM].copy_(received.topk_weights)
        layer.step(world)
        combined, added = rank.combine(y, received.handle, given)
        rank.synchronize()
        layer.step(world)
        return y.cpu(), combined.cpu(), None if given is None else given.cpu(), None if added is None else added.cpu()

    results = layer.world.run(work)
    expected = expected_of(shape, routing)
    tokens = [len(part) for part in routing.x]
    wanted = reference_rows.combine_rows([y for y, *_ in results], expected, tokens, shape.topk)
    for rank, (want, (_, combined, _, _)) in enumerate(zip(wanted, results, strict=True)):
        assert_within(f"rank {rank}", combined, want)
    if sums:
        padded = [
            torch.cat((given, torch.zeros(len(want.row_tokens), shape.topk)))
            for want, (_, _, given, _) in zip(expected, results, strict=True)
            if given is not None
        ]
        for rank, want_sums in enumerate(reference_rows.sum_weights(padded, expected, tokens)):
            got = results[rank][3]
            assert got is not None
            assert_within(f"rank {rank}", got, want_sums)
