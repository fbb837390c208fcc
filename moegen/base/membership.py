# SPDX-License-Identifier: Apache-2.0
"""What an object knows of the ranks that share it: who they are, what they hold, which of them are active."""

from __future__ import annotations

from moegen.base.lifecycle import Lifecycle, Ops
from moegen.codegen.problem import Problem
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
