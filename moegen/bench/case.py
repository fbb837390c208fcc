# SPDX-License-Identifier: Apache-2.0
"""One op of family `ll` with one routing, ready to be recorded, poisoned and verified."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from moegen.bench.inputs import Batch, Buffers
from moegen.bench.timing import Step, meet
from moegen.bench.verify import Verifier
from moegen.expert_parallel import ExpertParallel
from moegen.handle import Dispatched

OPS = {
    "dispatch": "dispatch",
    "combine": "combine, weights at dispatch",
    "combine_weighted": "combine, weights at combine",
    "pair": "dispatch, then combine",
}
"""The ops that are timed, and what they are."""


class TimedCase(Protocol):
    """What is timed: an op with one routing.

    Attributes:
        op: "pair" is timed without a barrier before each.
        error_share: the largest error that was seen, as a share of its bound.
        columns: that each check of combine compares with the reference.
    """

    op: str

    @property
    def error_share(self) -> float: ...

    @property
    def columns(self) -> int: ...

    def steps(self) -> list[Step]: ...

    def poison(self) -> None: ...

    def verify(self) -> None: ...


class CallableCase(Protocol):
    """An op as it is called from Python; `number` chooses its buffers."""

    def dispatch(self, number: int) -> None: ...

    def combine(self, number: int) -> None: ...

    def pair(self, number: int) -> None: ...


class Case:
    """Ops number 0, 1, 2... rotate over the buffers. Collective to make."""

    def __init__(
        self, ep: ExpertParallel, op: str, buffers: Buffers, batch: Batch, ops: int, *, in_halves: bool = False
    ) -> None:
        self.op = op
        self._ep = ep
        self._buffers = buffers
        self._batch = batch
        self._ops = ops
        self._verifier = Verifier(ep.rank, buffers, batch, ep.problem.num_experts, in_halves=in_halves)
        self._outs = [ep.allocate(tokens=tokens) for tokens in buffers.out]
        self._last: Dispatched | None = None
        self._before: Dispatched | None = None
        if "combine" in op:
            given = None if op == "combine_weighted" else batch.own_weights
            self._before = ep.dispatch(buffers.x[0], batch.own_ids, given)
            meet(ep.world)

    @property
    def error_share(self) -> float:
        """The largest error of combine that was seen, as a share of its bound."""
        return self._verifier.worst

    @property
    def columns(self) -> int:
        """Columns that each check of combine compares with the reference."""
        return self._verifier.columns

    def steps(self) -> list[Step]:
        """The op, as often as a recording holds it."""
        made: dict[str, Callable[[int], object]] = {
            "dispatch": self.dispatch,
            "combine": self.combine,
            "combine_weighted": self.combine_weighted,
            "pair": self.pair,
        }
        run = made[self.op]
        return [partial(run, number) for number in range(self._ops)]

    def dispatch(self, number: int) -> None:
        x, out = self._x(number), self._y(number)
        self._last = self._ep.dispatch(
            self._buffers.x[x], self._batch.own_ids, self._batch.own_weights, out=self._outs[out]
        )

    def combine(self, number: int) -> None:
        assert self._before is not None
        out = self._buffers.combined[self._x(number)]
        self._ep.combine(self._buffers.y[self._y(number)], self._before.handle, out=out)

    def combine_weighted(self, number: int) -> None:
        assert self._before is not None
        y, out = self._buffers.y[self._y(number)], self._buffers.combined[self._x(number)]
        self._ep.combine(y, self._before.handle, self._batch.own_weights, out=out)

    def pair(self, number: int) -> None:
        self.dispatch(number)
        assert self._last is not None
        y, out = self._buffers.y[self._y(number)], self._buffers.combined[self._x(number)]
        self._ep.combine(y, self._last.handle, out=out)

    def poison(self) -> None:
        """Fills every output with NaN, and scales, counts and ranges with -1."""
        meet(self._ep.world)
        for tensor in (*self._buffers.out, *self._buffers.combined):
            tensor.fill_(torch.nan)
        for out in self._outs:
            out.handle.memory.fill_(-1)
            if out.scales is not None:
                out.scales.fill_(-1)
        meet(self._ep.world)

    def verify(self) -> None:
        """Checks what the last recording left: its last op, and the earliest whose outputs still stand.

        Raises:
            BenchError: something is wrong.
            PeerTimeoutError, InvalidRoutingError: what the kernels reported.
        """
        meet(self._ep.world)
        self._ep.check()
        if self.op in ("dispatch", "pair"):
            assert self._last is not None
            self._verifier.check_counts(self._last)
        rotation = self._buffers.rotation
        for number in sorted({self._ops - 1, max(0, self._ops - min(rotation.tokens, rotation.rows))}):
            if self.op in ("dispatch", "pair"):
                self._verifier.check_tokens(self._outs[self._y(number)], self._x(number))
            if self.op != "dispatch":
                self._verifier.check_combined(self._buffers.combined[self._x(number)], self._y(number))
        meet(self._ep.world)

    def _x(self, number: int) -> int:
        return number % self._buffers.rotation.tokens

    def _y(self, number: int) -> int:
        return number % self._buffers.rotation.rows
