# SPDX-License-Identifier: Apache-2.0
"""A world for a part of a run: if one rank fails in it, all leave it, and go on to the next part together."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moegen.errors import WorldError
from moegen.runtime.memory import SymmetricMemory
from moegen.runtime.worlds import RankWorld

log = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True)
class Left:
    """What a rank that has left the part puts in the place of values to be exchanged.

    Attributes:
        error: why; "" if its part is done.
        followed: it has left because another had.
    """

    error: str
    followed: bool = False


class LeftError(WorldError):
    """Another rank has left the part: this one need not look for a cause of its own."""


class PartWorld(RankWorld):
    """The same ranks; exchanges notice that a rank has left.

    Whoever leaves, with an error or without, calls `settle`, which takes part in the others' exchanges until they have
    left too. A rank that waits in a kernel for one that has left ends when its timeout does.
    """

    def __init__(self, world: RankWorld) -> None:
        self._world = world
        self.rank, self.size, self.device = world.rank, world.size, world.device
        self.ranks_per_device, self.description = world.ranks_per_device, world.description
        self.timeout = world.timeout

    def within(self, timeout: float) -> PartWorld:
        return PartWorld(self._world.within(timeout))

    def exchange(self, value: Any, what: str = "values", more_seconds: float = 0.0) -> list[Any]:
        answers = self._world.exchange(value, what, more_seconds)
        for rank, answer in enumerate(answers):
            if isinstance(answer, Left):
                raise LeftError(f"rank {rank} has left: {answer.error or 'it was done'}")
        return answers

    def all_to_all(
        self, output: torch.Tensor, given: torch.Tensor, sizes: tuple[Sequence[int], Sequence[int]] | None = None
    ) -> None:
        self._world.all_to_all(output, given, sizes)

    def raise_if_ranks_are_gone(self) -> None:
        self._world.raise_if_ranks_are_gone()

    def allocate(self, size: int) -> SymmetricMemory:
        self.barrier()  # who has left is noticed here, and not by the exchanges of values that follow
        return self._world.allocate(size)

    def settle(self, left: Left) -> list[Left]:
        """Waits until every rank has left the part, and gives what each has left with, by rank. Collective."""
        while True:
            answers = self._world.exchange(left)
            if all(isinstance(answer, Left) for answer in answers):
                return answers


def run_part(world: RankWorld, name: str, step: Callable[[PartWorld], Json | None]) -> Json:
    """One part; all ranks leave it together, also if it fails on one of them. Collective.

    Returns:
        `seconds`; `errors`: one text for each rank that did not just follow another; `result`: of `step`, or None.
    """
    start = time.monotonic()
    within = PartWorld(world)
    result: Json | None = None
    leaves = Left("")
    try:
        result = step(within)
    except Exception as error:  # whatever it was, the other parts are measured all the same
        log.info("rank %d: part %s failed", world.rank, name, exc_info=True)
        leaves = Left(f"{type(error).__name__}: {error}", isinstance(error, LeftError))
    answers = within.settle(leaves)
    failed = [(rank, left) for rank, left in enumerate(answers) if left.error]
    causes = [(rank, left) for rank, left in failed if not left.followed] or failed
    errors = [f"rank {rank}: {left.error}" for rank, left in causes]
    _give_memory_back(world)
    if world.rank == 0:
        log.info("part %s: %.1f s%s", name, time.monotonic() - start, ", failed" if errors else "")
    return {"seconds": time.monotonic() - start, "errors": errors, "result": None if errors else result}


def _give_memory_back(world: RankWorld) -> None:
    gc.collect()  # an error's frames hold the part's tensors
    # The driver frees memory when the device is idle, and virtual ranks' kernels of the next part wait for each other.
    if world.device.type == "cuda" and world.ranks_per_device == 1:
        torch.cuda.empty_cache()
