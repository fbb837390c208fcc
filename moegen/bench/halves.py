# SPDX-License-Identifier: Apache-2.0
"""The halves of an op: launches that send, and launches that receive what has come."""

from __future__ import annotations

from functools import partial

from moegen.bench.case import Case
from moegen.bench.inputs import Batch, Buffers
from moegen.bench.timing import Step
from moegen.expert_parallel import ExpertParallel
from moegen.runtime.halves import Hook

HALVES = {
    "dispatch": ("dispatch_send", "dispatch_receive"),
    "combine": ("combine_send", "combine_receive"),
    "combine_weighted": ("combine_weighted_send", ""),
}
"""Op -> names of its halves. Both forms of combine receive with the same kernel, which is reported once."""


class HalvesCase(Case):
    """As many sends as there are slots, then their receives in the same order: two recordings, replayed in turn,
    because neither half can be repeated without the other. Collective to make.

    Args:
        ops: sends in a row, at most the slots of `ep`.
    """

    def __init__(self, ep: ExpertParallel, op: str, buffers: Buffers, batch: Batch, ops: int) -> None:
        super().__init__(ep, op, buffers, batch, ops, in_halves=True)
        self._hooks: list[Hook] = []

    def sends(self) -> list[Step]:
        """Launches of the first half. Recorded and replayed, they leave hooks open that `receives()` call."""
        return [partial(self._send, number) for number in range(self._ops)]

    def receives(self) -> list[Step]:
        """Launches of the second half."""
        return [self._receive] * self._ops

    def _send(self, number: int) -> None:
        x, y = self._x(number), self._y(number)
        batch, buffers = self._batch, self._buffers
        if self.op == "dispatch":
            self._last, hook = self._ep.dispatch(
                buffers.x[x], batch.own_ids, batch.own_weights, out=self._outs[y], return_recv_hook=True
            )
        else:
            assert self._before is not None
            weights = batch.own_weights if self.op == "combine_weighted" else None
            _, hook = self._ep.combine(
                buffers.y[y], self._before.handle, weights, out=buffers.combined[x], return_recv_hook=True
            )
        self._hooks.append(hook)

    def _receive(self) -> None:
        self._hooks.pop(0)()
