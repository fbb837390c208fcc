# SPDX-License-Identifier: Apache-2.0
"""How ranks that may be missing show that they are alive: the host half of `templates/device/masked_signal.cuh`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from moegen.runtime.memory import SymmetricMemory
from moegen.runtime.worlds import RankWorld

LEFT_OUT_BYTES = 16
"""Of a rank's verdict for one (slot, op): the ranks that it has left out, and the epoch from which that is valid."""

_BEAT_BYTES = 256
_HEARD_WORDS = 4


class Liveness:
    """One rank's beat, as every rank maps it. A rank that waits in a call of one object is alive for the calls of all
    others: the objects of a group share it, and it lives as long as the group.

    Attributes:
        memory: symmetric; the beat is its first word.
    """

    def __init__(self, world: RankWorld) -> None:
        """Collective."""
        self.memory = world.allocate(_BEAT_BYTES)
        self._heard = torch.zeros(world.size, _HEARD_WORDS, dtype=torch.int32, device=world.device)
        self._device = world.device

    def table(self, memory: SymmetricMemory, left_out_offset: int, failure: int) -> torch.Tensor:
        """The struct Liveness and its arrays, int64 on the device.

        Args:
            memory: of the object.
            left_out_offset: where in it each rank publishes its verdicts of this op.
            failure: address of the kernel's struct Failure.
        """
        ranks, header = len(memory.peers), 4
        words = torch.empty(header + 2 * ranks, dtype=torch.int64, device=self._device)
        arrays = words.data_ptr() + header * words.element_size()
        pointers = (failure, self._heard.data_ptr(), arrays, arrays + ranks * words.element_size())
        verdicts = [address + left_out_offset for address in memory.peers]
        words.copy_(_int64((*pointers, *self.memory.peers, *verdicts)))
        return words


def liveness_of(world: RankWorld) -> Liveness:
    """That of the world's group, made for its first object whose ranks may be missing. Collective: all ranks make the
    same objects in the same order.
    """
    made = _made.get(world.group)
    if made is None:
        made = _made[world.group] = Liveness(world)
    return made


_made: weakref.WeakKeyDictionary[object, Liveness] = weakref.WeakKeyDictionary()


def _int64(words: Sequence[int]) -> torch.Tensor:
    return torch.tensor(words, dtype=torch.int64, device="cpu")
