# SPDX-License-Identifier: Apache-2.0
"""What ranks set up through: FlashInfer's communicator hooks, a torch process group, or a rank_world."""

from __future__ import annotations

import pickle
from collections.abc import Hashable
from typing import Any, Protocol, runtime_checkable

import torch

from moegen.compat import groups
from moegen.compat.flashinfer.checks import CallError
from moegen.errors import UnsupportedPlatformError
from moegen.runtime.group_exchange import exchange_in_group
from moegen.runtime.memory import SymmetricMemory, share_between_gpus, share_between_processes
from moegen.runtime.waiting import SETUP_SECONDS
from moegen.runtime.worlds import DEFAULT_TIMEOUT, LocalWorld, RankWorld, as_rank_world


@runtime_checkable
class CommBackend(Protocol):
    """FlashInfer's hooks. moegen calls `Get_rank`, `Get_size`, `allgather` (of bytes) and, if it is there, `Split`."""

    def Get_rank(self) -> int: ...  # noqa: N802

    def Get_size(self) -> int: ...  # noqa: N802

    def allgather(self, data: Any) -> Any:
        """Every rank's `data`, in rank order."""

    def bcast(self, data: Any, root: int) -> Any: ...

    def barrier(self) -> None: ...

    def Split(self, color: int, key: int) -> CommBackend:  # noqa: N802
        """The ranks that gave the same color, in the order of their keys."""


class TorchDistBackend:
    """The hooks of a torch process group; None: the default one. A group may also be given as it is."""

    def __init__(self, group: Any = None) -> None:
        import torch.distributed as dist

        if not dist.is_initialized():
            raise CallError("TorchDistBackend needs torch.distributed.init_process_group first")
        self._group: Any = group if group is not None else dist.group.WORLD
        self._dist = dist

    def Get_rank(self) -> int:  # noqa: N802
        return int(self._dist.get_rank(self._group))

    def Get_size(self) -> int:  # noqa: N802
        return int(self._dist.get_world_size(self._group))

    def allgather(self, data: Any, seconds: float = DEFAULT_TIMEOUT, what: str = "values") -> tuple[Any, ...]:
        return tuple(exchange_in_group(self._group, data, what, seconds))

    def bcast(self, data: Any, root: int) -> Any:
        """`root`: a rank of this group."""
        values = [data]
        source = self._dist.get_global_rank(self._group, root)
        self._dist.broadcast_object_list(values, src=source, group=self._group)
        return values[0]

    def barrier(self) -> None:
        self._dist.barrier(group=self._group)

    def Split(self, color: int, key: int) -> TorchDistBackend:  # noqa: N802
        """Collective. The ranks of the same color keep their order, whatever their keys."""
        answers = self.allgather((color, self._dist.get_rank()))
        members = [rank for other, rank in answers if other == color]
        if len(members) == len(answers):
            return TorchDistBackend(self._group)
        return TorchDistBackend(self._dist.new_group(members, use_local_synchronization=True))


class BackendWorld(RankWorld):
    """The ranks of such hooks, one process each.

    Args:
        backend: the hooks. For GPUs it has an attribute `_group`, the torch process group, as all known ones have; or
            the default group has the same ranks.
        device: where this rank's tensors are.
    """

    def __init__(self, backend: Any, device: torch.device) -> None:
        self._backend = backend
        self.rank, self.size = int(backend.Get_rank()), int(backend.Get_size())
        self.device = device
        self.ranks_per_device = 1
        if device.type == "cuda":  # by its identity: every process may call its GPU cuda:0
            gpus = self.exchange(str(torch.cuda.get_device_properties(device).uuid))
            self.ranks_per_device = gpus.count(gpus[self.rank])
        self.description = f"{self.size} processes on {device.type}, by {type(backend).__name__}"

    def exchange(self, value: Any, what: str = "values", more_seconds: float = 0.0) -> list[Any]:
        """As bytes: some hooks gather nothing else. Those of others have deadlines of their own, or none."""
        if isinstance(self._backend, TorchDistBackend):
            return list(self._backend.allgather(value, self.patience(more_seconds), what))
        return [pickle.loads(answer) for answer in self._backend.allgather(pickle.dumps(value))]

    def allocate(self, size: int) -> SymmetricMemory:
        if self.device.type == "cpu":
            return share_between_processes(size, self.rank, self.exchange)
        seconds = self.patience(SETUP_SECONDS)
        memory = share_between_gpus(size, self._torch_group(), self.device, self.exchange, seconds)
        torch.cuda.synchronize(self.device)
        return memory

    def _torch_group(self) -> Any:
        import torch.distributed as dist

        group = getattr(self._backend, "_group", None)
        if dist.is_initialized():
            group = dist.group.WORLD if group is None else group
            if (dist.get_rank(group), dist.get_world_size(group)) == (self.rank, self.size):
                return group
        raise UnsupportedPlatformError(
            f"GPUs' memory is mapped through a torch process group, and {type(self._backend).__name__} has none: call "
            "torch.distributed.init_process_group (gloo will do) for the same ranks, or give MnnvlConfig a group"
        )


def is_backend(communicator: Any) -> bool:
    return hasattr(communicator, "Get_rank")


def rank_and_size(communicator: Any, ep_size: int = 0) -> tuple[int, int]:
    """Of hooks, a group or a rank_world; None: of the default group. A rank alone needs none of them."""
    if ep_size == 1 or (communicator is None and not _default_group_is_there()):
        return 0, 1
    if is_backend(communicator):
        return int(communicator.Get_rank()), int(communicator.Get_size())
    return groups.rank_and_size(communicator)


def identity(communicator: Any) -> Hashable:
    """The same for the same ranks: frameworks make new hooks, and those new groups, for each layer."""
    if isinstance(communicator, RankWorld):
        return id(communicator)
    group = getattr(communicator, "_group", None) if is_backend(communicator) else communicator
    if not _default_group_is_there():
        return "alone" if communicator is None else "hooks"
    import torch.distributed as dist

    return tuple(dist.get_process_group_ranks(group))


def usual_device(communicator: Any) -> torch.device:
    """Where tensors are that are made before any call."""
    return groups.usual_device(communicator)


def as_world(communicator: Any, ep_size: int, device: torch.device) -> RankWorld:
    """The world for tensors on `device`; on GPUs that is collective."""
    if ep_size == 1:
        given = isinstance(communicator, RankWorld) and communicator.size == 1
        return communicator if given else LocalWorld(1, device).ranks[0]
    return BackendWorld(communicator, device) if is_backend(communicator) else as_rank_world(communicator, device)


def _default_group_is_there() -> bool:
    import torch.distributed as dist

    return bool(dist.is_available() and dist.is_initialized())
