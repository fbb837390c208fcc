# SPDX-License-Identifier: Apache-2.0
"""Whether what was timed is right, against `moegen.reference`.

Dispatch is compared bit by bit. Combine is compared with the exact sum and its bound in columns drawn anew for every
check (the reference is slow), and looked through for poison in all of them.
"""

from __future__ import annotations

import torch

from moegen import reference
from moegen.bench.failure import BenchError
from moegen.bench.inputs import Batch, Buffers
from moegen.handle import Dispatched

MAX_COLUMNS = 256
"""Columns of a combined token that one check compares with the reference."""


class Verifier:
    """Compares one rank's results of one routing.

    Args:
        in_halves: combine is made in halves, which round once more.
    """

    def __init__(self, rank: int, buffers: Buffers, batch: Batch, num_experts: int, *, in_halves: bool = False) -> None:
        self._rank = rank
        self._in_halves = in_halves
        self._buffers = buffers
        self._batch = batch
        self._num_experts = num_experts
        max_tokens = buffers.expert_rows // len(batch.ids)
        placeholders = [torch.zeros(len(ids), 1, dtype=torch.float32, device="cpu") for ids in batch.ids]
        self._expected = reference.dispatch(placeholders, batch.ids, num_experts, max_tokens)
        self._columns = torch.Generator(device="cpu").manual_seed(rank)
        self.worst = 0.0
        """The largest error of a combined number so far, as a share of its bound."""

    @property
    def columns(self) -> int:
        return min(MAX_COLUMNS, self._buffers.table.shape[1])

    def check_counts(self, dispatched: Dispatched) -> None:
        """Raises BenchError unless counts and ranges are the reference's."""
        mine = self._expected[self._rank]
        self._require(torch.equal(dispatched.counts.cpu(), mine.counts), "dispatch: counts differ")
        self._require(torch.equal(dispatched.ranges.cpu(), mine.ranges), "dispatch: ranges differ")

    def check_tokens(self, out: Dispatched, x_index: int) -> None:
        """Raises BenchError unless every row of a dispatch's result is the right token, bit by bit, and its scales."""
        sources = self._expected[self._rank].sources
        places = [
            (local * self._buffers.expert_rows + row, source, token)
            for local, rows in enumerate(sources)
            for row, (source, token) in enumerate(rows)
        ]
        if not places:
            return
        row, source, token = torch.tensor(places, dtype=torch.int64, device=out.tokens.device).unbind(1)
        everything = torch.stack([self._buffers.x_of(rank, x_index) for rank in range(len(self._batch.ids))])
        wanted = everything[source, token]
        if out.scales is not None:
            wanted, scales = reference.quantise(wanted, self._buffers.quantize)
            found_scales = out.scales.flatten(0, 1)[row]
            self._require(torch.equal(found_scales, scales), "dispatch: scales differ")
        found = out.tokens.flatten(0, 1).view(torch.uint8)[row]
        self._require(torch.equal(found, wanted.view(torch.uint8)), "dispatch: tokens differ")

    def check_combined(self, combined: torch.Tensor, y_index: int) -> None:
        """Raises BenchError unless a combine's result is within the reference's bound of the exact sum."""
        self._require(not bool(combined.isnan().any()), "combine: numbers that nobody wrote")
        hidden = combined.shape[1]
        columns = (
            torch.randperm(hidden, generator=self._columns, dtype=torch.int64, device="cpu")[: self.columns]
            .sort()
            .values
        )
        table = self._buffers.table[:, columns]
        outputs = []
        for rank, expected in enumerate(self._expected):
            used = max(int(expected.counts.max()), 1)
            outputs.append(table[self._buffers.table_rows(rank, y_index)[:, :used]])
        ids = [own if rank == self._rank else own[:0] for rank, own in enumerate(self._batch.ids)]
        weights = [own[: len(mine)] for own, mine in zip(self._batch.weights, ids, strict=True)]
        result = reference.combine(outputs, self._expected, ids, weights, self._num_experts, in_halves=self._in_halves)[
            self._rank
        ]
        share = ((combined[:, columns].cpu().double() - result.exact).abs() / result.bound).max().item()
        self._require(share <= 1.0, f"combine: an error of {share:.3g} times the bound")
        self.worst = max(self.worst, share)

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise BenchError(f"rank {self._rank}: what was timed is wrong: {what}")
