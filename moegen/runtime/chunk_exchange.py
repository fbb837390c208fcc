# SPDX-License-Identifier: Apache-2.0
"""A call of path collective: a kernel that fills chunks, an all-to-all, a kernel that reads what came."""

from __future__ import annotations

import copy
import logging
import secrets
from collections.abc import Sequence
from typing import cast

import torch

from moegen.errors import CapacityError
from moegen.kernels.coll_rows import (
    Chunks,
    CollectivePlace,
    CollectiveReduce,
    CollectiveReturn,
    CollectiveSend,
    chunks,
)
from moegen.kernels.problem import Problem
from moegen.runtime.bound import BoundKernel, signed
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.memory import SymmetricMemory
from moegen.runtime.stages import Stages
from moegen.runtime.streams import StreamOrder
from moegen.runtime.watchdog import Watchdog
from moegen.runtime.worlds import RankWorld

log = logging.getLogger(__name__)

_CONTROL_WORDS = 32
_LAST_STAGE = {"combine": "reduce"}

Chunked = CollectiveSend | CollectiveReturn

RowNumbers = tuple[Sequence[int], Sequence[int]]
"""Rows that this rank sends to each other one, and rows that come from each."""

Launch = tuple[Chunked, tuple[int, ...]]
"""A kernel, and its parameters behind those that say where chunks lie."""


class ChunkExchange:
    """The chunks of one rank's object and the kernels around them. Collective to make.

    Nothing of one rank's is mapped into another: `memory` is this rank's, [chunks to send][chunks that came]. Calls are
    queued behind each other, so that all use the same.
    """

    def __init__(
        self,
        world: RankWorld,
        problem: Problem,
        kernels: Sequence[LoadedKernel],
        *,
        num_sms: int | None,
        first_epoch: int,
        alignment: int = 1,
    ) -> None:
        self._world, self._num_sms, self.rank = world, num_sms, world.rank
        number = world.exchange(secrets.randbits(32))[0]  # first, while no rank can have failed
        self._kernels = {cast(Chunked, kernel.spec): (kernel, place) for place, kernel in enumerate(kernels)}
        self._padded = self._layouts(problem)
        self._half = max(layout.end for layout in self._padded.values())
        self.buffer_bytes = 2 * self._half
        log.info("rank %d allocates %s bytes for chunks", world.rank, f"{self.buffer_bytes:,}")
        try:
            local = torch.zeros(self.buffer_bytes, dtype=torch.uint8, device=world.device)
        except RuntimeError as error:
            raise CapacityError(f"no room for {self.buffer_bytes:,} bytes of chunks on {world.device}") from error
        self.memory = SymmetricMemory(local, (local.data_ptr(),))
        self._control = torch.zeros(_CONTROL_WORDS, dtype=torch.int32, device=world.device)
        self._control[0] = signed(first_epoch)
        self._watchdog = Watchdog([kernel.spec.stem for kernel in kernels], {}, 0.0, pinned=world.device.type == "cuda")
        self._fixed: dict[str, int] = {
            "control": self._control.data_ptr(),
            "object": number,
            "rank": world.rank,
            "max_tokens": problem.max_tokens,
            "alignment": alignment,
        }
        self._order = StreamOrder(world.device)
        self.stages = Stages(world.device)
        self._whole = {spec: self._parts(layout.end, layout.end) for spec, layout in self._padded.items()}
        self._bound: dict[tuple[Chunked, int | None], BoundKernel] = {}
        for spec in self._kernels:
            self._bind(spec, None)

    def for_fewer(self, problem: Problem) -> ChunkExchange:
        """The same memory for calls of at most `problem.max_tokens` per rank, whose chunks have room for no more."""
        fewer = copy.copy(self)
        fewer._padded = self._layouts(problem)
        fewer._whole = {spec: self._parts(layout.end, layout.end) for spec, layout in fewer._padded.items()}
        fewer._fixed = {**self._fixed, "max_tokens": problem.max_tokens}
        fewer._bound = {}
        return fewer

    def _layouts(self, problem: Problem) -> dict[Chunked, Chunks]:
        """Of chunks with room for as many rows as may come."""
        full = (problem.max_tokens,) * problem.num_ranks
        return {spec: chunks(spec, full) for spec in self._kernels if _fills(spec)}

    def _bind(self, spec: Chunked, num_sms: int | None) -> BoundKernel:
        """The kernel with that many blocks at most; None: with the object's number."""
        bound = self._bound.get((spec, num_sms))
        if bound is not None:
            return bound
        kernel, place = self._kernels[spec]
        blocks = kernel.blocks(1, self._num_sms if num_sms is None else num_sms)
        base = self.memory.local.data_ptr()
        members = [member.name for member in spec.params.members]
        fixed: dict[str, int | Sequence[int]] = {
            **{name: value for name, value in self._fixed.items() if name in members},
            "chunks": base if _fills(spec) else base + self._half,
            "failure": self._watchdog.address(place),
            "senders" if _fills(spec) else "receivers": (0, blocks),
        }
        varying = [name for name in members if name not in fixed]
        bound = BoundKernel(kernel, spec.params, blocks, fixed, varying)
        self._bound[spec, num_sms] = bound
        return bound

    def call(
        self, name: str, fill: Launch, read: Launch, numbers: RowNumbers | None = None, num_sms: int | None = None
    ) -> None:
        """Fills chunks, exchanges them, and reads those that came.

        Args:
            name: of what is called, for its stages.
            fill, read: the kernels, with the values of those parameters that vary and are none of the chunks', in the
                order of the struct.
            numbers: of rows. None: chunks have room for as many as may come, and nobody needs to know.
        """
        self._order.follow("calls")
        spec = fill[0]
        if numbers is None:
            sent = came = self._padded[spec]
            (parts_out, parts_in), sizes = self._whole[spec], None
        else:
            sent, came = (chunks(spec, of_side) for of_side in numbers)
            (parts_out, parts_in), sizes = self._parts(sent.end, came.end), (came.sizes, sent.sizes)
        with self.stages.stage(f"{name}_pack"):
            self._bind(spec, num_sms)(*sent.starts, sent.records_offset, *fill[1])
        with self.stages.stage(f"{name}_collective"):
            self._world.all_to_all(parts_in, parts_out, sizes)
        with self.stages.stage(f"{name}_{_LAST_STAGE.get(name, 'compact')}"):
            self._bind(read[0], num_sms)(*came.starts, came.records_offset, *read[1])

    def _parts(self, sent: int, came: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What is sent and what comes: so many bytes of this rank's memory."""
        local = self.memory.local
        return local[:sent], local[self._half : self._half + came]

    def raise_expired(self) -> None:
        self._watchdog.raise_expired()

    def raise_mismatched(self) -> None:
        self._watchdog.raise_mismatched()

    def raise_what_happened(self) -> None:
        self._watchdog.raise_what_happened()


def _fills(spec: Chunked) -> bool:
    return not isinstance(spec, (CollectivePlace, CollectiveReduce))


def of_dispatch(sources: Sequence[Sequence[int]] | None, rank: int) -> RowNumbers | None:
    """Rows of a dispatch by a plan. `sources`: the tokens of each rank and how many go to each rank; None: the host
    does not know.
    """
    if sources is None:
        return None
    return sources[rank][1:], [source[1 + rank] for source in sources]


def of_combine(sources: Sequence[Sequence[int]] | None, rank: int) -> RowNumbers | None:
    """Rows that a combine brings back: those of a dispatch the other way, but for this rank's own, which stay."""
    numbers = of_dispatch(sources, rank)
    if numbers is None:
        return None
    went, came = ([0 if at == rank else number for at, number in enumerate(side)] for side in numbers)
    return came, went
