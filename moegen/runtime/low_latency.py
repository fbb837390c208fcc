# SPDX-License-Identifier: Apache-2.0
"""Family `ll` at run time: its symmetric buffer, its slots and its launches, for one rank."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from moegen.admission import Span
from moegen.handle import Dispatched, Handle
from moegen.kernels.ll import PHASES, LowLatencyCombine, LowLatencyDispatch, regions
from moegen.kernels.ll_roles import roles
from moegen.kernels.problem import Problem
from moegen.runtime.bound import BoundKernel, address, signed
from moegen.runtime.halves import OpenHalf, OpenHalves
from moegen.runtime.kernel import LoadedKernel
from moegen.runtime.liveness import LEFT_OUT_BYTES, liveness_of
from moegen.runtime.memory import SymmetricMemory
from moegen.runtime.received import FOR_EVERY_COMBINE, Received
from moegen.runtime.streams import StreamOrder, current_stream, record
from moegen.runtime.watchdog import Watchdog
from moegen.runtime.worlds import RankWorld
from moegen.select import Selection

log = logging.getLogger(__name__)

Launch = tuple[int, str, str, str]
"""Slot, op, phase, and for combine when its weights come."""

FIRST_EPOCH = 2
"""See `epoch_after` in `templates/device/signal.cuh`."""
_CONTROL_WORDS = 32
"""32-bit words per (slot, op): struct Control, on a 128-byte line of its own; the last line holds the abort word."""

_DISPATCH_VARYING = (
    "x",
    "topk_idx",
    "topk_weights",
    "num_tokens",
    "out",
    "counts",
    "total_counts",
    "ranges",
    "row_tokens",
    "token_ranks",
    "first_rows",
    "row_origin",
    "row_slots",
    "row_weights",
    "tokens_sent",
    "x_stride",
    "tokens",
    "wide_ids",
    "timeout_ns",
)
_COMBINE_VARYING = (
    "y",
    "out",
    "topk_weights",
    "first_rows",
    "row_origin",
    "row_slots",
    "row_weights",
    "token_ranks",
    "tokens_sent",
    "tokens",
    "timeout_ns",
    "call",
)
_MASKED_VARYING = {
    "dispatch": ("selected_ranks", "selected_weights", "waited_ns"),
    "combine": ("selected_ranks", "selected_weights", "waited_ns", "renormalize"),
}
"""What comes last where ranks may be missing."""


class LowLatency:
    """One rank's dispatch and combine. Collective to make; the kernels are loaded already.

    Each op has `slots` sets of receive buffers. A call takes the op's lowest free one; a whole call gives it back at
    once, because whatever uses it next is queued behind, also from another stream; one of which only the first half was
    launched keeps it until the second is.
    """

    def __init__(
        self,
        world: RankWorld,
        problem: Problem,
        selection: Selection,
        kernels: Sequence[LoadedKernel],
        *,
        slots: int,
        timeout: float,
        num_sms: int | None,
        first_epoch: int = FIRST_EPOCH,
        active: torch.Tensor | None = None,
    ) -> None:
        """`active`: the mask, if the kernels are those for ranks that may be missing."""
        self.problem = problem
        self.active = active
        self._timeout = timeout
        self.slots = slots
        self._capacity = problem.max_tokens
        self._world, self._selection, self._num_sms = world, selection, num_sms
        self.local_experts = len(problem.local_experts(world.rank))
        self.received = Received(problem, self.local_experts, world.device)
        self._stride = regions(selection.combine, problem.max_tokens, self._combine_start()).end
        self._verdicts_start = slots * self._stride
        self.buffer_bytes = self._verdicts_start + (0 if active is None else 2 * slots * LEFT_OUT_BYTES)
        log.info("rank %d allocates %s bytes of symmetric memory", world.rank, f"{self.buffer_bytes:,}")
        self.memory: SymmetricMemory = world.allocate(self.buffer_bytes)
        pinned = world.device.type == "cuda"
        self.control = torch.zeros(2 * slots + 1, _CONTROL_WORDS, dtype=torch.int32, device=world.device)
        self._verdicts = torch.zeros(2 * slots, problem.num_ranks, dtype=torch.int32, device=world.device)
        stems = [kernel.spec.stem for kernel in kernels]
        self._watchdog = Watchdog(stems * slots, PHASES, timeout, pinned=pinned)
        self._tables: dict[int, torch.Tensor] = {}
        """Of kernels whose ranks may be missing, by number: objects for fewer tokens use them as well."""
        if active is not None:
            self._beats = liveness_of(world)
        self._halves = OpenHalves(slots)
        self._kernels = {_kind(kernel): (number, kernel) for number, kernel in enumerate(kernels)}
        self._bound: dict[Launch, BoundKernel] = {}
        self._order = StreamOrder(world.device)
        for kind in self._kernels:
            for slot in range(slots):
                self._bind((slot, *kind))
        self._set_epoch(first_epoch)

    def for_fewer(self, max_tokens: int) -> LowLatency:
        """The same buffers, slots and epochs, for calls of at most so many tokens per rank: their results and handles
        have the shapes of that number. All ranks make each call with the same number. Kernels are bound when they are
        first called: there may be many numbers, each called in one way.
        """
        fewer = copy.copy(self)
        fewer.problem = replace(self.problem, max_tokens=max_tokens)
        fewer.received = Received(fewer.problem, self.local_experts, self._world.device)
        fewer._bound = {}
        return fewer

    def _combine_start(self) -> int:
        return regions(self._selection.dispatch, self._capacity, 0).end

    def _bind(self, launch: Launch) -> BoundKernel:
        world, selection, slot = self._world, self._selection, launch[0]
        number, kernel = self._kernels[launch[1:]]
        number += slot * len(self._kernels)
        spec = kernel.spec
        assert isinstance(spec, (LowLatencyDispatch, LowLatencyCombine))
        dispatch = isinstance(spec, LowLatencyDispatch)
        start = slot * self._stride + (0 if dispatch else self._combine_start())
        at = regions(spec, self._capacity, start)
        fixed: dict[str, int | Sequence[int]] = {
            "peers": self.memory.peers,
            "rank": world.rank,
            "capacity": self._capacity,
            "max_tokens": self.problem.max_tokens,
            "control": self.control[2 * slot + (not dispatch)].data_ptr(),
            "failure": self._watchdog.address(number),
            "consumed_offset": at.consumed,
            "rows_offset": at.rows,
            "tags_offset": at.tags,
        }
        varying: tuple[str, ...] = _COMBINE_VARYING
        if isinstance(spec, LowLatencyDispatch):
            fixed["routes_offset"] = at.routes
            varying = (*_DISPATCH_VARYING, "scales") if spec.scale_words else _DISPATCH_VARYING
        else:
            fixed["weights_offset"], fixed["calls_offset"] = at.weights, at.calls
            self._watchdog.compare_calls(number, self.memory, at.calls)
        if self.active is None:
            fixed["aborted"] = self.control[-1].data_ptr()
        else:
            fixed["active"] = self.active.data_ptr()
            verdicts = self._verdicts_start + (2 * slot + (not dispatch)) * LEFT_OUT_BYTES
            if number not in self._tables:
                self._tables[number] = self._beats.table(self.memory, verdicts, self._watchdog.address(number))
            fixed["liveness"] = self._tables[number].data_ptr()
            fixed["verdicts"] = self._verdicts[2 * slot + (not dispatch)].data_ptr()
            varying = (*varying, *_MASKED_VARYING[spec.op])
        tuned_sms = selection.dispatch_sms if dispatch else selection.combine_sms
        blocks = kernel.blocks(world.ranks_per_device, tuned_sms if self._num_sms is None else self._num_sms)
        who = roles(spec, self.problem.max_tokens, blocks)
        fixed["senders"], fixed["receivers"] = who.senders, who.receivers
        if isinstance(spec, LowLatencyDispatch):
            fixed["tellers"], fixed["shares"] = who.tellers, who.shares
        bound = self._bound[launch] = BoundKernel(kernel, spec.params, who.blocks, fixed, varying)
        return bound

    def _set_epoch(self, epoch: int) -> None:
        """As if everybody had read all epochs before; before any rank may launch."""
        before = 0xFFFFFFFF if epoch == FIRST_EPOCH else epoch - 1
        self.control[:-1, 0] = signed(epoch)
        self._verdicts.fill_(signed(before << 1 & 0xFFFFFFFF))
        words = self.memory.local.view(torch.int32)
        for slot in range(self.slots):
            for start in (0, self._combine_start()):
                at = (slot * self._stride + start) // 4
                words[at : at + self.problem.num_ranks] = signed(before)

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None,
        num_tokens: torch.Tensor | None,
        out: Dispatched,
        total_counts: torch.Tensor | None,
        hook: bool,
        timeout: float | None = None,
        waited: torch.Tensor | None = None,
    ) -> OpenHalf | None:
        """Launches dispatch, or its first half; arguments are checked already."""
        if out.handle.stream != current_stream(x.device):
            given = out.given
            record(x.device, (out.tokens, out.scales, out.handle.memory, given.counts, given.ranges, given.row_tokens))
        first_rows, row_origin, row_slots, row_weights, token_ranks, tokens_sent, *selected = out.handle.addresses
        counts, ranges, row_tokens = self.received.user_addresses(out)
        arguments: tuple[int, ...] = (
            x.data_ptr(),
            topk_idx.data_ptr(),
            address(topk_weights),
            address(num_tokens),
            out.tokens.data_ptr(),
            counts,
            address(total_counts),
            ranges,
            row_tokens,
            token_ranks,
            first_rows,
            row_origin,
            row_slots,
            row_weights,
            tokens_sent,
            x.stride(0) * x.element_size(),
            x.shape[0],
            topk_idx.dtype == torch.int64,
            self._nanoseconds(timeout),
        )
        if out.scales is not None:
            arguments = (*arguments, out.scales.data_ptr())
        if self.active is not None:
            arguments = (*arguments, *selected, address(waited))
        kept = (x, topk_idx, topk_weights, num_tokens, out, total_counts, waited)
        return self._launch("dispatch", "", arguments, hook, kept)

    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        weights: torch.Tensor | None,
        out: torch.Tensor,
        hook: bool,
        timeout: float | None = None,
        waited: torch.Tensor | None = None,
        renormalize: bool = False,
    ) -> OpenHalf | None:
        """Launches combine, or its first half; arguments are checked already."""
        if handle.stream != current_stream(y.device):  # the handle may be dropped before this stream has read it
            record(y.device, (handle.memory,))
        arguments = (
            y.data_ptr(),
            out.data_ptr(),
            address(weights),
            *handle.addresses[: len(FOR_EVERY_COMBINE)],
            handle.num_tokens,
            self._nanoseconds(timeout),
            weights is not None,
        )
        if self.active is not None:
            arguments = (*arguments, *handle.addresses[len(FOR_EVERY_COMBINE) :], address(waited), renormalize)
        late = "atdispatch" if weights is None else "atcombine"
        return self._launch("combine", late, arguments, hook, (y, handle, weights, out, waited))

    def _nanoseconds(self, timeout: float | None) -> int:
        """Of this call's timeout; a report of an expired wait names the last call's."""
        self._watchdog.timeout = seconds = self._timeout if timeout is None else timeout
        return int(seconds * 1e9)

    def _launch(
        self, op: str, weights: str, arguments: tuple[int, ...], hook: bool, kept: tuple[object, ...]
    ) -> OpenHalf | None:
        slot = self._halves.free_slot(op)
        self._order.follow(op, slot)
        launch = (slot, op, "send" if hook else "whole", weights)
        bound = self._bound.get(launch) or self._bind(launch)
        bound(*arguments)
        if not hook:
            return None
        return self._halves.open(OpenHalf(op, slot, arguments, kept))

    def receive(self, half: OpenHalf) -> None:
        """Launches the second half of an op."""
        self._halves.take(half)
        self._order.follow(half.op, half.slot)
        launch = (half.slot, half.op, "receive", "atdispatch" if half.op == "combine" else "")
        bound = self._bound.get(launch) or self._bind(launch)
        bound(*half.arguments)
        self._halves.close(half)

    @property
    def held(self) -> Sequence[Span]:
        """Memory that calls need whose hooks are open."""
        return self._halves.held

    def is_unfinished(self, handle: Handle) -> bool:
        """Whether the hook of the handle's dispatch is still open."""
        return self._halves.is_unfinished(handle.addresses[0])

    def raise_expired(self) -> None:
        self._watchdog.raise_expired()

    def raise_what_happened(self) -> None:
        self._watchdog.raise_what_happened()


def _kind(kernel: LoadedKernel) -> tuple[str, str, str]:
    """Of a Launch, what says which kernel it is."""
    spec = kernel.spec
    assert isinstance(spec, (LowLatencyDispatch, LowLatencyCombine))
    return spec.op, spec.phase, "" if isinstance(spec, LowLatencyDispatch) else spec.weights
