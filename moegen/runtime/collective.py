# SPDX-License-Identifier: Apache-2.0
"""Family `coll` at run time: buffers of this rank's own, launches, and all-to-alls of torch.distributed in between."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch

from moegen.kernels.a2a import MAX_PAYLOADS, PHASES
from moegen.kernels.a2a_layout import PLANE_ALIGNMENT, roles
from moegen.kernels.coll import (
    CHUNK_ALIGNMENT,
    MAX_HEADER_BYTES,
    CollectiveMove,
    CollectiveOpen,
    CollectivePack,
    CollectiveSum,
    for_exact,
)
from moegen.kernels.ll import ceil_div
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec
from moegen.payloads import ExchangedRows, PayloadsHandle
from moegen.runtime.bound import BoundKernel, BoundKernels, address, signed
from moegen.runtime.chunks import Chunks, Headers, Line
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.low_latency import FIRST_EPOCH
from moegen.runtime.memory import SymmetricMemory
from moegen.runtime.one_sided import OF_HANDLE, dispatch_word
from moegen.runtime.ownership import lasting
from moegen.runtime.stages import Stages
from moegen.runtime.streams import StreamOrder
from moegen.runtime.waiting import pointless_if
from moegen.runtime.watchdog import Watchdog
from moegen.runtime.worlds import RankWorld

log = logging.getLogger(__name__)

_CONTROL_WORDS = 32

_KEPT_LAYOUTS = 128
"""Kinds of calls (payloads, max_tokens, statistics) whose chunks are laid out at a time."""

_ROUTED = ("topk_idx", "num_tokens", *OF_HANDLE[:2])
_UNUSED_IDS = ("ids_payload", "id_words", "unused_id")


def _varying(spec: Spec) -> tuple[str, ...]:
    if isinstance(spec, CollectiveSum):
        return ("out", *(param.name for param in spec.result.params), *OF_HANDLE[:3], "tokens", "first_rows")
    if isinstance(spec, CollectiveOpen):
        return ("headers", "own_headers", "counts", "exchanged", "gathered", "stride", "slots", "stats_words", "word")
    if isinstance(spec, CollectiveMove):
        places = ("chunks", "line", "begins", "planes", "chunk_bytes", "rows")
        return (*places, "slots", *_UNUSED_IDS) if spec.to == "planes" else places
    assert isinstance(spec, CollectivePack)
    if spec.exact:
        return ("line", "begins", "rows", "active", "payloads", *_ROUTED, "tokens", "wide_ids")
    sizes = ("chunk_bytes", "tokens", "slots", "stats_words", *_UNUSED_IDS, "wide_ids", "word")
    return ("chunks", "payloads", "planes", *_ROUTED, "tokens_sent", "stats", *sizes)


_NO_IDS = (0, 0, 0)


class _Dispatch(NamedTuple):
    """A call's arguments as kernels take them: addresses and numbers.

    Attributes:
        payloads, counts, gathered, tokens, slots: of these; words: of statistics.
        routing: topk_idx, num_tokens, token_ranks, token_slots.
        told: tokens_sent, statistics.
        ids: the payload of ids whose unused rows are filled, words of its rows (0: none is), what with.
        wide: whether topk_idx is int64.
        word: the call word.
    """

    payloads: tuple[int, ...]
    routing: tuple[int, ...]
    told: tuple[int, int]
    counts: int
    gathered: int
    tokens: int
    slots: int
    words: int
    ids: tuple[int, int, int]
    wide: bool
    word: int


def _first_bytes(memory: torch.Tensor, number: int) -> torch.Tensor:
    return memory[:number]


class CollectiveOps(BoundKernels):
    """One rank's dispatch and combine, as `moegen.runtime.one_sided.OneSidedOps`. Nothing of one rank's is mapped into
    another: `memory` is this rank's, [chunks to send][chunks that came][rows that came back][a line].

    Args:
        may_be_exact: whether calls may exchange counts first, which takes the line: what comes in dispatch, what goes
            in combine.

    Attributes:
        stages: notes how long the stages of calls take, once it is switched on.
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
        may_be_exact: bool,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        super().__init__()
        self.problem = problem
        ranks, slots = problem.num_ranks, problem.max_tokens
        padding = (MAX_PAYLOADS + 1) * PLANE_ALIGNMENT + CHUNK_ALIGNMENT
        most = MAX_HEADER_BYTES + slots * payload_bytes + padding
        # Rows lie behind them, which are read by 16 bytes.
        chunks = ranks * ceil_div(most, CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
        rows = ceil_div(ranks * slots * combine_bytes, CHUNK_ALIGNMENT) * CHUNK_ALIGNMENT
        sizes = (chunks, chunks, rows, max(chunks, rows) if may_be_exact else 0)
        self.buffer_bytes = sum(sizes)
        log.info("rank %d allocates %s bytes for chunks and rows", world.rank, f"{self.buffer_bytes:,}")
        local = torch.zeros(self.buffer_bytes, dtype=torch.uint8, device=world.device)
        self.memory = SymmetricMemory(local, (local.data_ptr(),))
        to_send, came, rows_back, line = local.split(list(sizes))
        self.shown = range(came.data_ptr(), came.data_ptr() + came.nbytes)
        """Addresses of what dispatch returns. A next one may not be given them, though it could be here: a program that
        says path "auto" does not know on which it is.
        """
        self._control = torch.zeros(_CONTROL_WORDS, dtype=torch.int32, device=world.device)
        self._control[0] = signed(first_epoch)
        self._object = world.exchange(secrets.randbits(32))[0]
        self._timeout, self._num_sms, self._world = timeout, num_sms, world
        self._order = StreamOrder(world.device)
        self.stages = Stages(world.device)
        self._expert_rows: torch.Tensor | None = None
        self._count: dict[CollectivePack, BoundKernel] = {}
        self._open: BoundKernel | None = None
        self._to_send, self._rows_back, self._line = to_send, rows_back, line
        self._headers = Headers(ranks, world.device) if may_be_exact else None
        # Of no method of this object: it would keep itself, and its memory, alive.
        self._chunks_of = lru_cache(_KEPT_LAYOUTS)(partial(Chunks, to_send, came, ranks))
        self._rows_of = lru_cache(_KEPT_LAYOUTS)(partial(_first_bytes, rows_back))

    def bind(self, kernel: LoadedKernel) -> None:
        """Makes a loaded kernel ready for launches."""
        spec = kernel.spec
        watchdog = Watchdog([spec.stem], PHASES, self._timeout, pinned=self._world.device.type == "cuda")
        resident = kernel.blocks(1, self._num_sms)
        reports: dict[str, int | Sequence[int]] = {"failure": watchdog.address(0)}
        counted = reports | {"control": self._control.data_ptr(), "object": self._object}
        varying = _varying(spec)
        if isinstance(spec, CollectivePack):
            who = roles(spec, self.problem.max_tokens, resident)
            if spec.exact:
                bound = BoundKernel(kernel, spec.params, who.senders[1], reports | {"senders": who.senders}, varying)
            else:
                counted |= {"active": self.problem.every_rank}
                both = counted | {"senders": who.senders, "receivers": who.receivers}
                bound = BoundKernel(kernel, spec.params, who.blocks, both, varying)
                headers_only = counted | {"senders": (0, 0), "receivers": (0, 1)}
                self._count[spec] = BoundKernel(kernel, spec.params, 1, headers_only, varying)
        elif isinstance(spec, CollectiveOpen):
            read = counted | {"rank": self._world.rank}
            bound = self._open = BoundKernel(kernel, spec.params, 1, read, varying)
        elif isinstance(spec, CollectiveMove):
            blocks = min(resident, spec.useful_blocks(self.problem.max_tokens))
            bound = BoundKernel(kernel, spec.params, blocks, {}, varying)
        else:
            assert isinstance(spec, CollectiveSum)
            who = roles(spec, self.problem.max_tokens, resident)
            fixed = {"rows": self._rows_back.data_ptr(), "receivers": (0, who.blocks)}
            bound = BoundKernel(kernel, spec.params, who.blocks, fixed, varying)
        self._bound[spec] = bound, watchdog

    @lasting()
    def expert_rows(self, slots: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows may lie anywhere here; this is some memory for them."""
        if self._expert_rows is None:
            self._expert_rows = torch.zeros_like(self._rows_back)
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
        exact: bool,
    ) -> ExchangedRows | None:
        """Packs, exchanges, and reads the headers; arguments are checked already. `active`: all ranks. `exact`: counts
        cross first, and are returned.
        """
        self._order.follow("coll")
        widths = spec.payloads.widths
        index, unused_id = unused_ids or (0, 0)
        words = 0 if stats is None else stats.numel()
        call = _Dispatch(
            tuple([payload.data_ptr() for payload in payloads]),
            (topk_idx.data_ptr(), address(num_tokens), *addresses[:2]),
            (addresses[2], address(stats)),
            addresses[3],
            address(gathered),
            topk_idx.shape[0],
            slots,
            words,
            (index, 0 if unused_ids is None else widths[index] // 4, unused_id),
            topk_idx.dtype == torch.int64,
            dispatch_word(widths, tuple([part.dtype for part in payloads]), slots, words, active),
        )
        chunks = self._chunks_of(widths, slots, call.words)
        if exact:
            return self._dispatch_exact(spec, chunks, call)
        self._dispatch_padded(spec, chunks, call)
        return None

    def _dispatch_padded(self, spec: CollectivePack, chunks: Chunks, call: _Dispatch) -> None:
        stage, (pack, _) = self.stages.stage, self._bound[spec]
        with stage("dispatch_pack"):
            sizes = (chunks.size, call.tokens, call.slots, call.words, *call.ids)
            at = chunks.sent.data_ptr()
            pack(at, *call.payloads, *chunks.planes, *call.routing, *call.told, *sizes, call.wide, call.word)
        with stage("dispatch_collective"):
            self._world.all_to_all(chunks.came, chunks.sent)
        with stage("dispatch_compact"):
            self._read_headers(chunks.came, None, chunks.size, call)

    def _dispatch_exact(self, spec: CollectivePack, chunks: Chunks, call: _Dispatch) -> ExchangedRows:
        """What nothing is to be done for is not launched."""
        stage = self.stages.stage
        with stage("dispatch_counts"):
            rows = self._exchange_counts(spec, chunks, call)
        widths = spec.payloads.widths
        out, into = Line.of(widths, self._to_send, rows.sent), Line.of(widths, self._line, rows.came)
        pack_line, to_planes = (self._bound[other][0] for other in for_exact(spec))
        with stage("dispatch_pack"):
            if call.tokens:
                active = sum(1 << rank for rank, number in enumerate(rows.sent) if number)
                where = (out.address, *out.begins, *rows.sent, active)
                pack_line(*where, *call.payloads, *call.routing, call.tokens, call.wide)
        with stage("dispatch_collective"):
            self._world.all_to_all(into.memory, out.memory, (into.sizes, out.sizes))
        with stage("dispatch_compact"):
            _, id_words, _ = call.ids
            if into.memory.numel() or id_words:
                where = (chunks.came.data_ptr(), into.address, *into.begins, *chunks.planes, chunks.size)
                to_planes(*where, *rows.came, call.slots, *call.ids)
        return rows

    def _exchange_counts(self, spec: CollectivePack, chunks: Chunks, call: _Dispatch) -> ExchangedRows:
        headers = self._headers
        assert headers is not None
        sent, came = headers.of(call.words)
        stride = headers.size(call.words)
        sizes = (stride, call.tokens, call.slots, call.words, *_NO_IDS)
        at = sent.data_ptr()
        self._count[spec](at, *call.payloads, *chunks.planes, *call.routing, *call.told, *sizes, call.wide, call.word)
        self._world.all_to_all(came, sent)
        self._read_headers(came, headers, stride, call)
        with pointless_if(self._world.raise_if_ranks_are_gone):
            return headers.read()

    def _read_headers(self, came: torch.Tensor, headers: Headers | None, stride: int, call: _Dispatch) -> None:
        """`headers`: those of an exact call, which are told what is exchanged."""
        assert self._open is not None
        own, exchanged = (0, 0) if headers is None else headers.addresses
        sizes = (stride, call.slots, call.words, call.word)
        self._open(came.data_ptr(), own, call.counts, exchanged, call.gathered, *sizes)

    def combine(
        self,
        spec: CollectiveSum,
        y: torch.Tensor,
        results: tuple[int, ...],
        handle: PayloadsHandle,
        active: int,
        timeout: float | None,
    ) -> None:
        """Exchanges rows and adds them up; arguments are checked already. Padded, rows lie in `y` as they are sent."""
        self._order.follow("coll")
        stage, rows, slots = self.stages.stage, handle.exchanged, handle.max_tokens
        first_rows: Sequence[int] = range(0, slots * self.problem.num_ranks, slots)
        if rows is None:
            with stage("combine_collective"):
                self._world.all_to_all(self._rows_of(y.nbytes), y.view(torch.uint8))
        else:
            widths = (spec.row_bytes,)
            out, into = Line.of(widths, self._line, rows.came), Line.of(widths, self._rows_back, rows.sent)
            first_rows = [begin // spec.row_bytes for begin in into.begins]
            (to_line,) = (self._bound[other][0] for other in for_exact(spec))
            with stage("combine_pack"):
                if out.memory.numel():
                    to_line(y.data_ptr(), out.address, *out.begins, 0, slots * spec.row_bytes, *rows.came)
            with stage("combine_collective"):
                self._world.all_to_all(into.memory, out.memory, (into.sizes, out.sizes))
        with stage("combine_reduce"):
            if handle.num_tokens:
                add, _ = self._bound[spec]
                add(*results, *handle.addresses[:3], handle.num_tokens, *first_rows)
