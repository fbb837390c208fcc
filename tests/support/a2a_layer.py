# SPDX-License-Identifier: Apache-2.0
"""`OneSided` objects on virtual ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import moegen
from moegen import reference_payloads
from moegen.reference_payloads import ExpectedPayloads
from moegen.runtime.worlds import RankWorld
from support.a2a_data import (
    DTYPES,
    POISON,
    Batch,
    Got,
    How,
    PayloadShape,
    expected_of,
    lay,
    outputs_of,
    room_for,
    stats_of,
    verify_combine,
    verify_dispatch,
)


def arguments(shape: PayloadShape, **options: Any) -> dict[str, Any]:
    """Of the constructor."""
    return {
        "num_experts": shape.experts,
        "num_topk": shape.topk,
        "max_tokens_per_rank": shape.max_tokens,
        "payload_bytes": room_for(shape.columns),
        "hidden": shape.hidden,
        "dtype": DTYPES[shape.dtype],
        "payloads": shape.columns,
        "path": "collective" if shape.rows == "exchanged" else "ipc",
        "expert_rows": shape.rows == "pulled",
        "timeout": 30.0,
        **options,
    }


def make(world: Any, shape: PayloadShape, **options: Any) -> moegen.OneSided:
    """One rank's object; `world`: its end of a LocalWorld, or a process group."""
    return moegen.OneSided(world, **arguments(shape, **options))


@dataclass(frozen=True)
class Given:
    """One rank's arguments of a dispatch, on its device."""

    ids: torch.Tensor
    payloads: list[torch.Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def given_of(shape: PayloadShape, batch: Batch, how: How, rank: int, device: Any) -> Given:
    options: dict[str, Any] = {"max_tokens": how.max_tokens, "unused_ids": how.unused_ids, "active_ranks": how.active}
    if how.told is not None:
        options["num_tokens"] = torch.tensor([how.told[rank]], dtype=torch.int32, device=device)
    if how.stats:
        options["stats"] = stats_of(batch, how, rank).to(device)
    ids = batch.ids[rank].to(device, torch.int32 if how.narrow else torch.int64)
    parts = [lay(part.to(device), how.memory) for part in batch.payloads[rank]]
    return Given(lay(ids, how.memory), parts, options)


def check_result(shape: PayloadShape, batch: Batch, how: How, received: moegen.DispatchedPayloads, rank: int) -> None:
    """What a result looks like, whatever is in it."""
    slots = how.max_tokens or shape.max_tokens
    assert len(received.payloads) == len(batch.payloads[rank])
    for plane, given in zip(received.payloads, batch.payloads[rank], strict=True):
        assert plane.shape == (shape.ranks, slots, given.shape[1])
        assert plane.dtype == given.dtype
        if shape.rows != "exchanged":
            assert plane.is_contiguous()
            assert plane.data_ptr() % 64 == 0
    assert received.counts.dtype == torch.int32
    assert (received.stats is None) == (how.stats == 0)
    assert (received.handle.num_tokens, received.handle.max_tokens) == (len(batch.ids[rank]), slots)


def copied(plane: torch.Tensor) -> torch.Tensor:
    """On the CPU, each byte as it is: torch makes another bool of one that is neither 0 nor 1."""
    return plane.view(torch.uint8).clone().cpu().view(plane.dtype)


class PayloadLayer:
    """Kept between calls."""

    def __init__(
        self, shape: PayloadShape, device: str, *, world: moegen.LocalWorld | None = None, **options: Any
    ) -> None:
        self.shape = shape
        self.device = device
        self.world = world or moegen.LocalWorld(shape.ranks, device)
        self.ranks = self.world.run(lambda rank: make(rank, shape, **options))

    def destroy(self) -> None:
        for rank in self.ranks:
            rank.destroy()

    def step(self, world: RankWorld) -> None:
        """On a GPU no rank goes on before all are here: what torch does must not queue up behind a kernel that waits
        for a rank whose torch is queued up behind it.
        """
        if self.device == "cuda":
            self.ranks[world.rank].synchronize()
            world.barrier()

    def given(self, batch: Batch, how: How, rank: int) -> Given:
        return given_of(self.shape, batch, how, rank, self.device)

    def call(self, world: RankWorld, given: Given) -> moegen.DispatchedPayloads:
        return self.ranks[world.rank].dispatch(given.ids, given.payloads, **given.options)

    def poison(self, world: RankWorld, given: Given) -> None:
        """Fills what the next dispatch returns views of. Twice: receive buffers may take turns."""
        nothing = replace(given, ids=given.ids[:0], payloads=[part[:0] for part in given.payloads])
        options = {**given.options, "active_ranks": None, "unused_ids": None, "num_tokens": None}
        for _ in range(2):
            self.step(world)
            received = self.call(world, replace(nothing, options=options))
            for plane in received.payloads:
                plane.view(torch.uint8).fill_(POISON)
            self.ranks[world.rank].synchronize()
            world.barrier()

    def dispatch(
        self, world: RankWorld, batch: Batch, how: How, *, poisoned: bool = True
    ) -> tuple[moegen.DispatchedPayloads, Got] | None:
        """On one rank; nothing where it takes no part."""
        given = self.given(batch, how, world.rank)
        if poisoned:
            self.poison(world, given)
        self.step(world)
        if not how.takes_part(world.rank):
            return None
        received = self.call(world, given)
        self.ranks[world.rank].synchronize()
        check_result(self.shape, batch, how, received, world.rank)
        stats = None if received.stats is None else received.stats.cpu()
        return received, Got([copied(plane) for plane in received.payloads], received.counts.cpu(), stats)

    def combine(
        self, world: RankWorld, y: torch.Tensor, handle: moegen.PayloadsHandle, how: How, **options: Any
    ) -> torch.Tensor:
        """On one rank that takes part."""
        rank = self.ranks[world.rank]
        given = self.rows(world, y, how)
        options = {"out_dtype": self.shape.out_dtype, "active_ranks": how.active, **options}
        if how.given_out:
            dtype = options["out_dtype"] or reference_payloads.out_dtype_of(y.dtype)
            options["out"] = torch.full((handle.num_tokens, self.shape.hidden), 7, dtype=dtype, device=self.device)
        self.step(world)
        combined = rank.combine(given, handle, **options)
        rank.synchronize()
        assert not how.given_out or combined is options["out"]
        return combined.cpu()

    def rows(self, world: RankWorld, y: torch.Tensor, how: How) -> torch.Tensor:
        """Where combine takes them from. What others may still read is not overwritten."""
        if self.shape.rows != "pulled":
            return lay(y.to(self.device), how.memory)
        rank = self.ranks[world.rank]
        if how.active is None:
            rank.synchronize()
            world.barrier()
        return rank.expert_rows(y.shape[1], y.dtype).copy_(y)

    def pair(self, world: RankWorld, batch: Batch, how: How, expected: Sequence[ExpectedPayloads]) -> Got | None:
        made = self.dispatch(world, batch, how, poisoned=self.untouched(how))
        if made is None:
            self.step(world)
            return None
        received, got = made
        y = outputs_of(self.shape, expected[world.rank], batch.seed + world.rank)
        return replace(got, y=y, combined=self.combine(world, y, received.handle, how))

    def untouched(self, how: How) -> bool:
        """Whether slots that nothing comes for hold what they held, and can be poisoned: by calls of all ranks."""
        return how.active is None and self.shape.rows != "exchanged"

    def round_trip(self, batch: Batch, how: How | None = None) -> list[Got | None]:
        """A dispatch and a combine on every rank, verified."""
        how = How() if how is None else how
        expected = expected_of(self.shape, batch, how)
        results = self.world.run(self.pair, batch, how, expected)
        verify(self.shape, batch, how, expected, results, poisoned=self.untouched(how))
        return results


def verify(
    shape: PayloadShape,
    batch: Batch,
    how: How,
    expected: Sequence[ExpectedPayloads],
    results: Sequence[Got | None],
    *,
    poisoned: bool = False,
) -> None:
    """A dispatch and its combine on all ranks that take part: bit by bit."""
    for rank, got in enumerate(results):
        if how.takes_part(rank):
            assert got is not None
            verify_dispatch(f"rank {rank}", expected[rank], got, how, poisoned=poisoned)
    verify_combine(shape, batch, how, expected, results)
