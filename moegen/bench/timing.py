# SPDX-License-Identifier: Apache-2.0
"""How long things take: op sequences recorded as graphs and replayed between events (a GPU), or just run (a CPU)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from moegen.bench.failure import BenchError
from moegen.runtime.worlds import RankWorld

Step = Callable[[], object]

WARMUPS = {"cuda": 5, "cpu": 1}
"""Untimed replays that go before the timed ones, in the same queue."""

_capturing = threading.Lock()
"""Virtual ranks are threads of one process: one captures at a time."""


def synchronize(world: RankWorld) -> None:
    """Waits until what this rank has enqueued is done."""
    if world.device.type == "cuda":
        torch.cuda.current_stream(world.device).synchronize()


def meet(world: RankWorld) -> None:
    """Waits until all ranks have nothing enqueued any more. Collective."""
    synchronize(world)
    world.barrier()


class Recording:
    """Steps in a row. Replaying it on a CPU, or without a graph, calls them."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = tuple(steps)

    def replay(self) -> None:
        for step in self._steps:
            step()


class GraphRecording(Recording):
    """The same, captured into a CUDA graph on this rank's stream. All ranks make theirs together."""

    def __init__(self, world: RankWorld, steps: Sequence[Step]) -> None:
        super().__init__(steps)
        self._graph = torch.cuda.CUDAGraph()
        meet(world)
        stream = torch.cuda.current_stream(world.device)
        with _capturing, torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            super().replay()
        world.barrier()

    def replay(self) -> None:
        self._graph.replay()


def record(world: RankWorld, steps: Sequence[Step]) -> Recording:
    """The steps as a graph where kernels run on a GPU. Collective."""
    return GraphRecording(world, steps) if world.device.type == "cuda" else Recording(steps)


class Marks:
    """Points in time, on the device's own clock where there is one; made before the timed region."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(count)] if device.type == "cuda" else None
        self._times = [0.0] * count
        for event in self._events or ():
            event.record()  # the driver makes an event when it is first recorded

    def mark(self, index: int) -> None:
        if self._events is not None:
            self._events[index].record()
        else:
            self._times[index] = time.perf_counter()

    def microseconds(self) -> list[float]:
        """From each mark to the next; the device has reached them all."""
        if self._events is None:
            return [(b - a) * 1e6 for a, b in zip(self._times, self._times[1:])]  # noqa: B905
        return [a.elapsed_time(b) * 1e3 for a, b in zip(self._events, self._events[1:])]  # noqa: B905


def time_replays(world: RankWorld, recording: Recording, replays: int) -> list[float]:
    """Microseconds of each replay. All replays are enqueued at once, so the device never waits for the host.

    Raises:
        BenchError: memory was allocated meanwhile.
    """
    (times,) = time_in_turn(world, (recording,), replays)
    return times


def time_in_turn(world: RankWorld, recordings: Sequence[Recording], replays: int) -> list[list[float]]:
    """The same of several recordings, replayed one after the other, again and again: one list for each.

    Raises:
        BenchError: memory was allocated meanwhile.
    """
    count = len(recordings)
    marks = Marks(world.device, replays * count + 1)
    meet(world)
    before = _allocations(world.device)
    for _ in range(WARMUPS[world.device.type]):
        for recording in recordings:
            recording.replay()
    marks.mark(0)
    for index in range(replays * count):
        recordings[index % count].replay()
        marks.mark(index + 1)
    after = _allocations(world.device)
    meet(world)
    if after != before:
        raise BenchError(f"{after - before} device allocations in the timed region; there must be none")
    times = marks.microseconds()
    return [times[place::count] for place in range(count)]


class OpClock:
    """Times ops that every rank starts together, behind a barrier on the device. Collective to make and to use."""

    def __init__(self, world: RankWorld, barrier: Step, ops: int, replays: int) -> None:
        self._world = world
        self._barrier = barrier
        self._ops = ops
        self._replays = replays
        self._alone = record(world, [barrier] * ops)

    def record(self, steps: Sequence[Step]) -> Recording:
        """[barrier, step] for each of the steps."""
        return record(self._world, [part for step in steps for part in (self._barrier, step)])

    def time(self, recording: Recording) -> tuple[list[float], float]:
        """One op's microseconds in each replay, and those of one barrier, which were taken off.

        The barrier's are its median on this rank, in a recording of as many barriers and nothing else.
        """
        (times,), barrier_us = self.time_in_turn((recording,))
        return times, barrier_us

    def time_in_turn(self, recordings: Sequence[Recording]) -> tuple[list[list[float]], float]:
        """The same of recordings that are replayed one after the other: one list for each, and the barrier."""
        barrier_us = median(time_replays(self._world, self._alone, self._replays)) / self._ops
        times = time_in_turn(self._world, recordings, self._replays)
        return [[us / self._ops - barrier_us for us in own] for own in times], barrier_us


def _allocations(device: torch.device) -> int:
    """Allocations that torch has made on the device so far."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(device)["allocation.all.allocated"])
