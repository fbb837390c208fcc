# SPDX-License-Identifier: Apache-2.0
"""The link's limit: every rank writes to every other, reads from every other, copies to every other, all at once.

Virtual ranks on one device measure its memory instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

from moegen.bench.config import LinkConfig
from moegen.bench.failure import BenchError
from moegen.bench.stats import gigabytes_per_second, median_of_slowest
from moegen.bench.timing import OpClock, Recording, meet, synchronize, time_replays
from moegen.kernels.bench import VECTOR_BYTES, BenchPull, BenchPush
from moegen.runtime.bound import BoundKernel
from moegen.runtime.kernel import load
from moegen.runtime.worlds import RankWorld


class LinkProbe:
    """One rank's end of the measurement. Collective to make."""

    def __init__(self, world: RankWorld, config: LinkConfig) -> None:
        peers = max(world.size - 1, 1)
        self._world = world
        self.vectors = max(config.bytes // peers // VECTOR_BYTES, 1)
        self.bytes = self.vectors * VECTOR_BYTES * peers
        self.destinations = [(world.rank + 1 + step) % world.size for step in range(peers)]
        sizes = (world.size, config.threads, config.in_flight)
        self.push_spec, self.pull_spec = BenchPush(*sizes), BenchPull(*sizes)
        kernels = [load(spec, world.device) for spec in (self.push_spec, self.pull_spec)]
        self.blocks = min(config.blocks, *(kernel.blocks(1, None) for kernel in kernels))
        self._memory = world.allocate(world.size * self.vectors * VECTOR_BYTES)
        self._source = torch.zeros(self.vectors * 4, dtype=torch.int32, device=world.device)
        self._sums = torch.zeros(self.blocks * config.threads, 4, dtype=torch.int32, device=world.device)
        fixed: dict[str, int | Sequence[int]] = {
            "peers": self._memory.peers,
            "inbox_offset": 0,
            "vectors": self.vectors,
            "rank": world.rank,
        }
        self.push = BoundKernel(kernels[0], self.push_spec.params, self.blocks, fixed, ())
        self.pull = BoundKernel(
            kernels[1], self.pull_spec.params, self.blocks, {**fixed, "sums": self._sums.data_ptr()}, ()
        )
        self._copy = _copier(world.device)
        meet(world)

    def copy(self) -> None:
        """This rank's buffer to every other rank, by the copy engine."""
        size = self.vectors * VECTOR_BYTES
        for peer in self.destinations:
            self._copy(self._memory.peers[peer] + self._world.rank * size, self._source.data_ptr(), size)

    def pattern(self, source: int, destination: int) -> torch.Tensor:
        """What push writes: int32 [vectors, 4]."""
        index = torch.arange(self.vectors, dtype=torch.int32, device=self._world.device)
        return torch.stack((index, torch.full_like(index, source), torch.full_like(index, destination), ~index), dim=1)

    def poison(self) -> None:
        """Fills this rank's inbox with what nobody writes."""
        meet(self._world)
        self._memory.local.fill_(0xA5)
        self._sums.fill_(-1)
        meet(self._world)

    def check_push(self) -> None:
        """Raises BenchError unless every other rank's pattern is in this rank's inbox."""
        self._check_inboxes("push", lambda source: self.pattern(source, self._world.rank))

    def check_copy(self) -> None:
        """Raises BenchError unless every other rank's buffer is in this rank's inbox."""
        self._check_inboxes("copy", lambda source: torch.full_like(self.pattern(0, 0), source + 1))

    def check_pull(self) -> None:
        """Raises BenchError unless pull added up what this rank had pushed to the others."""
        meet(self._world)
        wanted = sum(self.pattern(self._world.rank, peer).long().sum(dim=0) for peer in self.destinations)
        found = self._sums.long().sum(dim=0)
        if not bool(((found - wanted) % 2**32 == 0).all()):
            raise BenchError(f"rank {self._world.rank}: pull read something else than what was pushed")

    def fill_source(self) -> None:
        """Makes this rank's copies tell where they come from."""
        self._source.fill_(self._world.rank + 1)

    def destroy(self) -> None:
        self._memory.release()

    def _check_inboxes(self, what: str, wanted: Callable[[int], torch.Tensor]) -> None:
        meet(self._world)
        inboxes = self._memory.local.view(torch.int32).view(self._world.size, self.vectors, 4)
        for source in self.destinations:
            if not torch.equal(inboxes[source], wanted(source)):
                raise BenchError(f"rank {self._world.rank}: the {what} from rank {source} did not arrive whole")


def measure_link(world: RankWorld, barrier: Callable[[], object], config: LinkConfig) -> dict[str, Any]:
    """GB/s per direction of push, pull and copies, all ranks at once. Collective; the same on every rank.

    Push and pull are timed like ops; copies are enqueued one by one, without a graph and without a barrier.

    Returns:
        `gbps`: of a rank, over the slowest rank's time; `gbps_of_ranks`: each over its own; `gbps_aggregate`: of all
        together.
    """
    probe = LinkProbe(world, config)
    clock = OpClock(world, barrier, config.ops, config.replays)
    probe.poison()
    pushes = clock.record([probe.push] * config.ops)
    pulls = clock.record([probe.pull] * config.ops)
    push_us, _ = clock.time(pushes)
    probe.check_push()
    pull_us, _ = clock.time(pulls)
    probe.check_pull()
    probe.fill_source()
    probe.poison()
    copies = Recording([probe.copy] * config.ops)
    copy_us = [us / config.ops for us in time_replays(world, copies, config.replays)]
    probe.check_copy()
    answers = world.exchange({"push": push_us, "pull": pull_us, "copy": copy_us})
    synchronize(world)
    world.barrier()
    probe.destroy()
    times = {name: [answer[name] for answer in answers] for name in answers[0]}
    microseconds = {name: median_of_slowest(of_ranks) for name, of_ranks in times.items()}
    gbps = {name: gigabytes_per_second(probe.bytes, us) for name, us in microseconds.items()}
    one_per_gpu = world.device.type == "cuda" and world.ranks_per_device == 1
    return {
        "what": "link" if one_per_gpu else "memory that the ranks share: no link",
        "bytes_per_rank": probe.bytes,
        "blocks": probe.blocks,
        "threads": config.threads,
        "gbps": gbps,
        "gbps_of_ranks": {
            name: [gigabytes_per_second(probe.bytes, median(own)) for own in of_ranks]
            for name, of_ranks in times.items()
        },
        "gbps_aggregate": {name: world.size * value for name, value in gbps.items()},
        "us": microseconds,
        "stems": [probe.push_spec.stem, probe.pull_spec.stem],
    }


def _copier(device: torch.device) -> Callable[[int, int, int], None]:
    """A function (to, from, bytes) that copies on the current stream, or at once on a CPU."""
    if device.type != "cuda":
        return _copy_now
    from cuda.bindings import driver

    def copy(to: int, source: int, size: int) -> None:
        (status,) = driver.cuMemcpyAsync(to, source, size, torch.cuda.current_stream(device).cuda_stream)
        if status:
            raise BenchError(f"a copy to a peer was refused: {status.name}")

    return copy


def _copy_now(to: int, source: int, size: int) -> None:
    ctypes.memmove(to, source, size)
