# SPDX-License-Identifier: Apache-2.0
"""Family `coll` at run time: buffers of this rank's own, launches, and all-to-alls of torch.distributed in between."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from functools import lru_cache, partial

import torch

from moegen.kernels.a2a import MAX_PAYLOADS, PHASES
from moegen.kernels.a2a_layout import PLANE_ALIGNMENT, roles
from moegen.kernels.coll import (
    CHUNK_ALIGNMENT,
    MAX_HEADER_BYTES,
    CollectiveOpen,
    CollectivePack,
    CollectiveSum,
)
from moegen.kernels.ll import ceil_div
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec
from moegen.runtime.bound import BoundKernel, BoundKernels, address, signed
from moegen.runtime.chunks import Chunks
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.low_latency import FIRST_EPOCH
from moegen.runtime.memory import SymmetricMemory
from moegen.runtime.one_sided import OF_HANDLE
from moegen.runtime.streams import StreamOrder
from moegen.runtime.watchdog import Watchdog
from moegen.runtime.worlds import RankWorld

log = logging.getLogger(__name__)

_CONTROL_WORDS = 32

_KEPT_LAYOUTS = 128
"""Kinds of calls (payloads, max_tokens, statistics) whose chunks are laid out at a time."""

_VARYING: dict[type, tuple[str, ...]] = {
    CollectivePack: (
        "payloads",
        "planes",
        "topk_idx",
        "num_tokens",
        *OF_HANDLE[:3],
        "stats",
        "chunk_bytes",
        "tokens",
        "slots",
        "stats_words",
        "ids_payload",
        "id_words",
        "unused_id",
        "wide_ids",
    ),
    CollectiveOpen: ("counts", "gathered", "chunk_bytes", "slots", "stats_words"),
}


def _varying(spec: Spec) -> tuple[str, ...]:
    if isinstance(spec, CollectiveSum):
        return ("out", *(param.name for param in spec.result.params), *OF_HANDLE[:3], "tokens", "slots")
    return _VARYING[type(spec)]


def _first_bytes(memory: torch.Tensor, number: int) -> torch.Tensor:
    return memory[:number]


class CollectiveOps(BoundKernels):
    """One rank's dispatch and combine, as `moegen.runtime.one_sided.OneSidedOps`. Nothing of one rank's is mapped into
    another: `memory` is this rank's, [chunks to send][chunks that came][rows that came back].
    """

    def __init__(
        self,
        world: RankWorld,
        problem: Problem,
        *,
        payload_bytes: int,
        combine_bytes: int,
        timeout: float,
        num_sms: int | None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        super().__init__()
        self.problem = problem
        ranks, slots = problem.num_ranks, problem.max_tokens
        padding = (MAX_PAYLOADS + 1) * PLANE_ALIGNMENT + CHUNK_ALIGNMENT
        most = MAX_HEADER_BYTES + slots * payload_bytes + padding
        # Rows lie behind them, which are read by 16 bytes.
        self._chunks = ranks * ceil_div(most, CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
        rows = ranks * slots * combine_bytes
        self.buffer_bytes = 2 * self._chunks + rows
        log.info("rank %d allocates %s bytes for chunks and rows", world.rank, f"{self.buffer_bytes:,}")
        local = torch.zeros(self.buffer_bytes, dtype=torch.uint8, device=world.device)
        self.memory = SymmetricMemory(local, (local.data_ptr(),))
        self._control = torch.zeros(_CONTROL_WORDS, dtype=torch.int32, device=world.device)
        self._control[0] = signed(first_epoch)
        self._object = world.exchange(secrets.randbits(32))[0]
        self._timeout, self._num_sms, self._world = timeout, num_sms, world
        self._order = StreamOrder(world.device)
        self._expert_rows: torch.Tensor | None = None
        self._open: BoundKernel | None = None
        # Of no method of this object: it would keep itself, and its memory, alive.
        self._chunks_of = lru_cache(_KEPT_LAYOUTS)(partial(Chunks, local, local[self._chunks :], ranks))
        self._rows = lru_cache(_KEPT_LAYOUTS)(partial(_first_bytes, local[2 * self._chunks :]))

    def bind(self, kernel: LoadedKernel) -> None:
        """Makes a loaded kernel ready for launches."""
        spec, base = kernel.spec, self.memory.local.data_ptr()
        watchdog = Watchdog([spec.stem], PHASES, self._timeout, pinned=self._world.device.type == "cuda")
        resident = kernel.blocks(1, self._num_sms)
        common: dict[str, int | Sequence[int]] = {"control": self._control.data_ptr(), "failure": watchdog.address(0)}
        blocks = 1
        if isinstance(spec, CollectivePack):
            who = roles(spec, self.problem.max_tokens, resident)
            blocks, common = who.blocks, common | {"chunks": base, "object": self._object}
            common |= {"active": self.problem.every_rank, "senders": who.senders, "receivers": who.receivers}
        elif isinstance(spec, CollectiveOpen):
            common |= {"chunks": base + self._chunks, "object": self._object}
        else:
            assert isinstance(spec, CollectiveSum)
            who = roles(spec, self.problem.max_tokens, resident)
            blocks, common = who.blocks, {"rows": base + 2 * self._chunks, "receivers": (0, who.blocks)}
        bound = BoundKernel(kernel, spec.params, blocks, common, _varying(spec))
        if isinstance(spec, CollectiveOpen):
            self._open = bound
        self._bound[spec] = bound, watchdog

    def expert_rows(self, slots: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows may lie anywhere here; this is some memory for them."""
        if self._expert_rows is None:
            size = self.buffer_bytes - 2 * self._chunks
            self._expert_rows = torch.zeros(size, dtype=torch.uint8, device=self._world.device)
        ranks = self.problem.num_ranks
        size = ranks * slots * hidden * dtype.itemsize
        return self._expert_rows[:size].view(dtype).view(ranks, slots, hidden)

    def holds(self, y: torch.Tensor) -> bool:
        """All rows are exchanged in the same way."""
        return False

    def receives_in(self, y: torch.Tensor) -> bool:
        """Nobody writes there but this rank's next dispatch."""
        return False

    def views(
        self, parts: Sequence[torch.Tensor], widths: tuple[int, ...], slots: int, words: int
    ) -> tuple[torch.Tensor, ...]:
        """What has come, as [ranks, slots, columns] of each payload."""
        return self._chunks_of(widths, slots, words).views(parts)

    def dispatch(
        self,
        spec: CollectivePack,
        payloads: Sequence[torch.Tensor],
        topk_idx: torch.Tensor,
        num_tokens: torch.Tensor | None,
        addresses: tuple[int, ...],
        slots: int,
        stats: torch.Tensor | None,
        gathered: torch.Tensor | None,
        unused_ids: tuple[int, int] | None,
        active: int,
        timeout: float | None,
    ) -> None:
        """Packs, exchanges, and reads the headers; arguments are checked already. `active`: all ranks."""
        self._order.follow("coll")
        widths = spec.payloads.widths
        words = 0 if stats is None else stats.numel()
        chunks = self._chunks_of(widths, slots, words)
        index, unused_id = unused_ids or (0, 0)
        pack, _ = self._bound[spec]
        pack(
            *(payload.data_ptr() for payload in payloads),
            *chunks.planes,
            topk_idx.data_ptr(),
            address(num_tokens),
            *addresses[:3],
            address(stats),
            chunks.size,
            topk_idx.shape[0],
            slots,
            words,
            index,
            0 if unused_ids is None else widths[index] // 4,
            unused_id,
            topk_idx.dtype == torch.int64,
        )
        self._world.all_to_all(chunks.came, chunks.sent)
        assert self._open is not None
        self._open(addresses[3], address(gathered), chunks.size, slots, words)

    def combine(
        self,
        spec: CollectiveSum,
        y: torch.Tensor,
        results: tuple[int, ...],
        addresses: tuple[int, ...],
        tokens: int,
        slots: int,
        active: int,
        timeout: float | None,
    ) -> None:
        """Exchanges rows and adds them up; arguments are checked already. Rows lie in `y` as they are to be sent."""
        self._order.follow("coll")
        self._world.all_to_all(self._rows(y.nbytes), y.view(torch.uint8))
        add, _ = self._bound[spec]
        add(*results, *addresses[:3], tokens, slots)

    def raise_expired(self) -> None:
        """Nothing here waits for a rank; torch.distributed does, and raises for itself."""
