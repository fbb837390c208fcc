# SPDX-License-Identifier: Apache-2.0
"""What is sent through `OneSided` objects, and what they must give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moegen import reference_payloads
from moegen.reference_payloads import ExpectedPayloads
from support.layer import random_routing

Columns = tuple[tuple[int, torch.dtype], ...]
"""Of each payload: how many columns, of what."""

FP8 = torch.float8_e4m3fn
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": FP8}


def payload_set(name: str, hidden: int, topk: int) -> Columns:
    """Sets "layer" and "fp8" are what a layer sends: tokens, scales, ids, weights. The rest are widths of all sorts."""
    scales = (-(-hidden // 128), torch.float32)
    routing = ((topk, torch.int32), (topk, torch.float32))
    small = ((1, torch.bool), (3, torch.uint8), (5, torch.int16))
    odd = ((1, torch.int64), (2, torch.float64), (7, torch.float16), (13, torch.int8), (17, torch.uint8))
    more = ((1, torch.int16), (9, torch.bool))
    sets = {
        "bool": small[:1],
        "small": small,
        "layer": ((hidden, torch.bfloat16), *routing),
        "fp8": ((hidden, FP8), scales, *routing),
        "sixteen": (*small, *routing, (hidden, torch.bfloat16), (hidden, FP8), scales, *odd, *more, (1, torch.int32)),
    }
    return sets[name]


def room_for(columns: Columns) -> int:
    """Bytes per token: no more than there are."""
    return sum(width * dtype.itemsize for width, dtype in columns)


@dataclass(frozen=True)
class PayloadShape:
    """What kernels are compiled for, and what an object is made for.

    Attributes:
        payloads: the name of a `payload_set`.
        rows: combine's are "pushed" from any memory, "pulled" from `expert_rows()`, or "exchanged" on path collective.
        dtype, out: of combine's rows, and of its result.
    """

    ranks: int
    experts: int
    topk: int
    hidden: int
    payloads: str
    rows: str = "pushed"
    dtype: str = "bf16"
    out: str | None = None
    max_tokens: int = 24

    def __str__(self) -> str:
        return (
            f"r{self.ranks}-e{self.experts}-k{self.topk}-h{self.hidden}-{self.payloads}-{self.rows}-{self.dtype}"
            f"-{self.out}-m{self.max_tokens}"
        )

    @property
    def columns(self) -> Columns:
        return payload_set(self.payloads, self.hidden, self.topk)

    @property
    def out_dtype(self) -> torch.dtype | None:
        return None if self.out is None else DTYPES[self.out]


# ---- what is sent ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One dispatch's arguments, per rank, on the CPU."""

    payloads: list[list[torch.Tensor]]
    ids: list[torch.Tensor]
    seed: int

    @property
    def tokens(self) -> list[int]:
        return [len(part) for part in self.ids]


def random_bits(rows: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """[rows, width] of any bits, numbers that are none among them."""
    if dtype == torch.bool:
        return torch.randint(0, 2, (rows, width), generator=generator).bool()
    size = (rows, width * dtype.itemsize)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(dtype)


def random_batch(
    shape: PayloadShape, tokens: Sequence[int], seed: int, kind: str = "uniform", columns: Columns | None = None
) -> Batch:
    """`kind`: of `support.layer.random_routing`. Payloads are random bits."""
    generator = torch.Generator().manual_seed(seed)
    routing = random_routing(shape, tokens, seed, kind=kind)  # type: ignore[arg-type]
    wanted = shape.columns if columns is None else columns
    payloads = [[random_bits(count, width, dtype, generator) for width, dtype in wanted] for count in tokens]
    return Batch(payloads, routing.ids, seed)


@dataclass(frozen=True)
class How:
    """How a dispatch and its combine are called.

    Attributes:
        max_tokens: of dispatch.
        narrow: ids are int32.
        memory: how inputs lie in memory, of `lay`.
        told: per rank what `num_tokens` says; None: it is not given.
        unused_ids: of dispatch.
        stats: how many numbers of each rank are gathered; 0: none.
        active: the mask of both; ranks that it leaves out make no calls.
        given_out: combine writes into a tensor that it is given.
    """

    max_tokens: int | None = None
    narrow: bool = False
    memory: str = "plain"
    told: tuple[int, ...] | None = None
    unused_ids: tuple[int, int] | None = None
    stats: int = 0
    active: int | None = None
    given_out: bool = False

    def takes_part(self, rank: int) -> bool:
        return self.active is None or bool(self.active >> rank & 1)


MEMORIES = ("plain", "apart", "shifted", "columns", "transposed")


def lay(tensor: torch.Tensor, memory: str) -> torch.Tensor:
    """The same numbers: with others between its rows, one element off, every other column of a wider one, or column by
    column.
    """
    if memory == "plain":
        return tensor
    if memory == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    *rows, width = tensor.shape
    if memory == "shifted":
        return tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    if memory == "apart":
        return tensor.new_zeros(*rows, width + 3)[..., :width].copy_(tensor)
    return tensor.new_zeros(*rows, 2 * width)[..., ::2].copy_(tensor)


def stats_of(batch: Batch, how: How, rank: int) -> torch.Tensor:
    return torch.arange(how.stats, dtype=torch.int32) * 1000 + 10 * batch.seed % 100_000 + rank


def expected_of(shape: PayloadShape, batch: Batch, how: How) -> list[ExpectedPayloads]:
    return reference_payloads.dispatch_payloads(
        batch.payloads,
        batch.ids,
        shape.experts,
        how.max_tokens or shape.max_tokens,
        num_tokens=how.told,
        unused_ids=how.unused_ids,
        stats=[stats_of(batch, how, rank) for rank in range(shape.ranks)] if how.stats else None,
        active_ranks=how.active,
    )


def outputs_of(shape: PayloadShape, expected: ExpectedPayloads, seed: int, dtype: torch.dtype | None = None) -> Any:
    """What stands in for experts: [ranks, max_tokens, hidden] of sizes so different that the order of a sum shows; NaN
    in slots that nothing came for.
    """
    generator = torch.Generator().manual_seed(seed)
    size = (*expected.tokens.shape, shape.hidden)
    exponents = torch.randint(-3, 4, (*size[:2], 1), generator=generator)
    y = torch.randn(size, generator=generator) * torch.pow(2.0, exponents)
    return y.masked_fill(~expected.used[:, :, None], float("nan")).to(dtype or DTYPES[shape.dtype])


# ---- what is right --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Got:
    """What one rank got, on the CPU. `y`: what combine was given."""

    payloads: list[torch.Tensor]
    counts: torch.Tensor
    stats: torch.Tensor | None
    y: torch.Tensor | None = None
    combined: torch.Tensor | None = None


POISON = 0xA5
"""Every byte of slots before something comes for them."""


def verify_dispatch(where: str, want: ExpectedPayloads, got: Got, how: How, *, poisoned: bool = True) -> None:
    """`poisoned`: slots that nothing came for hold what they held before."""
    assert torch.equal(got.counts, want.counts), f"{where}: counts are {got.counts}, not {want.counts}"
    for index, (wanted, plane) in enumerate(zip(want.payloads, got.payloads, strict=True)):
        assert plane.dtype == wanted.dtype
        assert plane.shape == wanted.shape
        rows, unused = plane.view(torch.uint8)[want.used], ~want.used
        assert torch.equal(rows, wanted.view(torch.uint8)[want.used]), f"{where}: payload {index}"
        if how.unused_ids is not None and index == how.unused_ids[0]:
            assert (plane[unused] == how.unused_ids[1]).all(), f"{where}: payload {index} is not filled"
        elif poisoned:
            left = plane.view(torch.uint8)[unused] == POISON
            assert left.all(), f"{where}: payload {index}: written where nothing came"
    if want.stats is not None:
        there = [rank for rank in range(len(want.counts)) if how.takes_part(rank)]
        assert got.stats is not None
        assert torch.equal(got.stats[there], want.stats[there]), f"{where}: stats"


def verify_combine(
    shape: PayloadShape,
    batch: Batch,
    how: How,
    expected: Sequence[ExpectedPayloads],
    results: Sequence[Got | None],
    out_dtype: torch.dtype | None = None,
) -> None:
    """Of every rank that takes part."""
    outputs = [None if got is None else got.y for got in results]
    some = next(y for y in outputs if y is not None)
    wanted = reference_payloads.combine_payloads(
        [torch.zeros_like(some) if y is None else y for y in outputs],
        expected,
        batch.tokens,
        out_dtype=out_dtype or shape.out_dtype,
        active_ranks=how.active,
    )
    for rank, got in enumerate(results):
        if how.takes_part(rank):
            assert got is not None
            assert got.combined is not None
            counted = batch.tokens[rank] if how.told is None else min(max(0, how.told[rank]), batch.tokens[rank])
            assert_combined(f"rank {rank}", got.combined, wanted[rank], counted)


def assert_combined(
    where: str, got: torch.Tensor, want: reference_payloads.CombinedPayloads, counted: int | None = None
) -> None:
    """Rows from `counted` on are undefined."""
    assert got.shape == want.exact.shape, where
    assert got.dtype == want.rounded.dtype, where
    assert not got[:counted].isnan().any(), f"{where}: a row that nothing came for was summed"
    excess = ((got.double() - want.exact).abs() - want.bound)[:counted]
    assert not (excess > 0).any(), f"{where}: {excess.max():.3g} over the bound"
    assert torch.equal(got[:counted], want.rounded[:counted]), f"{where}: rows were not added in the order of the ranks"
