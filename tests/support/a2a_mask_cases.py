# SPDX-License-Identifier: Apache-2.0
"""`OneSided` when ranks take no part: they make no calls, get nothing, and nobody waits for them; on every device."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from moegen import errors
from moegen.errors import PeerTimeoutError
from moegen.runtime.worlds import RankWorld
from support.a2a_cases import BOTH, KINDS, PULLED, one_thread_per_rank  # noqa: F401
from support.a2a_data import (
    Got,
    How,
    PayloadShape,
    expected_of,
    outputs_of,
    random_batch,
    verify_combine,
    verify_dispatch,
)
from support.a2a_layer import PayloadLayer

NEVER = 20.0
"""Seconds, of which a test has none: a rank that is waited for would show."""


def in_mask(shape: PayloadShape, left_out: list[int]) -> int:
    return sum(1 << rank for rank in range(shape.ranks) if rank not in left_out)


LEFT_OUT = [[0], [3], [1, 2], [0, 2, 3]]


@BOTH
@pytest.mark.parametrize("left_out", LEFT_OUT, ids=str)
def test_ranks_that_are_left_out(shape: PayloadShape, device: str, left_out: list[int]) -> None:
    """After calls that all ranks made, and call after call; tokens whose experts are all theirs get zeros."""
    layer = PayloadLayer(shape, device, timeout=NEVER)
    layer.round_trip(random_batch(shape, [5] * shape.ranks, 1))
    rests = [layer.ranks[rank]._alive().memory.local for rank in left_out]
    before = [memory.clone() for memory in rests]
    ids = [index for index, (_, dtype) in enumerate(shape.columns) if dtype == torch.int32]
    for seed, kind in enumerate(KINDS):
        counts = [0 if rank == 1 and seed == 2 else (9 * rank + 5 * seed) % 25 for rank in range(shape.ranks)]
        filled = (ids[0], -1) if ids else None
        how = How(active=in_mask(shape, left_out), stats=5, unused_ids=filled, max_tokens=24 - seed % 2)
        layer.round_trip(random_batch(shape, [min(count, 23) for count in counts], seed, kind), how)
    assert all(torch.equal(memory, old) for memory, old in zip(rests, before, strict=True))
    layer.destroy()


@BOTH
def test_more_ranks_are_left_out_one_after_the_other(shape: PayloadShape, device: str) -> None:
    layer = PayloadLayer(shape, device, timeout=NEVER)
    for number in range(shape.ranks):
        gone = list(range(number))
        for seed in range(2):
            batch = random_batch(shape, [(7 * rank + seed) % 25 for rank in range(shape.ranks)], seed, "free")
            layer.round_trip(batch, How(active=in_mask(shape, gone)))
    layer.destroy()


@BOTH
def test_a_mask_of_everybody_is_no_mask(shape: PayloadShape, device: str) -> None:
    layer = PayloadLayer(shape, device)
    batch = random_batch(shape, [(7 * rank) % 25 for rank in range(shape.ranks)], 1, "free")
    plain, masked = layer.round_trip(batch), layer.round_trip(batch, How(active=(1 << shape.ranks) - 1))
    for one, two in zip(plain, masked, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one.combined, two.combined)  # type: ignore[arg-type]
    layer.destroy()


@BOTH
def test_a_rank_that_goes_between_dispatch_and_combine(shape: PayloadShape, device: str) -> None:
    """Its rows are missing from the sums; the others' are there."""
    shape, gone = replace(shape, out=None), 2
    layer = PayloadLayer(shape, device, timeout=NEVER)
    batch = random_batch(shape, [9] * shape.ranks, 4, "free")
    expected = expected_of(shape, batch, How())
    without = How(active=in_mask(shape, [gone]))

    def work(world: RankWorld) -> Got | None:
        received, got = layer.dispatch(world, batch, How())  # type: ignore[misc]
        y = outputs_of(shape, expected[world.rank], 7 + world.rank)
        if world.rank == gone:
            layer.step(world)
            return None
        return replace(got, y=y, combined=layer.combine(world, y, received.handle, without))

    results = layer.world.run(work)
    for rank, got in enumerate(results):
        if got is not None:
            verify_dispatch(f"rank {rank}", expected[rank], got, How())
    verify_combine(shape, batch, without, expected, results)
    layer.destroy()


@BOTH
def test_a_rank_that_is_left_out_in_vain(shape: PayloadShape, device: str) -> None:
    """One is left out, and another does not come: the error names that one."""
    layer = PayloadLayer(shape, device, timeout=1.0)
    batch, how = random_batch(shape, [5] * shape.ranks, 1), How(active=in_mask(shape, [0]))

    def work(world: RankWorld) -> PeerTimeoutError | None:
        if world.rank in (0, 3):
            return None
        given = layer.given(batch, how, world.rank)
        try:
            layer.call(world, given)
            layer.ranks[world.rank].synchronize()
        except PeerTimeoutError as error:
            return error
        return None

    for rank, error in enumerate(layer.world.run(work)):
        if rank not in (0, 3):
            assert error is not None
            assert error.peer == 3
    layer.destroy()


def test_masks_that_cannot_be(device: str) -> None:
    layer = PayloadLayer(PULLED, device)
    batch = random_batch(PULLED, [1] * PULLED.ranks, 1)

    def work(world: RankWorld) -> None:
        rank, given = layer.ranks[world.rank], layer.given(batch, How(), world.rank)
        received = layer.call(world, given)
        y = outputs_of(PULLED, expected_of(PULLED, batch, How())[world.rank], 1).to(device)
        bad: list[tuple[Any, str]] = [
            (0, r"active_ranks is an integer in 1\.\.15"),
            (16, r"active_ranks is an integer in 1\.\.15"),
            (-1, r"active_ranks is an integer in 1\.\.15"),
            (True, r"active_ranks is an integer in 1\.\.15"),
            ("all", r"active_ranks is an integer in 1\.\.15"),
            (0b1111 & ~(1 << world.rank), f"leaves out rank {world.rank}, which makes this call"),
        ]
        for mask, says in bad:
            with pytest.raises(errors.InputError, match=says):
                rank.dispatch(given.ids, given.payloads, active_ranks=mask)
            with pytest.raises(errors.InputError, match=says):
                rank.combine(y, received.handle, active_ranks=mask)
        combined = rank.combine(y, received.handle, out_dtype=PULLED.out_dtype)  # nothing was launched in between
        rank.synchronize()
        assert combined.shape == (1, PULLED.hidden)

    layer.world.run(work)
    layer.destroy()


def test_what_is_not_loaded_is_not_loaded_without_everybody(device: str) -> None:
    """Loading a kernel is for all ranks: one that makes no calls would be waited for without end."""
    layer = PayloadLayer(PULLED, device)
    batch, how = random_batch(PULLED, [1] * PULLED.ranks, 1, columns=((7, torch.uint8),)), How(active=0b0111)
    refused = []

    def work(world: RankWorld) -> None:
        if world.rank == 3:
            time.sleep(1)
            raise RuntimeError("the rank that is left out ends")  # and with it what waits for it here
        try:
            layer.call(world, layer.given(batch, how, world.rank))
        except errors.MissingKernelError as error:
            refused.append(str(error))

    with pytest.raises(RuntimeError, match="is left out"):
        layer.world.run(work)
    assert len(refused) == 3
    assert "active_ranks" in refused[0]
    layer.destroy()
