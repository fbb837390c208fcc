# SPDX-License-Identifier: Apache-2.0
"""`OneSided`: dispatch of any payloads into buffers by source rank, and combine of what experts made of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, overload

import torch

from moegen import admission, checks, payload_checks, payload_results
from moegen.kernels.a2a import OneSidedCombine
from moegen.kernels.coll import for_exact
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec
from moegen.payloads import DispatchedPayloads, PayloadsHandle, Quantised
from moegen.runtime.agreement import load_on_all_ranks, raise_on_all_ranks
from moegen.runtime.collective import CollectiveOps
from moegen.runtime.low_latency import FIRST_EPOCH
from moegen.runtime.membership import Membership
from moegen.runtime.one_sided import OneSidedOps
from moegen.runtime.ownership import exclusive, lasting
from moegen.runtime.paths import PATHS, choose
from moegen.runtime.staged import Staged
from moegen.runtime.streams import current_stream, record
from moegen.runtime.worlds import as_rank_world
from moegen.select import OneSidedSelection, combine_spec, dispatch_spec, open_spec
from moegen.tuning.exchange import EXCHANGES, ExchangeRule

log = logging.getLogger(__name__)

Tensor = torch.Tensor


class OneSided(Membership[OneSidedOps | CollectiveOps], Staged):
    """One rank's end of a one-sided all-to-all. Collective to make and to call: every rank makes the same calls.

    Dispatch pushes one copy of a token's payloads, of whatever dtypes and widths, to every rank that holds one of its
    experts, into a buffer by source rank; combine pushes one row per (token, rank) back, and the token's owner adds
    them up. Ranks may have no tokens. The protocol is in docs/design.md. One thread at a time uses an object: while a
    call is being made, any other thread's raises BusyError.

    Args:
        group_or_world: a torch process group, a rank world (`LocalWorld(...).run`), or None for the default group.
        num_experts: of all ranks; the first `num_experts % ranks` ranks hold one more than the others.
        num_topk: selections per token.
        max_tokens_per_rank: capacity: tokens that a rank may dispatch at once.
        payload_bytes: room for a token's payloads: the sum of their bytes per token, at most.
        hidden: elements of combine's rows.
        dtype: of combine's rows: bfloat16, float16, float32 or float8_e4m3fn. Rows of another of these may be given to
            combine, if they have no more bytes.
        payloads: (columns, dtype) of each payload of the first dispatches, whose kernel is then loaded here. One for
            another set is loaded by the first dispatch that has it, on all ranks.
        path: "ipc": ranks map each other's memory; "collective": an all-to-all of torch.distributed on whatever backend
            the group has, no mask; "auto": ipc where it is possible.
        exchange: of path collective. "padded": one all-to-all each way, of as many rows as the call has room for, which
            a graph may hold; "exact": dispatch exchanges counts first, for which the host waits, and only rows that are
            needed cross, in combine too; "auto": what `moegen.tuning.exchange` expects to be faster, padded while a
            stream captures. Results are the same.
        copy: how dispatch moves wide payloads: "vec" (through registers), "bulk" (by bulk copies through shared memory,
            which GPUs have from sm_90 on), or "auto": "vec", which bench/results found faster everywhere.
        expert_rows: make room for `expert_rows()`, where experts may write what combine then reads from there.
        warp_groups: e.g. "1x14"; None: what is fastest.
        num_sms: thread blocks per launch at most; None: as many as are useful.
        timeout: seconds that a call may wait for one thing from another rank before it fails with PeerTimeoutError.
        device: where a process group's tensors are; None: the current GPU, else the CPU.

    All arguments but `num_sms` and `device` must be equal on all ranks.

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
        max_tokens_per_rank: int,
        payload_bytes: int,
        hidden: int,
        dtype: torch.dtype = torch.bfloat16,
        payloads: Sequence[tuple[int, torch.dtype]] = (),
        path: str = "auto",
        exchange: str = "auto",
        copy: str = "auto",
        expert_rows: bool = False,
        warp_groups: str | None = None,
        num_sms: int | None = None,
        timeout: float = 30.0,
        device: str | torch.device | None = None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        first_epoch = checks.in_range("first_epoch", first_epoch, FIRST_EPOCH, 2**32 - 1)
        num_sms = checks.num_sms(num_sms)
        checks.seconds("timeout", timeout)
        admission.require_real_tensors()
        self.world = as_rank_world(group_or_world, device, timeout)
        self.device = self.world.device
        checks.one_of("path", path, ("auto", *PATHS))
        checks.one_of("exchange", exchange, EXCHANGES)
        self.problem = payload_checks.problem(
            self.world.size,
            num_experts=num_experts,
            num_topk=num_topk,
            hidden=hidden,
            max_tokens_per_rank=max_tokens_per_rank,
            payload_bytes=payload_bytes,
            dtype=dtype,
            warp_groups=warp_groups,
            copy=payload_checks.copy(self, copy),
            path=choose(self.world, path),
            on_host=self.device.type == "cpu",
        )
        hidden, max_tokens_per_rank = self.problem.hidden, self.problem.max_tokens
        payload_bytes = checks.integer("payload_bytes", payload_bytes)
        self.dtype, self.payload_bytes, self._expert_rows = dtype, payload_bytes, expert_rows
        self.combine_bytes = hidden * dtype.itemsize
        self._settings = (payload_bytes, expert_rows, timeout, first_epoch, exchange)
        self.exchange, self._rule = exchange, ExchangeRule(self.problem, exchange)
        self._may_be_exact = self._rule.is_exact(max_tokens_per_rank, payload_bytes + self.combine_bytes)
        foreseen = self._with_others(self._combine_spec(dtype, payload_checks.usual_out(dtype)), self._may_be_exact)
        if self.problem.path == "collective":
            foreseen.append(open_spec(self.problem))
        elif expert_rows:
            foreseen.append(self._combine_spec(dtype, payload_checks.usual_out(dtype), pulls=True))
        if payloads:
            widths = payload_checks.foreseen(payloads)
            payload_checks.room(self, widths)
            foreseen += self._with_others(dispatch_spec(self.problem, widths), self._may_be_exact)
        self._chosen: dict[Hashable, Any] = {}
        kernels = self._load(foreseen)
        failure: Exception | None = None
        try:
            self._ops = self._make_ops(num_sms)
            for kernel in kernels:
                self._ops.bind(kernel)
            self._synchronize_device()
        except Exception as error:  # told to the other ranks below
            failure = error
        raise_on_all_ranks(self.world, failure, "could not make its buffers")
        described = (self.world.rank, self.world.description, self.problem.path, foreseen[0].stem)
        log.info("rank %d of %s: path %s, kernel %s", *described)

    def _make_ops(self, num_sms: int | None) -> OneSidedOps | CollectiveOps:
        payload_bytes, expert_rows, timeout, first_epoch, _ = self._settings
        sizes = {"payload_bytes": payload_bytes, "combine_bytes": self.combine_bytes}
        how: dict[str, Any] = {"timeout": timeout, "num_sms": num_sms, "first_epoch": first_epoch}
        if self.problem.path == "collective":
            return CollectiveOps(self.world, self.problem, **sizes, **how, may_be_exact=self._may_be_exact)
        return OneSidedOps(self.world, self.problem, **sizes, expert_rows=expert_rows, **how)

    @exclusive
    def dispatch(
        self,
        topk_idx: Tensor,
        payloads: Sequence[Tensor],
        *,
        max_tokens: int | None = None,
        num_tokens: Tensor | None = None,
        unused_ids: tuple[int, int] | None = None,
        stats: Tensor | None = None,
        active_ranks: int | None = None,
        timeout: float | None = None,
    ) -> DispatchedPayloads:
        """Sends every token's payloads to the ranks that hold its experts. Every rank calls it, also with zero tokens.

        Args:
            topk_idx: [T, topk], int32 or int64, ids in [-1, num_experts); -1 selects nothing. 0 <= T <= max_tokens; T
                may differ between ranks and calls.
            payloads: 1 to 16 tensors [T, columns] of any dtype. All ranks give the same dtypes and columns. What an
                earlier dispatch returned has to be cloned before it is sent on: it lies where others write now.
            max_tokens: rows of the result per source, equal on all ranks; it may change from call to call. None:
                max_tokens_per_rank.
            num_tokens: int32 [1] on the device: how many of the T tokens count, read when the kernel runs, so that
                one captured graph serves every batch size, none included.
            unused_ids: (index of an int32 payload, value): its rows that nothing came for are filled with the value.
            stats: int32 [words], at most 1,024: numbers of this rank that every rank gets with the call. Those of ranks
                that take no part are zeros.
            active_ranks: bit r: rank r takes part. The others are neither sent to nor waited for, and make no calls;
                they cannot return. A kernel that is not loaded raises MissingKernelError then. None: all ranks.
            timeout: seconds, for this call in place of the object's.

        Raises:
            InputError: an argument does not fit; nothing was launched.
            CapacityError: more tokens, or wider payloads, than there is room for; nothing was launched.
            DifferentCallError: ranks gave different payloads, max_tokens, stats or active_ranks; from then on.
            PeerTimeoutError: this or an earlier call waited for a rank in vain.
            InvalidRoutingError: an earlier call on a GPU met an id that names no expert.
            MissingKernelError: the first dispatch of this set of payloads, while a stream captures.
            LaunchError: the driver refused the launch.
            DestroyedError: after `destroy()`.
            BusyError: another thread is inside a call of this object; nothing was launched.
        """
        ops = self._alive()
        self._raise_reported()
        admission.require_real_tensors()
        slots = payload_checks.slots(self, max_tokens)
        moved = payload_checks.payloads(self, payloads, slots)
        num_tokens = checks.num_tokens(self, num_tokens)
        topk_idx = checks.topk_idx(self, topk_idx, moved[0].shape[0], num_tokens)
        unused_ids = payload_checks.unused_ids(unused_ids, moved)
        stats = payload_checks.stats(self, stats)
        payload_checks.lie_elsewhere(ops.shown, moved, topk_idx, num_tokens, stats)
        active = payload_checks.active(self, active_ranks)
        checks.seconds_of_call(timeout)
        widths = tuple(part.shape[1] * part.element_size() for part in moved)
        exact = payload_checks.exact(self, self._rule.is_exact(slots, sum(widths) + self.combine_bytes))
        spec = self._ready((widths, exact), active, exact, partial(dispatch_spec, self.problem, widths))
        memory, addresses = self._routing(moved[0].shape[0])
        gathered = None if stats is None else torch.empty(
            self.num_ranks, stats.numel(), dtype=torch.int32, device=self.device
        )  # fmt: skip
        exchanged = self._launch(
            ops.dispatch, spec, moved, topk_idx, num_tokens, addresses, slots, stats, gathered, unused_ids, active,
            timeout, exact,
        )  # fmt: skip
        admission.note_writes((ops.memory.local,))
        stream = current_stream(self.device)
        handle = PayloadsHandle(self, moved[0].shape[0], slots, memory, addresses, stream, exchanged)
        views = ops.views(moved, widths, slots, 0 if stats is None else stats.numel())
        return DispatchedPayloads(views, memory[-self.num_ranks :], gathered, handle)

    @overload
    def combine(
        self,
        y: Tensor,
        handle: PayloadsHandle,
        *,
        out_dtype: torch.dtype | None = None,
        out: Tensor | None = None,
        active_ranks: int | None = None,
        timeout: float | None = None,
    ) -> Tensor: ...

    @overload
    def combine(
        self,
        y: Tensor,
        handle: PayloadsHandle,
        *,
        out: Quantised | None = None,
        quantize: str,
        output_scale: Tensor | None = None,
        scale_layout: str = "linear",
        active_ranks: int | None = None,
        timeout: float | None = None,
    ) -> Quantised: ...

    @exclusive
    def combine(
        self,
        y: Tensor,
        handle: PayloadsHandle,
        *,
        out_dtype: torch.dtype | None = None,
        out: Tensor | Quantised | None = None,
        quantize: str | None = None,
        output_scale: Tensor | None = None,
        scale_layout: str = "linear",
        active_ranks: int | None = None,
        timeout: float | None = None,
    ) -> Tensor | Quantised:
        """Brings rows back to where their tokens came from and adds those of a token up: in fp32, in the order of the
        ranks, rounded once. A token that went nowhere gets zeros. Every rank calls it.

        Args:
            y: [ranks, max_tokens, hidden], max_tokens as in that dispatch: row (s, i) is what this rank's experts made
                of row (s, i) of dispatch, weights included. It may lie anywhere; either all ranks give `expert_rows()`
                or none does. Other rows mean nothing.
            handle: of the dispatch, on all ranks the same one; may be used more than once.
            out_dtype: bfloat16, float16 or float32. None: that of y, or bfloat16 if that is float8_e4m3fn.
            out: the tensor for the result, whose dtype then counts, or with `quantize` those of a `Quantised`; nothing
                is allocated. It shares no memory with an input, nor with what dispatch returned.
            quantize: "mxfp8" or "nvfp4": the fp32 sums become e4m3 or e2m1 numbers that share scales, by the rules of
                `moegen.reference_quantise`. MXFP8's scale is the least power of two that brings a group to 448 or
                less: the OCP specification (MX v1.0, 6.3) rounds it down instead, so that elements saturate; rounding
                up loses none, and is what TensorRT-LLM's and FlashInfer's kernels do. A group with a NaN or an
                infinity becomes NaN. hidden is a multiple of 32 or 16.
            output_scale: float32 [1] on the device, positive: what NVFP4 multiplies sums by; None: 1.
            scale_layout: "linear" or "128x4", of `Quantised`; there the columns beyond a row's groups are zero, and the
                rows beyond T are undefined.
            active_ranks, timeout: as for `dispatch`. Rows of ranks that take no part are left out.

        Returns:
            [T, hidden], T as given to dispatch, or a `Quantised` of that; rows from `num_tokens` on are undefined.

        Raises:
            HandleError: the handle is another object's, or of one that was destroyed.
            InputError, PeerTimeoutError, MissingKernelError, LaunchError, DestroyedError, BusyError: as `dispatch`.
        """
        ops = self._alive()
        self._raise_reported()
        admission.require_real_tensors()
        payload_checks.handle(self, handle)
        y = payload_checks.outputs(self, y, handle.max_tokens)
        if ops.receives_in(y):
            y = y.clone()  # when combine begins, other ranks may dispatch again, and write there
        to = payload_results.destination(
            self, y.dtype, handle.num_tokens, out_dtype=out_dtype, out=out, quantize=quantize,
            output_scale=output_scale, scale_layout=scale_layout,
        )  # fmt: skip
        payload_checks.combined_apart(to.given, ops.memory.local, y, to.output_scale, handle)
        active = payload_checks.active(self, active_ranks)
        checks.seconds_of_call(timeout)
        word = payload_checks.WORDS[y.dtype]
        pulls, exact = ops.holds(y), handle.exchanged is not None
        choose = partial(combine_spec, self.problem, word, to.word, pulls=pulls)
        spec = self._ready((word, to.word, pulls, exact), active, exact, choose)
        if handle.stream != current_stream(self.device):  # the handle may be dropped before this stream has read it
            record(self.device, (handle.memory,))
        self._launch(ops.combine, spec, y, to.addresses, handle, active, timeout)
        admission.note_writes([tensor for _, tensor in to.given])
        return to.made

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The kernels that are loaded so far."""
        return self._alive().specs

    @exclusive
    def expert_rows(self, max_tokens: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Memory for combine's `y`, which the other ranks read where it lies; an object made with `expert_rows` has it.
        What was given to a combine may be overwritten behind the next dispatch that all ranks take part in.

        Args:
            max_tokens: of the dispatch; None: max_tokens_per_rank.
            dtype: of the rows; None: the object's.

        Returns:
            [ranks, max_tokens, hidden], always the same memory.

        Raises:
            InputError: the object was made without, or has no room for such rows.
        """
        ops = self._alive()
        slots = payload_checks.slots(self, max_tokens)
        payload_checks.expert_rows(self, self._expert_rows, dtype)
        return ops.expert_rows(slots, self.problem.hidden, self.dtype if dtype is None else dtype)

    @exclusive
    def warmup(self) -> None:
        """One dispatch and combine of zero tokens, with a payload of at most 16 bytes per token. Collective.

        A payload set that was not named when this was made still loads its kernel at its first dispatch.
        """
        ids = torch.empty(0, self.problem.num_topk, dtype=torch.int64, device=self.device)
        payload = torch.empty(0, min(16, self.payload_bytes), dtype=torch.uint8, device=self.device)
        received = self.dispatch(ids, [payload])
        y = torch.empty(
            self.num_ranks, self.problem.max_tokens, self.problem.hidden, dtype=self.dtype, device=self.device
        )
        self.combine(y, received.handle)
        self.synchronize()

    def _ready(self, key: Hashable, active: int, exact: bool, choose: Callable[[], Spec]) -> Any:
        """The Spec that `choose` gives for the key, once the call's kernels are loaded: the first time on all ranks,
        none of which launches before.
        """
        spec = self._chosen.get(key)
        if spec is None:
            ops, spec = self._alive(), choose()
            missing = [each for each in self._with_others(spec, exact) if not ops.knows(each)]
            if missing:
                payload_checks.everyone_loads(self, missing[0], active)
                for kernel in self._load(missing):
                    ops.bind(kernel)
                self.world.barrier()
            self._chosen[key] = spec
        return spec

    @staticmethod
    def _with_others(spec: Spec, exact: bool) -> list[Spec]:
        """The kernel, and the others that its call launches."""
        return [spec, *for_exact(spec)] if exact else [spec]

    def _combine_spec(self, dtype: torch.dtype, out: torch.dtype, *, pulls: bool = False) -> OneSidedCombine:
        return combine_spec(self.problem, payload_checks.WORDS[dtype], payload_checks.WORDS[out], pulls=pulls)

    def _load(self, specs: Sequence[Spec]) -> Any:
        def select(problem: Problem) -> OneSidedSelection:
            return OneSidedSelection(tuple(specs))

        return load_on_all_ranks(self.world, self.problem, self._settings, select)[1]

    def _routing(self, tokens: int) -> tuple[Tensor, tuple[int, ...]]:
        """New memory for a routing: 64-bit masks first, the counts last; and the addresses in it."""
        ranks, destinations = self.num_ranks, min(self.num_ranks, self.problem.num_topk)
        memory = torch.empty(tokens * (2 + destinations) + 1 + ranks, dtype=torch.int32, device=self.device)
        *addresses, _ = accumulate((8 * tokens, 4 * tokens * destinations, 4, 4 * ranks), initial=memory.data_ptr())
        return memory, tuple(addresses)
