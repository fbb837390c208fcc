# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput` objects on virtual ranks, and what they must give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import moegen
from moegen import reference, reference_rows
from moegen.reference_rows import ExpectedRows
from moegen.runtime.worlds import RankWorld
from support.layer import Routing

OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"quantize": "fp8"},
    "fp8_pow2": {"quantize": "fp8_pow2"},
    "fp8_ue8m0": {"quantize": "fp8_ue8m0"},
    "given": {"dtype": torch.float8_e4m3fn},
    "given_ue8m0": {"dtype": torch.float8_e4m3fn, "scale_dtype": torch.int32},
}
"""Format -> arguments of HighThroughput."""
QUANTISED = {"given": "fp8", "given_ue8m0": "fp8_ue8m0"}
"""How the caller quantises."""

Given = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class RowsShape:
    """What kernels are compiled for, and below that what an object is made for."""

    ranks: int
    experts: int
    topk: int
    hidden: int
    layout: str
    format: str = "bf16"
    max_tokens: int = 40
    mode: str = "capacity"
    alignment: int = 1

    def __str__(self) -> str:
        return (
            f"r{self.ranks}-e{self.experts}-k{self.topk}-h{self.hidden}-{self.layout}-{self.format}-m{self.max_tokens}"
            f"-{self.mode}-a{self.alignment}"
        )

    @property
    def other_mode(self) -> RowsShape:
        return replace(self, mode="exact" if self.mode == "capacity" else "capacity")


def make(world: Any, shape: RowsShape, **options: Any) -> moegen.HighThroughput:
    """One rank's object; `world`: its end of a LocalWorld, or a process group."""
    return moegen.HighThroughput(
        world,
        num_experts=shape.experts,
        num_topk=shape.topk,
        hidden=shape.hidden,
        max_tokens_per_rank=shape.max_tokens,
        layout=shape.layout,
        mode=shape.mode,
        alignment=shape.alignment,
        **{"timeout": 30.0, **OPTIONS[shape.format], **options},
    )


@dataclass
class Inputs:
    """One rank's arguments, on its device; `x` as the object takes it."""

    x: torch.Tensor | Given
    ids: torch.Tensor
    weights: torch.Tensor | None
    biases: list[torch.Tensor]


def biases_of(shape: RowsShape, routing: Routing, rank: int, number: int) -> list[torch.Tensor]:
    """Any rank can make any other's."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    size = (len(routing.x[rank]), shape.hidden)
    return [torch.randn(size, generator=generator).bfloat16() for _ in range(number)]


def inputs_of(
    shape: RowsShape,
    routing: Routing,
    rank: int,
    device: str,
    *,
    weighted: bool = True,
    narrow: bool = False,
    padding: int | None = None,
    biases: int = 0,
) -> Inputs:
    """`padding`: numbers between a token and the next, so that x is strided."""
    x: torch.Tensor | Given = strided(routing.x[rank].to(device), padding)
    if shape.format in QUANTISED:
        data, scales = reference.quantise(routing.x[rank], QUANTISED[shape.format])
        x = strided(data.to(device), padding), strided(scales.to(device), padding)
    return Inputs(
        x,
        routing.ids[rank].to(device, torch.int32 if narrow else torch.int64),
        routing.weights[rank].to(device) if weighted else None,
        [bias.to(device) for bias in biases_of(shape, routing, rank, biases)],
    )


def strided(tensor: torch.Tensor, padding: int | None) -> torch.Tensor:
    if padding is None:
        return tensor
    rows, width = tensor.shape
    wide = torch.zeros(rows, (width + padding) * tensor.element_size(), dtype=torch.uint8, device=tensor.device)
    view = wide.view(tensor.dtype)[:, :width]
    return view.copy_(tensor)


def expected_of(shape: RowsShape, routing: Routing, *, weighted: bool = True) -> list[ExpectedRows]:
    x, scales = list(routing.x), None
    if shape.format != "bf16":
        pairs = [reference.quantise(part, QUANTISED.get(shape.format, shape.format)) for part in x]
        x, scales = [data for data, _ in pairs], [scale for _, scale in pairs]
    weights = [part if weighted else None for part in routing.weights]
    return reference_rows.dispatch_rows(
        x, routing.ids, weights, shape.experts, layout=shape.layout, alignment=shape.alignment, scales=scales
    )


def used_rows(received: moegen.DispatchedRows) -> torch.Tensor:
    """Which rows something came for: bool [rows]."""
    rows = torch.arange(received.tokens.shape[0], device=received.tokens.device)
    if received.expert_starts is None:
        return rows < received.source_starts[-1]
    expert = torch.bucketize(rows, received.expert_starts[1:], right=True).clamp(max=len(received.counts) - 1)
    return (rows < received.expert_starts[-1]) & (rows - received.expert_starts[expert] < received.counts[expert])


def expert_outputs(received: moegen.DispatchedRows) -> torch.Tensor:
    """What stands in for experts: a small factor for each row; NaN in rows that nothing came for."""
    factors = torch.arange(received.tokens.shape[0], device=received.tokens.device) % 3 + 1
    y = (received.tokens.float() * factors[:, None]).bfloat16()
    return y.masked_fill_(~used_rows(received)[:, None], float("nan"))


def row_weights(received: moegen.DispatchedRows) -> torch.Tensor:
    """What combine adds up beside the rows of layout `token`; NaN in rows that nothing came for."""
    assert received.topk_weights is not None
    return received.topk_weights.masked_fill(~used_rows(received)[:, None], float("nan"))


@dataclass(frozen=True)
class RowsResult:
    """What one rank got, on the CPU; of what dispatch returned, its fields."""

    received: dict[str, Any]
    y: torch.Tensor
    sent_weights: torch.Tensor | None
    combined: torch.Tensor
    sums: torch.Tensor | None


TENSORS = (
    "tokens",
    "scales",
    "topk_idx",
    "topk_weights",
    "counts",
    "expert_starts",
    "source_starts",
    "row_tokens",
)


def on_cpu(received: moegen.DispatchedRows) -> dict[str, Any]:
    """The result's fields, and which rows are used."""
    tensors = {name: getattr(received, name) for name in TENSORS}
    there = {name: None if tensor is None else tensor.cpu() for name, tensor in tensors.items()}
    return {**there, "used": used_rows(received).cpu(), "host_counts": received.host_counts}


class RowsLayer:
    """Objects on all ranks of a LocalWorld, kept between calls."""

    def __init__(
        self, shape: RowsShape, device: str, *, world: moegen.LocalWorld | None = None, **options: Any
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

    def inputs(self, routing: Routing, rank: int, **options: Any) -> Inputs:
        return inputs_of(self.shape, routing, rank, self.device, **options)

    def pair(self, world: RankWorld, inputs: Inputs, *, sums: bool = False, **more: Any) -> RowsResult:
        """One rank's dispatch and combine. `sums`: combine adds up weights; `more`: for dispatch."""
        layer = self.ranks[world.rank]
        self.step(world)
        routed = () if "handle" in more else (inputs.ids, inputs.weights)
        received = layer.dispatch(inputs.x, *routed, **more)
        return self.finish(world, received, inputs.biases, sums=sums)

    def finish(
        self,
        world: RankWorld,
        received: moegen.DispatchedRows,
        biases: Sequence[torch.Tensor] = (),
        *,
        sums: bool = False,
        out: torch.Tensor | None = None,
    ) -> RowsResult:
        """The combine of what one rank was given."""
        layer = self.ranks[world.rank]
        self.step(world)
        y = expert_outputs(received)
        weights = row_weights(received) if sums else None
        self.step(world)
        combined, summed = layer.combine(y, received.handle, weights, bias=biases, out=out)
        layer.synchronize()
        self.step(world)
        return RowsResult(
            on_cpu(received),
            y.cpu(),
            None if weights is None else weights.cpu(),
            combined.cpu(),
            None if summed is None else summed.cpu(),
        )

    def round_trip(self, routing: Routing, *, sums: bool = False, **options: Any) -> list[RowsResult]:
        """One dispatch and combine on every rank; `options`: of `inputs_of`."""
        return self.world.run(lambda world: self.pair(world, self.inputs(routing, world.rank, **options), sums=sums))

    def verify(
        self, routing: Routing, results: Sequence[RowsResult], *, weighted: bool = True, biases: int = 0
    ) -> list[ExpectedRows]:
        """Dispatch bit by bit, combine within the reference's bound."""
        expected = expected_of(self.shape, routing, weighted=weighted)
        for rank, (want, got) in enumerate(zip(expected, results, strict=True)):
            verify_dispatch(rank, self.shape, want, got.received)
        verify_combine(self.shape, routing, expected, results, biases=biases)
        return expected


def same(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bit by bit."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if one.numel() == 0:  # torch cannot always view it
        return True
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


def verify_dispatch(
    rank: int, shape: RowsShape, want: ExpectedRows, got: dict[str, Any], *, by_handle: bool = False
) -> None:
    """`by_handle`: such a dispatch tells no selections."""
    where = f"rank {rank}: "
    for name in ("counts", "expert_starts", "source_starts"):
        wanted = getattr(want, name)
        assert (wanted is None) == (got[name] is None), where + name
        assert wanted is None or torch.equal(got[name], wanted), where + name
    assert torch.equal(got["row_tokens"][: len(want.row_tokens)], want.row_tokens), where + "row_tokens"
    used, number = got["used"], len(want.tokens)
    assert not used[number:].any()
    if shape.mode == "exact":
        assert len(used) == number, where + "rows"
        assert got["host_counts"] == want.counts.tolist()
    else:
        assert got["host_counts"] is None
    names = ("tokens", "scales") if by_handle else ("tokens", "scales", "topk_idx", "topk_weights")
    for name in names:
        wanted, mine = getattr(want, name), got[name]
        assert (wanted is None) == (mine is None), where + name
        assert wanted is None or same(mine[:number][used[:number]], wanted[used[:number]]), where + name
    if by_handle:
        assert got["topk_idx"] is None and got["topk_weights"] is None
    elif shape.layout == "token":
        assert (got["topk_idx"][number:] == -1).all(), where + "rows that nothing came for select something"
        assert (got["topk_weights"][got["topk_idx"] < 0] == 0).all(), where + "weights of no selection"


def verify_combine(
    shape: RowsShape,
    routing: Routing,
    expected: Sequence[ExpectedRows],
    results: Sequence[RowsResult],
    *,
    biases: int = 0,
) -> None:
    tokens = [len(part) for part in routing.x]
    of_ranks = [biases_of(shape, routing, rank, biases) for rank in range(shape.ranks)]
    wanted = reference_rows.combine_rows([r.y for r in results], expected, tokens, shape.topk, biases=of_ranks)
    for rank, (sums, got) in enumerate(zip(wanted, results, strict=True)):
        assert_within(f"rank {rank}", got.combined, sums)
    if results[0].sent_weights is not None:
        sent = [r.sent_weights for r in results if r.sent_weights is not None]
        summed = reference_rows.sum_weights(sent, expected, tokens)
        for rank, (sums, got) in enumerate(zip(summed, results, strict=True)):
            assert got.sums is not None
            assert_within(f"rank {rank}: weights", got.sums, sums)


def assert_within(where: str, got: torch.Tensor, want: reference.Combined) -> None:
    assert got.shape == want.exact.shape
    assert not got.isnan().any(), f"{where}: a row that nothing came for was summed"
    excess = (got.double() - want.exact).abs() - want.bound
    assert not (excess > 0).any(), f"{where}: {excess.max():.3g} over the bound"


def assert_same_results(one: Sequence[RowsResult], two: Sequence[RowsResult], *, by_handle: bool = False) -> None:
    """Bit by bit, wherever something is defined; results may have room for different numbers of rows."""
    for first, second in zip(one, two, strict=True):
        used = min(len(first.received["used"]), len(second.received["used"]))
        rows = first.received["used"][:used]
        assert torch.equal(rows, second.received["used"][:used])
        arrivals = int(first.received["source_starts"][-1])
        ends = {"row_tokens": arrivals}
        for name in TENSORS:
            if by_handle and name in ("topk_idx", "topk_weights"):
                continue
            a, b = first.received[name], second.received[name]
            assert (a is None) == (b is None), name
            if a is None:
                continue
            if name in ("tokens", "scales", "topk_idx", "topk_weights"):
                a, b = a[:used][rows], b[:used][rows]
            assert same(a[: ends.get(name)], b[: ends.get(name)]), name
        assert same(first.combined, second.combined)
