# SPDX-License-Identifier: Apache-2.0
"""One op of family `a2a` with one routing: inputs that rotate, what is timed, and whether it was right.

Everything follows from seeds, so every rank can compute what the others hold.
"""

from __future__ import annotations

from functools import partial

import torch

from moegen.bench.a2a_config import OneSidedConfig
from moegen.bench.failure import BenchError
from moegen.bench.inputs import TABLE_ROWS, Batch, Rotation
from moegen.bench.timing import Step, meet
from moegen.one_sided import OneSided
from moegen.payloads import DispatchedPayloads
from moegen.reference import expert_ranges
from moegen.runtime.worlds import RankWorld

_BUFFERS = 16
"""Of tokens and of expert outputs, at most; as many as are larger than twice the L2 cache."""


class Inputs:
    """Rotating tokens of this rank and rows that stand for expert outputs, for one number of tokens.

    Attributes:
        x: [tokens, hidden] each.
        y: [ranks, tokens, hidden] each.
        rotation: how many of each, and what that means for the L2 cache.
    """

    def __init__(self, world: RankWorld, config: OneSidedConfig, tokens: int) -> None:
        self.tokens, self._ranks, self._device = tokens, config.ranks, world.device
        generator = torch.Generator(device="cpu").manual_seed(config.seed)
        self._table = (
            torch.randn(TABLE_ROWS, config.hidden, generator=generator, device="cpu", dtype=torch.float32)
            .bfloat16()
            .to(world.device)
        )
        self.rotation = self._plan(config)
        self.x = [self.x_of(world.rank, index) for index in range(self.rotation.tokens)]
        self.y = [
            torch.stack([self.y_of(world.rank, source, index) for source in range(config.ranks)])
            for index in range(self.rotation.rows)
        ]

    def x_of(self, rank: int, index: int) -> torch.Tensor:
        """Any rank's tokens in the index-th buffer."""
        token = torch.arange(self.tokens, dtype=torch.int64, device=self._device)
        return self._table[(rank * 101 + token * 5 + index * 3) % TABLE_ROWS]

    def y_of(self, rank: int, source: int, index: int) -> torch.Tensor:
        """What a rank's experts make of a source's rows in the index-th buffer, by slot."""
        slot = torch.arange(self.tokens, dtype=torch.int64, device=self._device)
        return self._table[(rank * 57 + source * 37 + slot * 5 + index * 3) % TABLE_ROWS]

    def _plan(self, config: OneSidedConfig) -> Rotation:
        token_bytes = self.tokens * config.row_bytes
        if self._device.type != "cuda":
            return Rotation(2, 2, 2 * token_bytes, 2 * config.ranks * token_bytes, 0)
        l2_bytes = int(torch.cuda.get_device_properties(self._device).L2_cache_size)
        wanted = (-(-2 * l2_bytes // used) for used in (token_bytes, config.ranks * token_bytes))
        x, y = (max(2, min(_BUFFERS, config.ops, number)) for number in wanted)
        return Rotation(x, y, x * token_bytes, y * config.ranks * token_bytes, l2_bytes)


class OneSidedCase:
    """Ops number 0, 1, 2... rotate over the buffers. Collective to make."""

    error_share = 0.0
    """Results are compared bit by bit: sums are formed in the order of the ranks here, too."""

    def __init__(self, layer: OneSided, config: OneSidedConfig, op: str, inputs: Inputs, batch: Batch) -> None:
        self.op, self.columns = op, 0 if op == "dispatch" else config.hidden
        self._layer, self._config, self._inputs, self._batch = layer, config, inputs, batch
        self._ids = batch.own_ids.int()
        self._out = torch.empty(inputs.tokens, config.hidden, dtype=torch.bfloat16, device=layer.device)
        self._last = self._call_dispatch(0)
        self._exchanged = self._exchange_buffers() if op == "pair_of_exchanges" else []
        self._in_place: torch.Tensor | None = None
        if op.endswith("_in_place"):
            self._in_place = layer.expert_rows().copy_(inputs.y[0])
        meet(layer.world)

    def steps(self) -> list[Step]:
        """The op, as often as a recording holds it."""
        whole = self.op.removesuffix("_in_place")  # then combine takes rows that lie in symmetric memory
        run = {
            "dispatch": self.dispatch,
            "combine": self.combine,
            "pair": self.pair,
            "pair_of_exchanges": self.exchanges,
        }[whole]
        return [partial(run, number) for number in range(self._config.ops)]

    def dispatch(self, number: int) -> None:
        self._last = self._call_dispatch(number)

    def combine(self, number: int) -> None:
        y = self._in_place if self._in_place is not None else self._inputs.y[number % len(self._inputs.y)]
        self._layer.combine(y, self._last.handle, out=self._out)

    def pair(self, number: int) -> None:
        self.dispatch(number)
        self.combine(number)

    def time_stages(self, calls: int) -> dict[str, list[float]]:
        """Seconds of each stage of so many pairs. Collective."""
        self._layer.time_stages()
        for number in range(calls):
            self.pair(number)
        self._layer.time_stages(False)
        return self._layer.stage_seconds()

    def exchanges(self, number: int) -> None:
        """Two all-to-alls of the rows that the routing needs on average, and nothing else."""
        for given, came in self._exchanged:
            self._layer.world.all_to_all(came, given)

    def _exchange_buffers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        ranks = self._config.ranks
        rows = sum(int(self._goes(source, rank).sum()) for source in range(ranks) for rank in range(ranks))
        sizes = (rows // ranks * each for each in (self._config.dispatch_row_bytes, self._config.row_bytes))
        device = self._layer.device
        given = [torch.zeros(size // ranks * ranks, dtype=torch.uint8, device=device) for size in sizes]
        return [(each, torch.empty_like(each)) for each in given]

    def _call_dispatch(self, number: int) -> DispatchedPayloads:
        x = self._inputs.x[number % len(self._inputs.x)]
        return self._layer.dispatch(self._ids, (x, self._ids, self._batch.own_weights))

    def poison(self) -> None:
        """Fills every output with what nobody sends."""
        meet(self._layer.world)
        self._out.fill_(torch.nan)
        for payload in self._last.payloads:
            payload.view(torch.uint8).fill_(0xFF)
        meet(self._layer.world)

    def verify(self) -> None:
        """Checks what the last op of a recording left.

        Raises:
            BenchError: something is wrong.
            PeerTimeoutError, InvalidRoutingError: what the kernels reported.
        """
        meet(self._layer.world)
        self._layer.check()
        last = self._config.ops - 1
        if not self._exchanged and not self.op.startswith("combine"):
            self._check_rows(last % len(self._inputs.x))
        if not self._exchanged and self.op != "dispatch":
            self._check_sums(0 if self._in_place is not None else last % len(self._inputs.y))
        meet(self._layer.world)

    def _goes(self, source: int, rank: int) -> torch.Tensor:
        """Which tokens of a source select an expert of a rank: bool [tokens]."""
        experts = expert_ranges(self._config.num_experts, self._config.ranks)[rank]
        ids = self._batch.ids[source].to(self._layer.device)
        return ((ids >= experts.start) & (ids < experts.stop)).any(dim=1)

    def _check_rows(self, index: int) -> None:
        for source in range(self._config.ranks):
            goes = self._goes(source, self._layer.rank)
            count = int(goes.sum())
            self._require(int(self._last.counts[source]) == count, "dispatch: counts differ")
            sent = (
                self._inputs.x_of(source, index),
                self._batch.ids[source].int().to(self._layer.device),
                self._batch.weights[source].to(self._layer.device),
            )
            for payload, wanted in zip(self._last.payloads, sent, strict=True):
                self._require(torch.equal(payload[source, :count], wanted[goes]), "dispatch: rows differ")

    def _check_sums(self, index: int) -> None:
        rank = self._layer.rank
        wanted = torch.zeros(self._out.shape, dtype=torch.float32, device=self._layer.device)
        for other in range(self._config.ranks):
            goes = self._goes(rank, other)
            wanted[goes] += self._inputs.y_of(other, rank, index)[: int(goes.sum())].float()
        self._require(torch.equal(self._out, wanted.bfloat16()), "combine: sums differ")

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise BenchError(f"rank {self._layer.rank}: what was timed is wrong: {what}")
