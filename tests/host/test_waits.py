# SPDX-License-Identifier: Apache-2.0
"""Waits of the host end: with a deadline, with Ctrl-C, and once they have become pointless."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

import moegen
from moegen.errors import DestroyedError, LaunchError, MissingRanksError, WorldError
from moegen.runtime import worlds
from moegen.runtime.worlds import LocalWorld, RankWorld

LONG = 60.0
"""Seconds, of what must not be waited for."""


def make(world: RankWorld, **options: object) -> moegen.ExpertParallel:
    sizes = {"num_experts": 8, "num_topk": 2, "hidden": 64, "max_tokens_per_rank": 8}
    return moegen.ExpertParallel(world, **sizes, **{"timeout": LONG, **options})  # type: ignore[arg-type]


def dispatch(layer: moegen.ExpertParallel) -> moegen.Dispatched:
    return layer.dispatch(torch.ones(4, 64, dtype=torch.bfloat16), torch.arange(8).view(4, 2))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


@contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C after 0.3 s acts long before what is waited for times out. A shell's background jobs ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with within(LONG / 4), pytest.raises(KeyboardInterrupt):
            yield
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)


# ---- ranks that do not come -------------------------------------------------------------------------


def test_a_rank_that_has_returned_is_not_waited_for() -> None:
    def work(world: RankWorld) -> None:
        if world.rank == 1:
            return
        world.exchange("here")

    with within(1), pytest.raises(WorldError, match="rank 0 waits in an exchange for rank 1, which has returned"):
        LocalWorld(2).run(work)


def test_who_was_in_the_exchange_may_return() -> None:
    def work(world: RankWorld) -> list[int]:
        for _ in range(50):
            answers = world.exchange(world.rank)
        return answers

    assert LocalWorld(4).run(work) == [[0, 1, 2, 3]] * 4


@pytest.mark.parametrize("wait", [lambda layer: dispatch(layer), lambda layer: layer.world.barrier()])
def test_a_rank_that_fails_is_not_waited_for(wait: Callable[[moegen.ExpertParallel], object]) -> None:
    """Neither in a kernel nor in an exchange; its error is what is raised."""
    world = LocalWorld(2)
    layers = world.run(make)

    def work(rank: RankWorld) -> None:
        if rank.rank == 1:
            raise AssertionError("as tests do")
        wait(layers[0])

    with within(2), pytest.raises(AssertionError, match="as tests do"):
        world.run(work)


def test_a_late_rank_is_named_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "LEAST_SECONDS", 0.2)
    given_up = threading.Event()
    seen: list[WorldError] = []

    def work(world: RankWorld) -> None:
        if world.rank == 1:
            given_up.wait(LONG)
        try:
            make(world, timeout=0.2)
        except WorldError as error:
            seen.append(error)
        given_up.set()
        with pytest.raises(WorldError):
            world.barrier()

    LocalWorld(2).run(work)
    first, second = seen
    assert isinstance(first, MissingRanksError)
    assert (first.rank, first.missing, first.timeout) == (0, (1,), 0.2)
    assert "rank 0 waited 0.2 s for rank 1" in str(second)


# ---- Ctrl-C -----------------------------------------------------------------------------------------


def test_ctrl_c_ends_a_wait_in_a_kernel_and_the_object() -> None:
    layer, *others = LocalWorld(2).run(make)
    with interrupted():
        dispatch(layer)
    with pytest.raises(LaunchError, match="KeyboardInterrupt"):
        dispatch(layer)
    for each in (layer, *others):
        each.destroy()
    with pytest.raises(DestroyedError):
        layer.check()


@pytest.mark.parametrize("in_kernel", [True, False])
def test_ctrl_c_ends_what_virtual_ranks_wait_for(in_kernel: bool) -> None:
    world = LocalWorld(2)
    layers = world.run(make)

    def work(rank: RankWorld) -> None:
        if in_kernel and rank.rank == 0:
            dispatch(layers[0])
        elif rank.rank == 0:
            rank.exchange("here")
        else:  # neither returned nor failed
            while True:
                time.sleep(0.01)
                world._gather.raise_if_failed()

    with interrupted():
        world.run(work)


def test_ctrl_c_ends_an_exchange() -> None:
    with interrupted():
        LocalWorld(2).ranks[0].exchange("here")


def test_launches_are_whole_when_they_take_longer_than_a_slice() -> None:
    """A rank that comes late by several slices is waited for, and nothing is lost."""
    world = LocalWorld(2)
    layers = world.run(make)

    def work(rank: RankWorld) -> torch.Tensor:
        if rank.rank == 1:
            time.sleep(0.35)
        return dispatch(layers[rank.rank]).counts

    assert [counts.tolist() for counts in world.run(work)] == [[2, 2, 2, 2]] * 2
