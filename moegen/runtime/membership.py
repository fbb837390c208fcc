# SPDX-License-Identifier: Apache-2.0
"""What an object knows of the ranks that share it: who they are, what they hold, which of them are active."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from moegen import admission
from moegen.errors import InputError, SlotError
from moegen.kernels.problem import Problem
from moegen.runtime.collective_experts import CollectiveExperts
from moegen.runtime.halves import Hook, OpenHalf
from moegen.runtime.lifecycle import Lifecycle, Ops
from moegen.runtime.low_latency import LowLatency
from moegen.runtime.ownership import exclusive
from moegen.runtime.worlds import RankWorld


class Membership(Lifecycle[Ops]):
    """The part of what users hold that says so."""

    world: RankWorld
    problem: Problem

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def num_ranks(self) -> int:
        return self.world.size

    @property
    def local_experts(self) -> range:
        """The expert ids that this rank holds."""
        return self.problem.local_experts(self.rank)

    @property
    def buffer_bytes(self) -> int:
        """Symmetric memory that this object holds on each rank."""
        return self._alive().buffer_bytes


class ActiveMembership(Membership[LowLatency | CollectiveExperts]):
    """Of ranks that may be missing, and of calls that may be made in halves."""

    _active: torch.Tensor | None = None

    @property
    def active_ranks(self) -> torch.Tensor:
        """int32 [ranks] on the device: 1: active, 0: missing; in this rank's own element, 0: the others have left this
        rank out.

        A kernel whose wait for a rank times out, or that learns that another rank's did, writes a 0; from then on this
        rank neither waits for that one nor sends to it. After two further calls all ranks that are left agree.
        Whatever runs between calls may write it, also in a graph: a 0 leaves a rank out; 1 takes it back. That is
        collective: all ranks do it at the same place, after a combine and before the next dispatch, once all of them
        have left that rank out, and it has by then made all calls that the others made.

        Raises:
            InputError: the object was made without.
        """
        if self._active is None:
            raise InputError("this object was made for ranks that are all there; make it with active_ranks=True")
        return self._active

    def _check_hook(self, hook: bool, asynchronous: bool = False) -> None:
        if hook and asynchronous:
            raise InputError("return_recv_hook and async_finish exclude each other; give one of them")
        if hook and not self.problem.hooks:
            raise SlotError("this object was made without hooks; make it with slots=2 (or more) to use them")

    def _hook(self, half: OpenHalf, outputs: Sequence[torch.Tensor | None], *read: torch.Tensor) -> Hook:
        """For the second half, which writes `outputs` and reads from `read`: until then no call may write there."""
        written = [tensor for tensor in outputs if tensor is not None]
        half.holds = tuple(admission.span(_HELD, tensor) for tensor in (*written, *read))
        return partial(self._receive, half, written)

    @exclusive
    def _receive(self, half: OpenHalf, written: Sequence[torch.Tensor]) -> None:
        """The hook that users get: a failure poisons the object, and on a CPU is raised at once."""
        ops = self._alive()
        self._raise_reported()
        self._launch(ops.receive, half)
        admission.note_writes(written)


_HELD = "the memory of a call whose hook was not called yet"
