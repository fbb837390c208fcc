# SPDX-License-Identifier: Apache-2.0
"""`ExpertParallel`: the object that users hold. One per MoE layer shape and process group; many layers may share it."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from moegen import admission, checks
from moegen.errors import HandleError
from moegen.handle import CombineOptions, Dispatched, DispatchOptions, Handle
from moegen.runtime.agreement import load_on_all_ranks, raise_on_all_ranks
from moegen.runtime.collective_experts import CollectiveExperts
from moegen.runtime.halves import Hook
from moegen.runtime.low_latency import FIRST_EPOCH, LowLatency
from moegen.runtime.membership import ActiveMembership
from moegen.runtime.ownership import exclusive, lasting
from moegen.runtime.paths import PATHS, choose
from moegen.runtime.staged import Staged
from moegen.runtime.streams import CommStream, Event, current_stream
from moegen.runtime.worlds import RankWorld, as_rank_world
from moegen.select import CollectiveSelection, Selection, select, select_collective

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)


class ExpertParallel(ActiveMembership, Staged):
    """Expert-parallel dispatch and combine for one shape of MoE layer. Making one is collective.

    One thread at a time uses an object: while a call is being made, any other thread's raises BusyError.
    All ranks make the same calls in the same order. Calls that may overlap on a GPU (two streams, two objects) need an
    order that is the same on all ranks, or a `num_sms` that leaves room for both: a launch may take the whole device.

    Args:
        group_or_world: a torch process group (gloo or nccl; None: the default one), or the rank_world that
            `LocalWorld.run` passes to its function.
        num_experts: of all ranks; shares are contiguous, the first `num_experts % ranks` ranks hold one more each.
        num_topk: experts that a token selects.
        hidden: elements of a token; a token is a multiple of 16 bytes.
        max_tokens_per_rank: capacity: tokens that a rank may dispatch in one call. Sizes the buffers.
        dtype: of the tokens: torch.bfloat16.
        layout: of what dispatch returns: "expert".
        mode: "capacity": counts stay on the device and nothing waits for the host.
        family: "ll" (low latency), or "auto".
        path: "ipc": ranks map each other's memory; "collective": an all-to-all of torch.distributed on whatever backend
            the group has, with room for whatever may come, whose hooks have nothing left to do, without `active_ranks`,
            `wire` and `warp_groups`; how long it may take, the group knows; "auto": ipc where it is possible.
        quantize: how dispatch sends tokens: None (as they are); "fp8" (e4m3, a float32 scale per 128 elements, the
            largest of which becomes 448); "fp8_pow2" (scales rounded up to powers of two); "fp8_ue8m0" (the exponents
            of such scales, four to an int32). Combine takes `dtype` all the same.
        slots: calls whose hooks may be open at the same time; 1: no hooks. Each slot has its own buffers.
        wire: how rows cross the link in both ops: "inline" (every 16 bytes carry their epoch), "row" (a tag per row) or
            "auto" (for each op from the table of `moegen.tuning`).
        warp_groups: teams and warps per team of a block, e.g. "2x16"; None: from that table.
        num_sms: thread blocks per launch at most; None: from that table, or as many as are useful.
        timeout: seconds that a call may wait for one thing from another rank before it fails with PeerTimeoutError.
        active_ranks: True: a rank that shows no sign of life for twice the timeout (a rank that waits for another one
            does) is no error: it is marked in `active_ranks` on all ranks, and its part of the results is missing. If
            it lives, its next call raises LeftOutError. Or the int32 [ranks] tensor on the device to keep that in,
            which several objects may share.
        device: where a process group's tensors are; None: the current GPU, else the CPU.

    All arguments but `num_sms`, `device` and the content of `active_ranks` must be equal on all ranks.

    Raises:
        InputError, SpecError: an argument that cannot be; the text says what is allowed.
        WorldError: ranks gave different arguments, or run different versions of moegen.
        UnsupportedPlatformError: the ranks cannot map each other's memory, or there is no compiler for the kernels.
        CapacityError: no room for the buffers.
        CompileError: a kernel does not compile.
    """

    @lasting()
    def __init__(
        self,
        group_or_world: Any = None,
        *,
        num_experts: int,
        num_topk: int,
        hidden: int,
        max_tokens_per_rank: int,
        dtype: torch.dtype = torch.bfloat16,
        layout: str = "expert",
        mode: str = "capacity",
        family: str = "auto",
        path: str = "auto",
        quantize: str | None = None,
        slots: int = 1,
        wire: str = "auto",
        warp_groups: str | None = None,
        num_sms: int | None = None,
        timeout: float = 30.0,
        active_ranks: bool | torch.Tensor = False,
        device: str | torch.device | None = None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        checks.one_of("mode", mode, ("capacity",))
        checks.one_of("family", family, ("auto", "ll"))
        checks.one_of("path", path, ("auto", *PATHS))
        first_epoch = checks.in_range("first_epoch", first_epoch, FIRST_EPOCH, 2**32 - 1)
        slots = checks.in_range("slots", slots, 1, checks.MAX_SLOTS)
        num_sms = checks.num_sms(num_sms)
        checks.seconds("timeout", timeout)
        admission.require_real_tensors()
        self.world: RankWorld = as_rank_world(group_or_world, device, timeout)
        self.problem = checks.problem(
            self.world.size,
            num_experts=num_experts,
            num_topk=num_topk,
            hidden=hidden,
            max_tokens_per_rank=max_tokens_per_rank,
            dtype=dtype,
            layout=layout,
            quantize=quantize,
            slots=slots,
            wire=wire,
            warp_groups=warp_groups,
            on_host=self.world.device.type == "cpu",
            masked=active_ranks is not False,
            path=choose(self.world, path),
        )
        self.dtype = dtype
        self.device = self.world.device
        self._active = checks.active_ranks(self, active_ranks)
        collective = self.problem.path == "collective"
        self.selection: Selection | CollectiveSelection
        self.selection, self.kernels = load_on_all_ranks(
            self.world, self.problem, (timeout, first_epoch, slots), select_collective if collective else select
        )
        self._comm_stream = CommStream(self.device)
        failure: Exception | None = None
        try:
            self._ops = self._make_ops(slots=slots, num_sms=num_sms, timeout=timeout, first_epoch=first_epoch)
            self._synchronize_device()
        except Exception as error:  # told to the other ranks below
            failure = error
        raise_on_all_ranks(self.world, failure, "could not make its buffers")
        described = (self.world.rank, self.world.description, self.problem.path, self.selection.dispatch.stem)
        log.info("rank %d of %s: path %s, kernel %s", *described)

    def _make_ops(self, *, timeout: float, **how: Any) -> LowLatency | CollectiveExperts:
        made = (self.world, self.problem)
        if isinstance(self.selection, CollectiveSelection):
            return CollectiveExperts(*made, self.selection, self.kernels, **how)
        return LowLatency(*made, self.selection, self.kernels, timeout=timeout, active=self._active, **how)

    @overload
    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        **options: Unpack[DispatchOptions],
    ) -> Dispatched: ...

    @overload
    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        return_recv_hook: Literal[True],
        **options: Unpack[DispatchOptions],
    ) -> tuple[Dispatched, Hook]: ...

    @overload
    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        async_finish: Literal[True],
        **options: Unpack[DispatchOptions],
    ) -> tuple[Dispatched, Event]: ...

    @exclusive
    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor | None = None,
        *,
        num_tokens: torch.Tensor | None = None,
        out: torch.Tensor | Dispatched | None = None,
        total_counts: torch.Tensor | None = None,
        timeout: float | None = None,
        waited_ns: torch.Tensor | None = None,
        return_recv_hook: bool = False,
        async_finish: bool = False,
    ) -> Any:
        """Sends every token to the ranks that hold its experts. Every rank calls it, also with zero tokens.

        Args:
            x: [T, hidden], 0 <= T <= max_tokens_per_rank; T may differ between ranks and calls.
            topk_idx: [T, topk], int32 or int64, ids in [-1, num_experts); -1 selects nothing. The same expert twice
                in one row is two selections that share one row of the result.
            topk_weights: [T, topk] float32; they travel with the tokens and are combine's default. None: ones.
            num_tokens: int32 [1] on the device: how many of the T tokens count, read when the kernel runs, so that
                one captured graph serves every batch size.
            out: what to write into: an earlier result that is not needed any more, or `allocate()`'s (then nothing is
                allocated; it is the result, and handles that it had before are void), or only the tensor for
                `Dispatched.tokens`. It shares no memory with an input, nor with what a call needs whose hook is open.
            total_counts: int32 [local experts] on the device, to which the counts of this call are added.
            timeout: seconds, for this call in place of the object's.
            waited_ns: int64 [ranks], to which the nanoseconds waited for each rank are added. Needs `active_ranks`.
            return_recv_hook: only send now; the second result is a function to be called once, on the same stream,
                which receives. Nothing of the result may be read before it was called. In between no multiprocessor is
                busy with this call, `x` may be overwritten by what follows on the stream, and other calls may be made;
                all ranks call in the same order. Needs `slots` of 2 or more. A graph that holds calls of this object
                must not be replayed while a hook is open: it has chosen its slots when it was captured.
            async_finish: run on a stream of the object, behind what is on the current one; the second result is an
                event, and nothing of the first may be read, nor the inputs changed, before `event.wait()`.

        Raises:
            InputError: an argument does not fit; nothing was launched.
            SlotError: more hooks are open than there are slots; nothing was launched.
            PeerTimeoutError: this or an earlier call waited for a rank in vain.
            LeftOutError: the others have left this rank out; once. This call was not launched: make it again.
            DifferentCallError: an earlier combine had topk_weights on some ranks only; from then on.
            InvalidRoutingError: an earlier call on a GPU met an id that names no expert (on the CPU ids are checked
                before anything is launched). This call was not launched: make it again, the other ranks wait for it.
            LaunchError: the driver refused the launch.
            DestroyedError: after `destroy()`.
            BusyError: another thread is inside a call; nothing was launched.
        """
        if async_finish:
            self._check_hook(return_recv_hook, async_finish)
            numbers = {"num_tokens": num_tokens, "total_counts": total_counts, "waited_ns": waited_ns}
            call = partial(self.dispatch, x, topk_idx, topk_weights, out=out, timeout=timeout, **numbers)
            parts = (x, topk_idx, topk_weights, out if isinstance(out, torch.Tensor) else None, *numbers.values())
            return self._comm_stream.run(None, parts, call, lambda received: received.allocations)
        ops = self._alive()
        self._raise_reported()
        admission.require_real_tensors()
        self._check_hook(return_recv_hook)
        x = checks.tokens(self, x)
        num_tokens = checks.num_tokens(self, num_tokens)
        topk_idx = checks.topk_idx(self, topk_idx, x.shape[0], num_tokens)
        topk_weights = checks.topk_weights(self, topk_weights, x.shape[0])
        checks.total_counts(self, total_counts)
        checks.waiting(self, timeout, waited_ns)
        if isinstance(out, Dispatched):
            checks.reused(self, out)
            received = out
        else:
            checks.out(self, out, ops.received.tokens_shape, ops.received.dtype)
            received = ops.received.allocate(self, x.shape[0], current_stream(self.device), out)
        inputs = (("x", x), ("topk_idx", topk_idx), ("topk_weights", topk_weights), ("num_tokens", num_tokens))
        written = checks.outputs(self, out, total_counts, waited_ns, inputs)
        arguments = (x, topk_idx, topk_weights, num_tokens, received, total_counts, return_recv_hook)
        hook = self._launch(ops.dispatch, *arguments, timeout, waited_ns)
        admission.note_writes(written)
        if received is out:
            received.refilled(x.shape[0])
        if hook is None:
            return received
        return received, self._hook(hook, (*received.allocations, total_counts, waited_ns))

    @exclusive
    def allocate(
        self,
        *,
        tokens: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
        ranges: torch.Tensor | None = None,
        row_tokens: torch.Tensor | None = None,
    ) -> Dispatched:
        """Memory for the results of one dispatch, for its `out`. Tensors that are given become part of it; shapes,
        dtypes and strides are those of `Dispatched`, contiguous but for `scales`.

        Raises:
            InputError: a tensor does not fit.
        """
        received = self._alive().received
        given = checks.given_numbers(self, received.layout, counts, ranges, row_tokens)
        checks.out(self, tokens, received.tokens_shape, received.dtype)
        checks.scales(self, scales, received.scales_storage, received.scales_dtype)
        return received.allocate(self, -1, current_stream(self.device), tokens, scales, given)

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        **options: Unpack[CombineOptions],
    ) -> torch.Tensor: ...

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        *,
        return_recv_hook: Literal[True],
        **options: Unpack[CombineOptions],
    ) -> tuple[torch.Tensor, Hook]: ...

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        *,
        async_finish: Literal[True],
        **options: Unpack[CombineOptions],
    ) -> tuple[torch.Tensor, Event]: ...

    @exclusive
    def combine(
        self,
        y: torch.Tensor,
        handle: Handle,
        topk_weights: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
        timeout: float | None = None,
        waited_ns: torch.Tensor | None = None,
        renormalize: bool = False,
        return_recv_hook: bool = False,
        async_finish: bool = False,
    ) -> Any:
        """Brings the experts' outputs back and adds them: sum over a token's selections of weight * output.

        Partial sums over a rank's experts are formed in fp32 and cross the link once, rounded once to the dtype; the
        owner adds them in rank order. With a hook the owner's own partial sums are rounded once too; without, they
        never leave fp32. A token with no selection gets zeros. Every rank calls it.

        Args:
            y: [local experts, ranks * max_tokens_per_rank, hidden], rows where dispatch put them.
            handle: of the dispatch; may be used more than once.
            topk_weights: [T, topk] float32, in place of those given to dispatch. All ranks give them, or none does.
            out: the tensor for the result, as for `dispatch`; then nothing is allocated.
            timeout, waited_ns: as for `dispatch`; here it is the first partial sum of each rank that is waited for.
            renormalize: multiply the result of a token that misses experts by the sum of all its weights over the sum
                of those that are in it (by 0 if that is 0). Needs `active_ranks`.
            return_recv_hook, async_finish: as for `dispatch`; `y` may be overwritten behind the sending half.

        Returns:
            [T, hidden], T as given to dispatch; rows from `num_tokens` on are undefined.

        Raises:
            HandleError: the handle is another object's.
            InputError, SlotError, PeerTimeoutError, DestroyedError, BusyError: as `dispatch`.
        """
        if async_finish:
            self._check_hook(return_recv_hook, async_finish)
            how = {"out": out, "timeout": timeout, "waited_ns": waited_ns, "renormalize": renormalize}
            call = partial(self.combine, y, handle, topk_weights, **how)
            return self._comm_stream.run(None, (y, topk_weights, out, waited_ns), call, lambda combined: (combined,))
        ops = self._alive()
        self._raise_reported()
        admission.require_real_tensors()
        self._check_hook(return_recv_hook)
        checks.handle(self, handle)
        if ops.is_unfinished(handle):
            raise HandleError("the hook of this handle's dispatch was not called yet; call it before combine")
        y = checks.expert_outputs(self, y, ops.received.tokens_shape)
        topk_weights = checks.topk_weights(self, topk_weights, handle.num_tokens)
        shape = (handle.num_tokens, self.problem.hidden)
        checks.out(self, out, shape, self.dtype)
        renormalize = checks.flag("renormalize", renormalize)
        checks.waiting(self, timeout, waited_ns, renormalize)
        inputs = (("y", y), ("topk_weights", topk_weights), (checks.HANDLE_MEMORY, handle.memory))
        written = checks.outputs(self, out, None, waited_ns, inputs)
        if out is None:
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        arguments = (y, handle, topk_weights, out, return_recv_hook)
        hook = self._launch(ops.combine, *arguments, timeout, waited_ns, renormalize)
        admission.note_writes(written)
        return out if hook is None else (out, self._hook(hook, (out, waited_ns), handle.memory))

    @exclusive
    def warmup(self) -> None:
        """Runs each kernel once with zero tokens, so that the first real call pays for nothing. Collective."""
        x = torch.empty(0, self.problem.hidden, dtype=self.dtype, device=self.device)
        ids = torch.empty(0, self.problem.num_topk, dtype=torch.int64, device=self.device)
        weights = torch.empty(0, self.problem.num_topk, dtype=torch.float32, device=self.device)
        received = self.dispatch(x, ids)
        y = torch.empty(received.tokens.shape, dtype=self.dtype, device=self.device)
        self.combine(y, received.handle)
        self.combine(y, received.handle, weights)
        if self.problem.hooks:
            received, receive = self.dispatch(x, ids, out=received, return_recv_hook=True)
            receive()
            for given in (None, weights):
                _, receive = self.combine(y, received.handle, given, return_recv_hook=True)
                receive()
        self.synchronize()
