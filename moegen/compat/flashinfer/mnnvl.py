# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's `MnnvlMemory` and its configuration: how users of the functional calls get a workspace."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch

from moegen.compat.flashinfer import communicators
from moegen.compat.flashinfer.checks import CallError
from moegen.compat.flashinfer.communicators import CommBackend, TorchDistBackend
from moegen.compat.flashinfer.workspace import Workspace
from moegen.runtime.ownership import ProcessBound, lasting

__all__ = ["CommBackend", "MnnvlConfig", "MnnvlMemory", "TorchDistBackend"]


@dataclass
class MnnvlConfig:
    """How ranks find each other.

    Attributes:
        comm_backend: FlashInfer's communicator hooks (see `CommBackend`), a torch process group (gloo or nccl), or the
            rank_world that `LocalWorld.run` gives; None: the default group, or a rank alone.
        allocation_granularity, fabric_page_size: ignored.
    """

    comm_backend: Any = None
    allocation_granularity: int = 0
    fabric_page_size: int = 1 << 29


_set = threading.local()
"""Each thread's communicator, because a thread may be a rank; the newest of any thread's serves the others."""
_newest: list[Any] = []


class MnnvlMemory(ProcessBound):
    """A workspace that ranks have together. It ends when this object and the metainfo tensors made for it are gone.

    Args:
        mapping: has `moe_ep_rank` and `moe_ep_size`; without them rank and size are the communicator's.
        size: bytes of a rank's row.

    Attributes:
        mapped: whether `destroy` was not called.
        rank_stride: 0: all rows of the tensor are this rank's own.
    """

    initialized = False
    rank_stride = 0

    def __init__(self, mapping: Any, size: int) -> None:
        self.mapping, self.segment_size, self.mapped = mapping, size, True
        communicator = MnnvlMemory.get_comm(mapping)
        rank, ranks = communicators.rank_and_size(communicator)
        rank, ranks = getattr(mapping, "moe_ep_rank", rank), getattr(mapping, "moe_ep_size", ranks)
        self.workspace = Workspace(communicator, rank, ranks, size)

    @staticmethod
    def initialize() -> None:
        """Nothing to do."""
        MnnvlMemory.initialized = True

    @staticmethod
    def set_comm_from_config(mapping: Any, config: MnnvlConfig | None = None) -> None:
        """Says what `MnnvlMemory` takes from now on; collective if the hooks' `Split` is."""
        _set.communicator = communicator(mapping, config)
        _newest[:] = [_set.communicator]

    @staticmethod
    def get_comm(mapping: Any) -> Any:
        """What was set; None if nothing was."""
        return getattr(_set, "communicator", _newest[0] if _newest else None)

    @property
    def ptr(self) -> int:
        return self.workspace.tensor.data_ptr()

    @lasting()
    def as_torch_strided_tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """[ranks, size in elements]."""
        if not self.mapped:
            raise CallError("this MnnvlMemory was destroyed; make a new one")
        return self.workspace.row.view(dtype).expand(self.workspace.ep_size, -1)

    def destroy(self) -> None:
        """Not FlashInfer's: gives the objects' memory back now. Not collective."""
        self.mapped = False
        self.workspace.destroy()


def communicator(mapping: Any, config: Any) -> Any:
    """The one of a configuration (or of what was given in its place), split as the mapping says if it can be."""
    given = getattr(config, "comm_backend", config)
    if not communicators.is_backend(given) or not hasattr(given, "Split"):
        return given
    pipeline, context = getattr(mapping, "pp_rank", 0), getattr(mapping, "cp_rank", 0)
    color = pipeline * getattr(mapping, "cp_size", 1) + context
    return given.Split(color, getattr(mapping, "tp_rank", given.Get_rank()))
