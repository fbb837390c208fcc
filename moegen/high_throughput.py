# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput`: dispatch and combine for thousands of tokens per rank, forward and backward."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from moegen import checks, row_checks
from moegen.errors import InputError
from moegen.rows import DispatchedRows, RowsHandle
from moegen.runtime.agreement import load_on_all_ranks, raise_on_all_ranks
from moegen.runtime.high_throughput import HighThroughputOps
from moegen.runtime.lifecycle import Lifecycle
from moegen.runtime.low_latency import FIRST_EPOCH
from moegen.runtime.row_memory import Numbers, RowMemory, Rows
from moegen.runtime.streams import CommStream, current_stream, record
from moegen.runtime.worlds import RankWorld, as_rank_world
from moegen.select import select_rows

log = logging.getLogger(__name__)

Given = tuple[torch.Tensor, torch.Tensor]
"""FP8 tokens and their scales."""


class HighThroughput(Lifecycle[HighThroughputOps]):
    """Expert-parallel dispatch and combine of many tokens, for one shape of MoE layer. Making one is collective.

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
        num_sms: int | None = None,
        timeout: float = 30.0,
        device: str | torch.device | None = None,
        first_epoch: int = FIRST_EPOCH,
    ) -> None:
        checks.one_of("mode", mode, ("capacity", "exact"))
        checks.in_range("first_epoch", first_epoch, FIRST_EPOCH, 2**32 - 1)
        checks.in_range("alignment", alignment, 1, 2**16)
        if num_sms is not None:
            checks.in_range("num_sms", num_sms, 1, 1024)
        checks.seconds("timeout", timeout)
        self.world: RankWorld = as_rank_world(group_or_world, device)
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
            on_host=self.world.device.type == "cpu",
        )
        self.mode, self.alignment = mode, alignment
        self.dtype, self.scale_dtype = dtype, scale_dtype
        self.device = self.world.device
        settings = (mode, alignment, timeout, first_epoch)
        self.selection, self.kernels = load_on_all_ranks(self.world, self.problem, settings, select_rows)
        self._comm_stream = CommStream(self.device)
        failure: Exception | None = None
        try:
            self._ops = HighThroughputOps(
                self.world,
                self.problem,
                self.selection,
                self.kernels,
                alignment=alignment,
                timeout=timeout,
                num_sms=num_sms,
                first_epoch=first_epoch,
            )
            self._synchronize_device()
        except Exception as error:  # told to the other ranks below
            failure = error
        raise_on_all_ranks(self.world, failure, "could not make its buffers")
        log.info(
            "rank %d of %s: family ht, path ipc, %s",
            self.world.rank,
            self.world.description,
            self.selection.dispatch.stem,
        )

    @property
    def rank(self) -> int:
        return self.world.rank

    @property
    def num_ranks(self) -> int:
        return self.world.size

    @property
    def local_experts(self) -> range:
        """The expert ids that this rank holds."""
        return self.problem.local_experts(self.rank)

    @property
    def buffer_bytes(self) -> int:
        """Symmetric memory that this object holds on each rank."""
        return self._alive().buffer_bytes

    @property
    def row_memory(self) -> RowMemory:
        """What results look like."""
        return self._alive().row_memory

    @property
    def max_rows(self) -> int:
        """Rows that a dispatch has room for in mode "capacity", if the call does not say."""
        return self._alive().row_memory.capacity

    def dispatch(
        self,
        x: torch.Tensor | Given,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        handle: RowsHandle | None = None,
        num_tokens: torch.Tensor | None = None,
        max_rows: int | None = None,
        out: torch.Tensor | None = None,
        out_scales: torch.Tensor | None = None,
        total_counts: torch.Tensor | None = None,
        timeout: float | None = None,
    ) -> DispatchedRows:
        """Sends every token to the ranks that hold its experts. Every rank calls it, also with zero tokens.

        Args:
            x: [T, hidden], 0 <= T <= max_tokens_per_rank; T may differ between ranks and calls. If this object was made
                for FP8 tokens: (tokens, scales [T, hidden / 128], or [T, hidden / 512] packed).
            topk_idx: [T, topk], int32 or int64, ids in [-1, num_experts); -1 selects nothing. The same expert twice
                in one row is two selections that share one row of layout `packed`.
            topk_weights: [T, topk] float32; they travel with the tokens. None: ones.
            handle: of an earlier dispatch, in place of topk_idx and topk_weights: the same routing, not counted again.
                All ranks give theirs of the same dispatch. The result has no topk_idx and topk_weights.
            num_tokens: int32 [1] on the device: how many of the T tokens count, read when the kernel runs.
            max_rows: room of the result in mode "capacity", instead of room for whatever may come. If more rows come,
                they are left out and the next call or `check()` raises CapacityError.
            out, out_scales: tensors for `DispatchedRows.tokens` and `scales`, in mode "capacity" or with a handle; the
                scales may have any strides.
            total_counts: int32 [local experts] on the device, to which the counts of this call are added.
            timeout: seconds, for this call in place of the object's.

        Raises:
            InputError: an argument does not fit; nothing was launched.
            PeerTimeoutError: this or an earlier call waited for a rank in vain.
            InvalidRoutingError: an earlier call on a GPU met an id that names no expert.
            CapacityError: more tokens than this object was made for; or more rows came to an earlier call than fitted.
            LaunchError: the driver refused the launch.
            DestroyedError: after `destroy()`.
        """
        ops = self._alive()
        self.check()
        data, scales = row_checks.given_tokens(self, x)
        checks.total_counts(self, total_counts)
        if timeout is not None:
            checks.seconds("timeout", timeout)
        if handle is not None:
            row_checks.same_routing(
                self, handle, data.shape[0], topk_idx, topk_weights, num_tokens, total_counts, max_rows
            )
            row_checks.rows_out(self, out, out_scales, handle.rows)
            rows = ops.row_memory.rows(handle.rows, selections=False, tokens=out, scales=out_scales)
            self._note_use(handle)
            self._launch(
                ops.dispatch, "rows", data, scales, None, None, None, None, handle.addresses, rows, None, timeout
            )
            return self._of_handle(handle, rows)
        if topk_idx is None:
            raise InputError("dispatch takes topk_idx, or the handle of a dispatch with the same routing")
        checks.num_tokens(self, num_tokens)
        topk_idx = checks.topk_idx(self, topk_idx, data.shape[0], num_tokens)
        topk_weights = checks.topk_weights(self, topk_weights, data.shape[0])
        numbers = ops.row_memory.numbers()
        arguments = (data, scales, topk_idx, topk_weights, num_tokens, numbers, numbers.addresses)
        if self.mode == "exact":
            row_checks.exact(self, max_rows, out, out_scales)
            return self._dispatch_exactly(ops, arguments, numbers, total_counts, timeout)
        number = row_checks.room(self, max_rows, ops.row_memory.capacity, out)
        row_checks.rows_out(self, out, out_scales, number)
        rows = ops.row_memory.rows(number, selections=True, tokens=out, scales=out_scales)
        self._launch(ops.dispatch, "whole", *arguments, rows, total_counts, timeout)
        return self._result(numbers, rows, data.shape[0], None)

    def _dispatch_exactly(
        self,
        ops: HighThroughputOps,
        arguments: tuple[Any, ...],
        numbers: Numbers,
        total_counts: torch.Tensor | None,
        timeout: float | None,
    ) -> DispatchedRows:
        """Two launches, and in between the host learns how many rows come; torch lets go of the GIL while it waits."""
        self._launch(ops.dispatch, "plan", *arguments, None, total_counts, timeout)
        experts = len(self.local_experts)
        told = torch.cat((numbers.first_rows[-1:], numbers.first_slots[-1:], numbers.counts)).tolist()
        self._raise_by(ops.raise_expired)  # nothing else: the other ranks make the second launch too
        packed = self.problem.layout == "packed"
        rows = ops.row_memory.rows(told[1] if packed else told[0], selections=True)
        data, scales, *_ = arguments
        self._launch(ops.dispatch, "rows", data, scales, None, None, None, None, numbers.addresses, rows, None, timeout)
        return self._result(numbers, rows, data.shape[0], told[2 : 2 + experts])

    def _result(self, numbers: Numbers, rows: Rows, num_tokens: int, host_counts: list[int] | None) -> DispatchedRows:
        stream = current_stream(self.device)
        handle = RowsHandle(
            self, num_tokens, rows.tokens.shape[0], numbers.memory, numbers.addresses, stream, numbers, host_counts
        )
        return self._of_handle(handle, rows)

    def _of_handle(self, handle: RowsHandle, rows: Rows) -> DispatchedRows:
        numbers = handle.numbers
        return DispatchedRows(
            rows.tokens,
            rows.scales,
            rows.topk_idx,
            rows.topk_weights,
            numbers.counts,
            numbers.first_slots if self.problem.layout == "packed" else None,
            numbers.first_rows,
            numbers.row_tokens,
            handle.host_counts,
            handle,
        )

    def _note_use(self, handle: RowsHandle) -> None:
        """The handle may be dropped before this stream has read it."""
        if handle.stream != current_stream(self.device):
            record(self.device, (handle.memory,))

    def combine(
        self,
        y: torch.Tensor,
        handle: RowsHandle,
        topk_weights: torch.Tensor | None = None,
        *,
        bias: torch.Tensor | Sequence[torch.Tensor] = (),
        out: torch.Tensor | None = None,
        timeout: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Brings rows back to their tokens' owners, who add them in the order of the ranks, in fp32.

        From layout `token`: the plain sum of a token's rows. From layout `packed`: the sum over its selections of
        weight * row, with the weights given to dispatch; a rank's part is formed in fp32 and rounded once before it
        crosses the link, but for the owner's own. A token without rows gets zeros (and the bias). Every rank calls it.

        Args:
            y: [rows, hidden] bfloat16, rows where dispatch put them.
            handle: of the dispatch; may be used more than once.
            topk_weights: [rows, topk] float32 beside `y` in layout `token`, added up like the rows: the second result.
                All ranks give them, or none does.
            bias: one or two tensors [T, hidden] bfloat16 that are added to this rank's sums.
            out: the tensor for the result.
            timeout: as for `dispatch`.

        Returns:
            [T, hidden] bfloat16, T as given to dispatch (rows from its `num_tokens` on are undefined), and
            [T, topk] float32, or None.

        Raises:
            HandleError: the handle is another object's.
            InputError, PeerTimeoutError, DestroyedError: as `dispatch`.
        """
        ops = self._alive()
        self.check()
        row_checks.handle(self, handle)
        y = row_checks.outputs(self, y, handle.rows)
        topk_weights = row_checks.weights(self, topk_weights, handle.rows)
        shape = (handle.num_tokens, self.problem.hidden)
        biases = row_checks.biases(self, bias, shape)
        row_checks.combined_out(self, out, shape)
        if timeout is not None:
            checks.seconds("timeout", timeout)
        if out is None:
            out = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        sums = None
        if topk_weights is not None:
            sums = torch.empty(handle.num_tokens, self.problem.num_topk, dtype=torch.float32, device=self.device)
        self._launch(ops.combine, y, handle, topk_weights, biases, out, sums, timeout)
        return out, sums

    def warmup(self) -> None:
        """Runs each kernel once with zero tokens, so that the first real call pays for nothing. Collective."""
        tokens = torch.empty(0, self.problem.hidden, dtype=self.dtype, device=self.device)
        scales = torch.empty(0, self.selection.dispatch.scale_words, dtype=self.scale_dtype, device=self.device)
        x = (tokens, scales) if self.selection.dispatch.format.given else tokens
        ids = torch.empty(0, self.problem.num_topk, dtype=torch.int64, device=self.device)
        received = self.dispatch(x, ids)
        self.dispatch(x, handle=received.handle)
        self.combine(torch.empty(received.tokens.shape, dtype=torch.bfloat16, device=self.device), received.handle)
        self.synchronize()
