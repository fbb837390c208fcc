# SPDX-License-Identifier: Apache-2.0
"""One op of family `ht` with one routing: inputs that rotate, what is timed, and whether it was right.

Everything follows from seeds, so every rank can compute what the others hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from moegen.bench.failure import BenchError
from moegen.bench.ht_config import HighThroughputConfig
from moegen.bench.inputs import TABLE_ROWS, Batch
from moegen.bench.timing import Step, meet
from moegen.high_throughput import HighThroughput
from moegen.reference import BF16_ROUNDING, FP32_ROUNDING, expert_ranges, quantise
from moegen.rows import DispatchedRows
from moegen.runtime.worlds import RankWorld

ROTATION = {"cuda": 4, "cpu": 2}
"""Buffers of tokens; of rows half as many. From 4,096 tokens of 7168 elements on they are larger than any L2 cache."""

CHECKED_COLUMNS = 256


class Inputs:
    """The tokens of all ranks, and rows that stand for expert outputs, for one number of tokens.

    Attributes:
        x: rotating inputs of dispatch: tokens, or (tokens, scales).
    """

    def __init__(self, world: RankWorld, config: HighThroughputConfig, tokens: int, dtype: str) -> None:
        self.tokens, self.count = tokens, ROTATION[world.device.type]
        self._given = dtype == "fp8_given"
        self._all = [_tokens(rank, tokens + self.count, config, world.device) for rank in range(config.ranks)]
        self._scales = [_scales(rank, tokens + self.count, config, world.device) for rank in range(config.ranks)]
        self.x = [self._clone(self.x_of(world.rank, index)) for index in range(self.count)]
        generator = torch.Generator(device="cpu").manual_seed(config.seed)
        table = torch.randn(TABLE_ROWS, config.hidden, generator=generator, device="cpu", dtype=torch.float32)
        self.table = table.bfloat16().to(world.device)

    def x_of(self, rank: int, index: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The index-th input of any rank."""
        window = slice(index, index + self.tokens)
        part = self._all[rank][window]
        return (part.to(torch.float8_e4m3fn), self._scales[rank][window]) if self._given else part

    def table_rows(self, rank: int, rows: torch.Tensor, index: int) -> torch.Tensor:
        """Which row of the table each row of a rank's index-th expert output is."""
        return (rank * 101 + rows * 5 + index * 3) % TABLE_ROWS

    @staticmethod
    def _clone(x: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return (x[0].clone(), x[1].clone()) if isinstance(x, tuple) else x.clone()


@dataclass(frozen=True)
class Expected:
    """Where the rows of one rank come from and lie, on its device.

    Attributes:
        sources, tokens, places: of every row of the result: source rank, its token, and the row.
        experts: local expert of every row of layout packed; else None.
    """

    sources: torch.Tensor
    tokens: torch.Tensor
    places: torch.Tensor
    experts: torch.Tensor | None


class RowsCase:
    """Ops number 0, 1, 2... rotate over the buffers. Collective to make."""

    def __init__(
        self, layer: HighThroughput, config: HighThroughputConfig, op: str, inputs: Inputs, batch: Batch
    ) -> None:
        self.op, self._layer, self._config, self._inputs, self._batch = op, layer, config, inputs, batch
        ids = torch.stack(batch.ids).to(layer.device)  # the CPU's cores are the ranks' common ones, and slow at this
        self._expected = [expected_rows(ids, config, layer.problem.layout, rank) for rank in range(config.ranks)]
        rows, device = layer.max_rows, layer.device
        count = max(1, inputs.count // 2)
        memory = layer.row_memory
        combines = op == "combine"
        self._outs = [torch.empty(rows, config.hidden, dtype=memory.dtype, device=device) for _ in range(count)]
        self._ys = [self._outputs(rows, index) for index in range(count)] if combines else []
        self._combined = [
            torch.empty(inputs.tokens, config.hidden, dtype=torch.bfloat16, device=device)
            for _ in range(count if combines else 0)
        ]
        self._before = layer.dispatch(inputs.x[0], batch.own_ids, batch.own_weights, out=self._outs[0])
        self._last: list[DispatchedRows] = [self._before] * count
        self.worst = 0.0
        """The largest error of a combined number so far, as a share of its bound."""
        meet(layer.world)

    @property
    def stem(self) -> str:
        """The kernel that is timed."""
        selection = self._layer.selection
        dispatch = selection.dispatch if self.op == "dispatch" else selection.dispatch.in_phase("rows")
        return selection.combine.stem if self.op == "combine" else dispatch.stem

    def steps(self) -> list[Step]:
        """The op, as often as a recording holds it."""
        run = {"dispatch": self._dispatch, "cached": self._cached, "combine": self._combine}[self.op]
        return [partial(run, number) for number in range(self._config.ops)]

    def _dispatch(self, number: int) -> None:
        at = number % len(self._outs)
        self._last[at] = self._layer.dispatch(
            self._inputs.x[number % self._inputs.count],
            self._batch.own_ids,
            self._batch.own_weights,
            out=self._outs[at],
        )

    def _cached(self, number: int) -> None:
        at = number % len(self._outs)
        x = self._inputs.x[number % self._inputs.count]
        self._last[at] = self._layer.dispatch(x, handle=self._before.handle, out=self._outs[at])

    def _combine(self, number: int) -> None:
        at = number % len(self._ys)
        self._layer.combine(self._ys[at], self._before.handle, out=self._combined[at])

    def poison(self) -> None:
        """Fills every output with NaN."""
        meet(self._layer.world)
        for tensor in (*(self._combined or self._outs),):
            tensor.view(torch.uint8).fill_(0xFF)
        meet(self._layer.world)

    def verify(self) -> None:
        """Checks what the last ops of a recording left.

        Raises:
            BenchError: something is wrong.
            PeerTimeoutError, InvalidRoutingError: what the kernels reported.
        """
        meet(self._layer.world)
        self._layer.check()
        last = self._config.ops - 1
        for number in range(max(0, last + 1 - max(1, self._inputs.count // 2)), last + 1):
            if self.op == "combine":
                self._check_combined(number % len(self._ys))
            else:
                self._check_rows(self._last[number % len(self._outs)], number % self._inputs.count)
        meet(self._layer.world)

    def _check_rows(self, found: DispatchedRows, x_index: int) -> None:
        mine = self._expected[self._layer.rank]
        given = [self._inputs.x_of(rank, x_index) for rank in range(self._config.ranks)]
        tokens = torch.stack([part[0] if isinstance(part, tuple) else part for part in given])
        wanted = tokens.view(torch.uint8)[mine.sources, mine.tokens]
        scales = None
        if isinstance(given[0], tuple):
            scales = torch.stack([part[1] for part in given])[mine.sources, mine.tokens]
        elif found.scales is not None:
            quantised, scales = quantise(tokens[mine.sources, mine.tokens], "fp8")
            wanted = quantised.view(torch.uint8)
        self._require(torch.equal(found.tokens.view(torch.uint8)[mine.places], wanted), "dispatch: rows differ")
        if scales is not None and found.scales is not None:
            self._require(torch.equal(found.scales[mine.places], scales), "dispatch: scales differ")
        own = expert_ranges(self._config.num_experts, self._config.ranks)[self._layer.rank]
        counts = torch.stack([ids.flatten() for ids in self._batch.ids]).flatten().bincount(minlength=own.stop)
        self._require(torch.equal(found.counts.cpu().long(), counts[own.start : own.stop]), "dispatch: counts differ")

    def _check_combined(self, index: int) -> None:
        """In columns drawn anew; ids of a token are distinct, so its rows are too."""
        rank, layer = self._layer.rank, self._layer
        columns = torch.randperm(self._config.hidden, dtype=torch.int64, device="cpu")[:CHECKED_COLUMNS].to(
            layer.device
        )
        table = self._inputs.table[:, columns].double()
        shape = (self._inputs.tokens, len(columns))
        exact = torch.zeros(shape, dtype=torch.float64, device=layer.device)
        rounded, magnitude = torch.zeros_like(exact), torch.zeros_like(exact)
        for other, rows in enumerate(self._expected):
            mine = rows.sources == rank
            terms = table[self._inputs.table_rows(other, rows.places[mine], index)]
            if layer.problem.layout == "packed":
                terms = terms * self._weights(other, rows, mine)
            partial_sum = torch.zeros_like(exact).index_add_(0, rows.tokens[mine], terms)
            exact += partial_sum
            rounded += partial_sum.abs()
            magnitude.index_add_(0, rows.tokens[mine], terms.abs())
        found = self._combined[index][:, columns].double()
        additions = self._config.num_topk + self._config.ranks
        bound = BF16_ROUNDING * (rounded + exact.abs()) + additions * FP32_ROUNDING * magnitude
        bound = bound * (1 + 2.0**-6) + 2.0**-133  # as moegen.reference_rows.combine_rows
        share = ((found - exact).abs() / bound).nan_to_num(nan=float("inf")).max().item()
        self._require(share <= 1.0, f"combine: an error of {share:.3g} times the bound")
        self.worst = max(self.worst, share)

    def _weights(self, other: int, rows: Expected, mine: torch.Tensor) -> torch.Tensor:
        """Of this rank's selections that lie in those rows of another: [rows, 1] float64."""
        assert rows.experts is not None
        start = expert_ranges(self._config.num_experts, self._config.ranks)[other].start
        tokens = rows.tokens[mine]
        expert = rows.experts[mine].unsqueeze(1) + start
        at = (self._batch.own_ids[tokens] == expert).int().argmax(dim=1, keepdim=True)
        return self._batch.own_weights[tokens].gather(1, at).double()

    def _outputs(self, rows: int, index: int) -> torch.Tensor:
        every = torch.arange(rows, dtype=torch.int64, device=self._layer.device)
        return self._inputs.table[self._inputs.table_rows(self._layer.rank, every, index)]

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise BenchError(f"rank {self._layer.rank}: what was timed is wrong: {what}")


def expected_rows(ids: torch.Tensor, config: HighThroughputConfig, layout: str, rank: int) -> Expected:
    """The rows that a rank gets.

    Args:
        ids: of all ranks, [ranks, tokens, topk]; those of one token are distinct.
    """
    experts = expert_ranges(config.num_experts, config.ranks)[rank]
    held = (ids >= experts.start) & (ids < experts.stop)
    if layout == "token":
        sources, tokens = held.any(dim=2).nonzero(as_tuple=True)
        return Expected(sources, tokens, torch.arange(len(sources), dtype=torch.int64, device=ids.device), None)
    sources, tokens, picks = held.nonzero(as_tuple=True)
    local, order = (ids[sources, tokens, picks] - experts.start).sort(stable=True)
    counts = local.bincount(minlength=len(experts))
    aligned = -(-counts // config.alignment) * config.alignment
    # A row's place among all, and by how much those of its expert are moved up.
    shift = (aligned - counts).cumsum(0) - (aligned - counts)
    places = torch.arange(len(local), dtype=torch.int64, device=ids.device) + shift[local]
    return Expected(sources[order], tokens[order], places, local)


def _tokens(rank: int, rows: int, config: HighThroughputConfig, device: torch.device) -> torch.Tensor:
    """Rows that all differ, the same on every rank: some drawn on the CPU, which is slow, and the others turned."""
    generator = torch.Generator(device="cpu").manual_seed(config.seed * 1_000_003 + rank)
    drawn = (
        torch.randn(TABLE_ROWS, config.hidden, generator=generator, device="cpu", dtype=torch.float32)
        .bfloat16()
        .to(device)
    )
    turned = [drawn.roll(turn, dims=1) for turn in range(-(-rows // TABLE_ROWS))]
    return torch.cat(turned)[:rows]


def _scales(rank: int, rows: int, config: HighThroughputConfig, device: torch.device) -> torch.Tensor:
    words = max(1, config.hidden // 128)
    generator = torch.Generator(device="cpu").manual_seed(config.seed + rank)
    return torch.rand(rows, words, generator=generator, device="cpu", dtype=torch.float32).to(device)
