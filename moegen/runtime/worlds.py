# SPDX-License-Identifier: Apache-2.0
"""Worlds: ranks that see each other's memory. Kernels get base pointers and never learn which world they are in."""

from __future__ import annotations

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from moegen.errors import CapacityError, InputError, UnsupportedPlatformError
from moegen.kernels.integers import as_int
from moegen.runtime.group_exchange import exchange_in_group
from moegen.runtime.memory import SymmetricMemory, raise_first, share_between_gpus, share_between_processes
from moegen.runtime.ownership import ProcessBound
from moegen.runtime.streams import wait_for_stream
from moegen.runtime.tensor_exchange import TensorExchange
from moegen.runtime.thread_gather import OtherRankFailedError, ThreadGather
from moegen.runtime.waiting import LEAST_SECONDS, SETUP_SECONDS, pointless_if

if TYPE_CHECKING:
    from typing_extensions import Self

log = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_TIMEOUT = 1800.0
"""Seconds that exchanges wait for ranks, where no object says how long; torch's own default for gloo."""

MAX_LOCAL_RANKS = 1024
"""Of one process: each is a thread. It is more than any kernel is for, whose Specs say how many that is."""

DEFAULT_CONNECTIONS = 8
MAX_CONNECTIONS = 32
"""Hardware queues per CUDA context without and with CUDA_DEVICE_MAX_CONNECTIONS at its most: streams beyond that
share a queue, and kernels that wait for each other in one queue wait for ever."""


class RankWorld(ProcessBound, ABC):
    """One rank's end of a world.

    Attributes:
        rank: 0..size-1.
        size: number of ranks.
        device: where this rank's tensors are.
        ranks_per_device: how many ranks share that device's multiprocessors.
        description: for the log, e.g. "4 virtual ranks on cpu".
        timeout: seconds that what ranks do together between their hosts waits for the last of them.
    """

    rank: int
    size: int
    device: torch.device
    ranks_per_device: int
    description: str
    timeout: float = DEFAULT_TIMEOUT

    def within(self, timeout: float) -> Self:
        """The same end of the same world, with another timeout."""
        other = object.__new__(type(self))  # no copy: worlds refuse to be copied
        other.__dict__.update(self.__dict__)
        other.timeout = timeout
        return other

    def patience(self, more_seconds: float = 0.0) -> float:
        """Seconds that an exchange may take."""
        return max(self.timeout, LEAST_SECONDS) + more_seconds

    @abstractmethod
    def exchange(self, value: Any, what: str = "values", more_seconds: float = 0.0) -> list[Any]:
        """Every rank's `value`, in rank order. Collective.

        Args:
            what: what is exchanged, for the error.
            more_seconds: what a rank may be later than the timeout.

        Raises:
            MissingRanksError: ranks did not come in time, or have ended.
            WorldError: a rank has failed, or an exchange has before.
        """

    @abstractmethod
    def allocate(self, size: int) -> SymmetricMemory:
        """`size` bytes on every rank, zeroed and mapped into all. Collective."""

    def all_to_all(
        self, output: torch.Tensor, given: torch.Tensor, sizes: tuple[Sequence[int], Sequence[int]] | None = None
    ) -> None:
        """Sends the r-th part of `given` to rank r and leaves what rank r has sent to this one in the r-th part of
        `output`: both contiguous. Collective, on the current stream.

        Args:
            sizes: elements of the parts of `output`, and of those of `given`, by rank. None: parts are equal, and have
                the same size on all ranks.

        Raises:
            UnsupportedPlatformError: the ranks have no way to.
            MissingRanksError: ranks did not come in time, or have ended.
        """
        raise UnsupportedPlatformError(f"{self.description} exchange no tensors: path collective needs a process group")

    def raise_if_ranks_are_gone(self) -> None:
        """Raises MissingRanksError if an `all_to_all` is not over because the processes of ranks have ended."""
        return

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.exchange(None, "nothing: a barrier")

    @property
    def group(self) -> object:
        """The same object for every world of the same ranks: what they share for good hangs on it."""
        return self


_READY_BYTES, _READY_SMALL_BYTES, _READY_SMALL_BLOCKS = 64 << 20, 1 << 20, 16
"""Per virtual rank on a GPU; torch keeps blocks of up to a MiB apart."""


class LocalWorld(ProcessBound):
    """`num_ranks` virtual ranks in one process, each a thread (and a stream, on a GPU): for tests, demos, debugging.

    Args:
        num_ranks: 1 to 1,024; kernels are for up to 64. On a GPU at most 8, or 32 if CUDA_DEVICE_MAX_CONNECTIONS=32 was
            set before CUDA started (it is set here if CUDA has not started yet). Up to 16 are tested on a GPU.
        device: "cpu", "cuda" or "cuda:N"; all ranks share it.

    Raises:
        InputError: a number of ranks that the device cannot hold.
    """

    def __init__(self, num_ranks: int, device: str | torch.device = "cpu") -> None:
        self.device = _without_cpu_index(torch.device(device))
        number = as_int(num_ranks)
        if number is None or not 1 <= number <= MAX_LOCAL_RANKS:
            raise InputError(f"num_ranks is an integer in 1..{MAX_LOCAL_RANKS}; got {num_ranks!r}")
        self.size = num_ranks = number
        if self.device.type == "cuda":
            self.device = _cuda_device_for_many_streams(self.device, num_ranks)
        self._gather = ThreadGather(num_ranks)
        self.ranks = tuple(LocalRank(self, rank) for rank in range(num_ranks))

    def run(self, fn: Callable[..., T], *args: Any) -> list[T]:
        """Calls `fn(rank_world, *args)` in one thread per rank; returns what they return, in rank order.

        Raises:
            BaseException: the first error of any rank. The other ranks are waited for: what waits in an exchange or in
                a kernel on the host then ends at once, and what waits in one on a GPU when its timeout does.
        """
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []
        self._gather.reset()

        def work(rank: LocalRank) -> None:
            try:
                with rank.stream_context(), pointless_if(self._gather.raise_if_failed):
                    results[rank.rank] = fn(rank, *args)
                self._gather.end(rank.rank)
            except BaseException as error:
                errors.append(error)
                self._gather.fail(f"rank {rank.rank} had failed ({type(error).__name__})")

        threads = [threading.Thread(target=work, args=(rank,), name=f"moegen-rank-{rank.rank}") for rank in self.ranks]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C, most likely
            self._gather.fail(f"LocalWorld.run was interrupted ({type(error).__name__})")
            for thread in threads:
                thread.join()
            raise
        self._gather.reset()
        if errors:
            raise next((error for error in errors if not isinstance(error, OtherRankFailedError)), errors[0])
        return results


class LocalRank(RankWorld):
    """A virtual rank of a LocalWorld; goes wherever a process group goes."""

    def __init__(self, world: LocalWorld, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.size = world.size
        self.device = world.device
        self.ranks_per_device = world.size if world.device.type == "cuda" else 1
        self.description = f"{world.size} virtual ranks on {world.device}"
        self._stream = _new_stream(world.device)
        if self._stream is not None and world.size > 1:
            with self.stream_context():
                _keep_memory_ready(world.device)

    @property
    def group(self) -> object:
        return self._world.ranks[self.rank]

    def stream_context(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def exchange(self, value: Any, what: str = "values", more_seconds: float = 0.0) -> list[Any]:
        return self._world._gather(self.rank, value, what, self.patience(more_seconds))

    def all_to_all(
        self, output: torch.Tensor, given: torch.Tensor, sizes: tuple[Sequence[int], Sequence[int]] | None = None
    ) -> None:
        # Calls may run on another stream than this rank's own (async_finish).
        wait_for_stream(self.device)  # the parts are made, and others may copy theirs
        came, parts = (
            (whole.view(self.size, -1) if sizes is None else whole.split(list(sizes[side])))
            for side, whole in enumerate((output, given))
        )
        for part, of_source in zip(came, self.exchange(parts, "tensors"), strict=True):
            part.copy_(of_source[self.rank])
        wait_for_stream(self.device)  # before their ranks write to them again
        self.barrier()

    def allocate(self, size: int) -> SymmetricMemory:
        failed, local = "", torch.empty(0, dtype=torch.uint8, device="cpu")
        try:
            local = torch.zeros(size, dtype=torch.uint8, device=self.device)
        except RuntimeError:
            failed = f"no room for {size:,} bytes of symmetric memory per rank on {self.device}"
        wait_for_stream(self.device)
        answers = self.exchange((local, failed), "memory", SETUP_SECONDS)
        raise_first(CapacityError, [failure for _, failure in answers])
        kept = [buffer for buffer, _ in answers]  # a peer's memory outlives the peer
        return SymmetricMemory(local, tuple(buffer.data_ptr() for buffer in kept), release=kept.clear)


class GroupWorld(RankWorld):
    """The ranks of a torch process group, one process each. The group may be gloo or nccl: only its store (without one,
    an object collective) and, on GPUs, its name are used, and on path collective its all-to-all.

    Args:
        group: a `torch.distributed.ProcessGroup`; None is the default group.
        device: where this rank's tensors are; by default the current GPU if there is one, else the CPU.
        timeout: see RankWorld.
    """

    def __init__(
        self, group: Any = None, device: str | torch.device | None = None, timeout: float = DEFAULT_TIMEOUT
    ) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            raise InputError("GroupWorld needs torch.distributed.init_process_group first; or use LocalWorld")
        self._dist, self.timeout = dist, timeout
        self._group = group if group is not None else dist.group.WORLD
        self.rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)
        self.device = _default_device() if device is None else _without_cpu_index(torch.device(device))
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._tensors = TensorExchange(self._group, self.rank, self.device)
        self.ranks_per_device = 1
        if (
            self.device.type == "cuda"
        ):  # by its identity: with CUDA_VISIBLE_DEVICES every process may call its GPU cuda:0
            gpus = self.exchange(str(torch.cuda.get_device_properties(self.device).uuid), "the names of GPUs")
            self.ranks_per_device = gpus.count(gpus[self.rank])
        self.description = f"{self.size} processes on {self.device.type}"

    @property
    def group(self) -> object:
        return self._group

    def exchange(self, value: Any, what: str = "values", more_seconds: float = 0.0) -> list[Any]:
        return exchange_in_group(self._group, value, what, self.patience(more_seconds))

    def all_to_all(
        self, output: torch.Tensor, given: torch.Tensor, sizes: tuple[Sequence[int], Sequence[int]] | None = None
    ) -> None:
        self._tensors(output, given, sizes, self.patience())

    def raise_if_ranks_are_gone(self) -> None:
        self._tensors.raise_if_ranks_are_gone()

    def allocate(self, size: int) -> SymmetricMemory:
        if self.device.type == "cuda":
            memory = share_between_gpus(size, self._group, self.device, self.exchange, self.patience(SETUP_SECONDS))
            torch.cuda.synchronize(self.device)
            return memory
        return share_between_processes(size, self.rank, self.exchange)


def as_rank_world(
    group_or_world: Any, device: str | torch.device | None = None, timeout: float | None = None
) -> RankWorld:
    """A rank's world from what users hold: a rank_world, or a torch process group (None: the default one).

    Args:
        timeout: of exchanges; None: that of the rank_world, or the usual one.

    Raises:
        InputError: it is neither, or a whole LocalWorld was given.
    """
    if isinstance(group_or_world, RankWorld):
        return group_or_world if timeout is None else group_or_world.within(timeout)
    if isinstance(group_or_world, LocalWorld):
        raise InputError("give the rank_world that LocalWorld.run passes to your function, not the LocalWorld itself")
    if group_or_world is None or hasattr(group_or_world, "rank"):
        return GroupWorld(group_or_world, device, DEFAULT_TIMEOUT if timeout is None else timeout)
    raise InputError(f"expected a torch process group or a moegen world; got {type(group_or_world).__name__}")


def _new_stream(device: torch.device) -> Any:
    stream_type: Any = torch.cuda.Stream
    return stream_type(device) if device.type == "cuda" else None


def _keep_memory_ready(device: torch.device) -> None:
    """Leaves some memory with torch's allocator, for the current stream. Asking the driver for more may wait for all
    kernels that run, and those of the other virtual ranks may wait for this rank.
    """
    sizes = [_READY_SMALL_BYTES] * _READY_SMALL_BLOCKS + [_READY_BYTES]
    kept = [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
    kept.clear()


def _without_cpu_index(device: torch.device) -> torch.device:
    """There is one CPU, and its tensors say "cpu"."""
    return torch.device("cpu") if device.type == "cpu" else device


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _cuda_device_for_many_streams(device: torch.device, num_ranks: int) -> torch.device:
    variable = "CUDA_DEVICE_MAX_CONNECTIONS"
    cuda: Any = torch.cuda
    if not cuda.is_initialized():
        os.environ.setdefault(variable, str(MAX_CONNECTIONS))
        # A kernel that is loaded when it is first used waits for all running ones, which may wait for its rank.
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    connections = int(os.environ.get(variable, DEFAULT_CONNECTIONS))
    if num_ranks > connections:
        raise InputError(
            f"{num_ranks} virtual ranks need as many hardware queues, and this process has {connections}: set "
            f"{variable}={MAX_CONNECTIONS} before anything touches CUDA (at most {MAX_CONNECTIONS} ranks on one GPU)"
        )
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
