# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput`: dispatch and combine for thousands of tokens per rank, forward and backward."""

from __future__ import annotations

import itertools
import logging
import weakref
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from moegen import admission, checks, row_checks
from moegen.errors import DestroyedError, InputError
from moegen.row_calls import RowCalls
from moegen.rows import (
    DispatchedRows,
    Given,
    Layout,
    RowCombineOptions,
    RowDispatchOptions,
    RowsHandle,
    tensors_in,
)
from moegen.runtime.agreement import load_on_all_ranks, raise_on_all_ranks
from moegen.runtime.collective_rows import CollectiveRows
from moegen.runtime.high_throughput import HighThroughputOps
from moegen.runtime.low_latency import FIRST_EPOCH
from moegen.runtime.ownership import exclusive, lasting
from moegen.runtime.paths import PATHS, choose
from moegen.runtime.staged import Staged
from moegen.runtime.streams import CommStream, Event
from moegen.runtime.worlds import as_rank_world
from moegen.select import CollectiveRowSelection, select_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

log = logging.getLogger(__name__)


_made: weakref.WeakValueDictionary[int, HighThroughput] = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


def _name(made_for: object) -> int:
    """The next number, with a digest of what the sizes of results follow from. torch.compile keeps graphs on disk and
    finds them by the numbers in them; results of the operators must then have the sizes that they had.
    """
    return zlib.crc32(repr(made_for).encode()) << 24 | next(_numbers)


class HighThroughput(RowCalls, Staged):
    """Expert-parallel dispatch and combine of many tokens, for one shape of MoE layer. Making one is collective.

    One thread at a time uses an object: while a call is being made, any other thread's raises BusyError.
    All ranks make the same calls in the same order. Calls that may overlap on a GPU (two streams, two objects) need an
    order that is the same on all ranks, or a `num_sms` that leaves room for both.

    Args:
        group_or_world: a torch process group (gloo or nccl; None: the default one), or the rank_world that
            `LocalWorld.run` passes to its function.
        num_experts: experts of all ranks together; rank r holds a contiguous share, the first `num_experts % ranks`
            ranks one more than the others.
        num_topk: experts that a token selects.
        hidden: elements of a token; a token is a multiple of 16 bytes.
        max_tokens_per_rank: capacity: tokens that a rank may dispatch in one call. Sizes the buffers.
        layout: of what dispatch returns: "token" (a row per token that comes) or "packed" (a row per local expert that
            it selects, rows of an expert contiguous, for grouped GEMM); see `DispatchedRows`.
        mode: "capacity": results have room for whatever may come, counts stay on the device, nothing waits for the
            host, and a graph may be captured. "exact": the host learns the counts, and results have as many rows.
        alignment: in layout "packed" an expert's first row is a multiple of this.
        dtype: of the tokens given to dispatch: torch.bfloat16, or torch.float8_e4m3fn, which come with their scales.
            What combine takes and returns is bfloat16.
        scale_dtype: of scales of given FP8 tokens: torch.float32, one per 128 elements, or torch.int32 (four UE8M0).
        quantize: how dispatch sends bfloat16 tokens: None (as they are), "fp8", "fp8_pow2" or "fp8_ue8m0", as
            `ExpertParallel`.
        borrow: dispatch of layout "token" moves no rows: `DispatchedRows.tokens` and `scales` are views of the receive
            buffer, [ranks, max_tokens_per_rank, ...], each row at its source and its source's token (`row_tokens` says
            which those are), valid until this rank's next dispatch. Combine takes rows in the usual order.
        path: "ipc": ranks map each other's memory; "collective": an all-to-all of torch.distributed on whatever backend
            the group has, of chunks with room for whatever may come in mode "capacity", and of what is needed in mode
            "exact", without `borrow`; how long it may take, the group knows; "auto": ipc where it is possible. Results
            are the same.
        num_sms: thread blocks per launch at most; None: one for every multiprocessor.
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
        hidden: int,
        max_tokens_per_rank: int,
        layout: str = "token",
        mode: str = "capacity",
        alignment: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        scale_dtype: torch.dtype = torch.float32,
        quantize: str | None = None,
        borrow: bool = False,
        path: str = "auto",
        num_sms: int | None = None,
        timeout: float = 30.0,
        device: str | torch.device | None = None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        checks.one_of("mode", mode, row_checks.MODES)
        if borrow and mode != "capacity":
            raise InputError('borrow is for mode "capacity": there is nothing to make of the right size')
        first_epoch = checks.in_range("first_epoch", first_epoch, FIRST_EPOCH, 2**32 - 1)
        alignment = checks.in_range("alignment", alignment, 1, 2**16)
        num_sms = checks.num_sms(num_sms)
        checks.seconds("timeout", timeout)
        checks.one_of("path", path, ("auto", *PATHS))
        admission.require_real_tensors()
        self.world = as_rank_world(group_or_world, device, timeout)
        self.problem = row_checks.problem(
            self.world.size,
            num_experts=num_experts,
            num_topk=num_topk,
            hidden=hidden,
            max_tokens_per_rank=max_tokens_per_rank,
            layout=layout,
            dtype=dtype,
            scale_dtype=scale_dtype,
            quantize=quantize,
            borrow=borrow,
            on_host=self.world.device.type == "cpu",
            path=choose(self.world, path),
        )
        self.mode, self.alignment = mode, alignment
        self.dtype, self.scale_dtype = dtype, scale_dtype
        self.device = self.world.device
        self.number = _name((self.problem, mode, alignment))
        """Its name in this process: `by_number` finds it, for what can pass numbers only."""
        _made[self.number] = self
        settings = (mode, alignment, timeout, first_epoch)
        self.selection, self.kernels = load_on_all_ranks(self.world, self.problem, settings, select_rows)
        self._comm_stream = CommStream(self.device)
        failure: Exception | None = None
        try:
            self._ops = self._make_ops(num_sms, timeout, first_epoch)
            self._synchronize_device()
        except Exception as error:  # told to the other ranks below
            failure = error
        raise_on_all_ranks(self.world, failure, "could not make its buffers")
        described = (self.world.rank, self.world.description, self.problem.path, self.selection.dispatch.stem)
        log.info("rank %d of %s: path %s, kernel %s", *described)

    def _make_ops(self, num_sms: int | None, timeout: float, first_epoch: int) -> HighThroughputOps | CollectiveRows:
        made = (self.world, self.problem)
        how: dict[str, Any] = {"alignment": self.alignment, "num_sms": num_sms, "first_epoch": first_epoch}
        if isinstance(self.selection, CollectiveRowSelection):
            return CollectiveRows(*made, self.selection, self.kernels, **how)
        return HighThroughputOps(*made, self.selection, self.kernels, timeout=timeout, **how)

    @exclusive
    def layout(self, topk_idx: torch.Tensor) -> Layout:
        """Counts where this rank's tokens go. Only this rank calls it; nothing is sent.

        Args:
            topk_idx: [T, topk] as for `dispatch`; T may exceed the capacity.

        Raises:
            InputError, InvalidRoutingError, LaunchError, DestroyedError, BusyError: as `dispatch`.
        """
        ops = self._alive()
        self._raise_reported()
        admission.require_real_tensors()
        ids = checks.topk_idx(self, topk_idx, topk_idx.shape[0], None)
        return self._launch(ops.layout, ids)

    @overload
    def dispatch(
        self,
        x: torch.Tensor | Given,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        previous_event: Any = None,
        **options: Unpack[RowDispatchOptions],
    ) -> DispatchedRows: ...

    @overload
    def dispatch(
        self,
        x: torch.Tensor | Given,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        previous_event: Any = None,
        async_finish: Literal[True],
        **options: Unpack[RowDispatchOptions],
    ) -> tuple[DispatchedRows, Event]: ...

    @exclusive
    def dispatch(
        self,
        x: torch.Tensor | Given,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        previous_event: Any = None,
        async_finish: bool = False,
        **options: Unpack[RowDispatchOptions],
    ) -> Any:
        """Sends every token to the ranks that hold its experts. Every rank calls it, also with zero tokens.

        Args:
            x: [T, hidden], 0 <= T <= max_tokens_per_rank; T may differ between ranks and calls. If this object was made
                for FP8 tokens: (tokens, scales [T, hidden / 128], or [T, hidden / 512] packed).
            topk_idx: [T, topk], int32 or int64, ids in [-1, num_experts); -1 selects nothing. The same expert twice
                in one row is two selections that share one row of layout `packed`.
            topk_weights: [T, topk] float32; they travel with the tokens. None: ones.
            previous_event: an `Event` or a `torch.cuda.Event` that the call waits for.
            async_finish: run on a stream of the object, behind `previous_event` or, without one, behind what is on the
                current stream. The second result is an event; nothing of the first may be read, nor the inputs changed,
                before its `wait()`, which makes the results safe on the stream that waits.

        Options:
            handle: of an earlier dispatch, in place of topk_idx and topk_weights: the same routing, not counted again.
                All ranks give theirs of the same dispatch. The result has no topk_idx and topk_weights.
            num_tokens: int32 [1] on the device: how many of the T tokens count, read when the kernel runs.
            max_rows: room of the result in mode "capacity", instead of room for whatever may come. If more rows come,
                they are left out and the next call or `check()` raises CapacityError.
            out, out_scales: tensors for `DispatchedRows.tokens` and `scales`, in mode "capacity" or with a handle; the
                scales may have any strides by which no two share memory. Neither shares memory with an input.
            total_counts: int32 [local experts] on the device, to which the counts of this call are added.
            mode: for this call in place of the object's; all ranks say the same.
            zero_unused: rows that nothing came for are zeros, where the call makes the result.
            scales_by_column: scales that the call makes have stride 1 between rows; columns begin at 16 bytes.
            num_sms: thread blocks of this call at most, in place of the object's number.
            timeout: seconds, for this call in place of the object's.

        Raises:
            InputError: an argument does not fit; nothing was launched.
            PeerTimeoutError: this or an earlier call waited for a rank in vain.
            DifferentCallError: this or an earlier call had a mode, a handle, weights or `weighted` on some ranks only;
                raised from then on until `destroy()`.
            InvalidRoutingError: an earlier call on a GPU met an id that names no expert.
            CapacityError: more tokens than this object was made for; in mode "exact" every rank raises it if any has
                too many. Or more rows came to an earlier call than fitted.
            LaunchError: the driver refused the launch.
            DestroyedError: after `destroy()`.
            BusyError: another thread is inside a call of this object; nothing was launched.
        """
        if async_finish:
            call = partial(self._dispatch, x, topk_idx, topk_weights, **options)
            parts = x if isinstance(x, tuple) else (x,)
            inputs = (*parts, topk_idx, topk_weights, *tensors_in(options))
            return self._comm_stream.run(previous_event, inputs, call, lambda received: received.allocations)
        if previous_event is not None:
            previous_event.wait()
        return self._dispatch(x, topk_idx, topk_weights, **options)

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: RowsHandle,
        topk_weights: torch.Tensor | None = None,
        *,
        previous_event: Any = None,
        **options: Unpack[RowCombineOptions],
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...

    @overload
    def combine(
        self,
        y: torch.Tensor,
        handle: RowsHandle,
        topk_weights: torch.Tensor | None = None,
        *,
        previous_event: Any = None,
        async_finish: Literal[True],
        **options: Unpack[RowCombineOptions],
    ) -> tuple[tuple[torch.Tensor, torch.Tensor | None], Event]: ...

    @exclusive
    def combine(
        self,
        y: torch.Tensor,
        handle: RowsHandle,
        topk_weights: torch.Tensor | None = None,
        *,
        previous_event: Any = None,
        async_finish: bool = False,
        **options: Unpack[RowCombineOptions],
    ) -> Any:
        """Brings rows back to their tokens' owners, who add them in the order of the ranks, in fp32.

        From layout `token`: the plain sum of a token's rows. From layout `packed`: the sum over its selections of
        weight * row, with the weights given to dispatch; a rank's part is formed in fp32 and rounded once before it
        crosses the link, but for the owner's own. A token without rows gets zeros (and the bias). Every rank calls it.

        Args:
            y: [rows, hidden] bfloat16, rows where dispatch put them.
            handle: of the dispatch; may be used more than once.
            topk_weights: float32 beside `y`, brought back like the rows: the second result. [rows, topk] in layout
                `token`, where they are added up; [rows] in layout `packed`, one of each selection. All ranks give
                them, or none does.
            previous_event, async_finish: as for `dispatch`.

        Options:
            bias: one or two tensors [T, hidden] bfloat16 that are added to this rank's sums.
            weighted: False: layout `packed` adds rows up without their weights, each once, also where a token selects
                an expert twice. All ranks say the same.
            out: the tensor for the result. It may be one of `bias`, and shares no memory with other inputs.
            num_sms, timeout: as for `dispatch`.

        Returns:
            [T, hidden] bfloat16, T as given to dispatch (rows from its `num_tokens` on are undefined), and
            [T, topk] float32, or None.

        Raises:
            HandleError: the handle is another object's.
            InputError, PeerTimeoutError, DestroyedError, BusyError: as `dispatch`.
        """
        if async_finish:
            call = partial(self._combine, y, handle, topk_weights, **options)
            inputs = (y, topk_weights, *tensors_in(options))
            return self._comm_stream.run(previous_event, inputs, call, lambda sums: sums)
        if previous_event is not None:
            previous_event.wait()
        return self._combine(y, handle, topk_weights, **options)

    @exclusive
    def warmup(self) -> None:
        """Runs each kernel once with zero tokens, so that the first real call pays for nothing. Collective."""
        tokens = torch.empty(0, self.problem.hidden, dtype=self.dtype, device=self.device)
        scales = torch.empty(0, self.selection.dispatch.scale_words, dtype=self.scale_dtype, device=self.device)
        x = (tokens, scales) if self.selection.dispatch.format.given else tokens
        ids = torch.empty(0, self.problem.num_topk, dtype=torch.int64, device=self.device)
        self.layout(ids)
        for mode in ("capacity",) if self.problem.borrowed else row_checks.MODES:
            received = self.dispatch(x, ids, mode=mode)
        self.dispatch(x, handle=received.handle)
        y = torch.empty(received.handle.rows, self.problem.hidden, dtype=torch.bfloat16, device=self.device)
        self.combine(y, received.handle)
        self.synchronize()


def by_number(number: int) -> HighThroughput:
    """The object whose `number` this is.

    Raises:
        DestroyedError: it is gone.
    """
    found = _made.get(number)
    if found is None:
        raise DestroyedError(f"HighThroughput number {number} is gone; keep the object until the last backward")
    return found
