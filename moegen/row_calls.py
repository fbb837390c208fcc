# SPDX-License-Identifier: Apache-2.0
"""What `HighThroughput` does when it is called: checks, memory, launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from moegen import admission, checks, row_checks
from moegen.errors import InputError
from moegen.rows import DispatchedRows, Given, RowsHandle
from moegen.runtime.collective_rows import CollectiveRows
from moegen.runtime.high_throughput import HighThroughputOps
from moegen.runtime.membership import Membership
from moegen.runtime.row_memory import Numbers, RowMemory, Rows
from moegen.runtime.streams import current_stream, record
from moegen.select import CollectiveRowSelection, RowSelection

Tensor = torch.Tensor


class RowCalls(Membership[HighThroughputOps | CollectiveRows]):
    """The part of `HighThroughput` that makes calls on the current stream; it describes the arguments."""

    selection: RowSelection | CollectiveRowSelection
    mode: str
    dtype: torch.dtype
    scale_dtype: torch.dtype

    @property
    def row_memory(self) -> RowMemory:
        """What results look like."""
        return self._alive().row_memory

    @property
    def max_rows(self) -> int:
        """Rows that a dispatch has room for in mode "capacity", if the call does not say."""
        return self._alive().row_memory.capacity

    def _dispatch(
        self,
        x: Tensor | Given,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        *,
        handle: RowsHandle | None = None,
        num_tokens: Tensor | None = None,
        max_rows: int | None = None,
        out: Tensor | None = None,
        out_scales: Tensor | None = None,
        total_counts: Tensor | None = None,
        mode: str | None = None,
        zero_unused: bool = False,
        scales_by_column: bool = False,
        num_sms: int | None = None,
        timeout: float | None = None,
    ) -> DispatchedRows:
        ops = self._alive()
        self._raise_reported()
        admission.require_real_tensors()
        exact = row_checks.mode(self, mode) == "exact" and handle is None
        row_checks.borrowed(self, exact, max_rows, out, out_scales, zero_unused, scales_by_column)
        wanted = 0
        if exact:
            wanted, x, topk_idx, topk_weights = row_checks.fitting(self, x, topk_idx, topk_weights)
        data, scales = row_checks.given_tokens(self, x)
        if self.problem.borrowed:
            row_checks.lie_elsewhere(self, ops.memory.local, data, scales)
        checks.total_counts(self, total_counts)
        how = (timeout, row_checks.launch(num_sms, timeout))
        written = [tensor for tensor in (out, out_scales, total_counts) if tensor is not None]
        make = partial(ops.row_memory.rows, zeroed=zero_unused, by_column=scales_by_column)
        if handle is not None:
            row_checks.same_routing(
                self, handle, data.shape[0], topk_idx, topk_weights, num_tokens, total_counts, max_rows
            )
            row_checks.rows_out(self, out, out_scales, handle.rows)
            if written:
                inputs = (("x", data), ("scales", scales), (checks.HANDLE_MEMORY, handle.memory))
                admission.apart((("out", out), ("out_scales", out_scales)), inputs)
            rows = make(handle.rows, selections=False, tokens=out, scales=out_scales)
            self._note_use(handle)
            self._launch(ops.dispatch, "rows", data, scales, *_NO_ROUTING, handle.numbers, rows, None, *how)
            self._note_writes(written)
            return self._of_handle(handle, rows)
        if topk_idx is None:
            raise InputError("dispatch takes topk_idx, or the handle of a dispatch with the same routing")
        num_tokens = checks.num_tokens(self, num_tokens)
        topk_idx = checks.topk_idx(self, topk_idx, data.shape[0], num_tokens)
        topk_weights = checks.topk_weights(self, topk_weights, data.shape[0])
        numbers = ops.row_memory.numbers(ops.row_memory.empty_numbers())
        arguments = (data, scales, topk_idx, topk_weights, num_tokens, numbers)
        if exact:
            row_checks.exact(self, max_rows, out, out_scales)
            self._launch(ops.dispatch, "plan", *arguments, None, total_counts, *how, wanted)
            self._note_writes(written)
            numbers, arrivals, slots, counts = self._planned(numbers)
            rows = make(slots if self.problem.layout == "packed" else arrivals, selections=True)
            self._launch(ops.dispatch, "rows", data, scales, *_NO_ROUTING, numbers, rows, None, *how)
            return self._result(numbers, rows, data.shape[0], counts, arrivals)
        number = row_checks.room(self, max_rows, ops.row_memory.capacity, out)
        row_checks.rows_out(self, out, out_scales, number)
        if written:
            given = {"x": data, "scales": scales, "topk_idx": topk_idx, "topk_weights": topk_weights}
            outputs = (("out", out), ("out_scales", out_scales), ("total_counts", total_counts))
            admission.apart(outputs, (*given.items(), ("num_tokens", num_tokens)))
        rows = make(number, selections=True, tokens=out, scales=out_scales)
        self._launch(ops.dispatch, "whole", *arguments, rows, total_counts, *how)
        self._note_writes(written)
        return self._result(numbers, rows, data.shape[0])

    def _planned(self, numbers: Numbers) -> tuple[Numbers, int, int, list[int]]:
        """Waits until the host knows how many tokens each rank has for each, how many (token, rank) rows come, how many
        rows layout `packed` has, and how many each expert gets; torch lets go of the GIL.
        """
        words = (numbers.first_rows[-1:], numbers.first_slots[-1:], numbers.counts, numbers.source_counts.flatten())
        arrivals, slots, *told = self._launch(self._read, torch.cat(words))
        self._raise_by(self._alive().raise_unplanned)  # nothing else: the other ranks make the second launch too
        counts, told = told[: len(self.local_experts)], told[len(self.local_experts) :]
        sources = [told[first : first + 1 + self.num_ranks] for first in range(0, len(told), 1 + self.num_ranks)]
        row_checks.all_fit(self, [source[0] for source in sources])
        return replace(numbers, sources=sources), arrivals, slots, counts

    def _result(
        self,
        numbers: Numbers,
        rows: Rows,
        num_tokens: int,
        host_counts: list[int] | None = None,
        host_arrivals: int | None = None,
    ) -> DispatchedRows:
        handle = RowsHandle(
            self,
            num_tokens,
            rows.number,
            numbers.memory,
            numbers.addresses,
            current_stream(self.device),
            numbers,
            host_counts,
            host_arrivals,
        )
        return self._of_handle(handle, rows)

    def _of_handle(self, handle: RowsHandle, rows: Rows) -> DispatchedRows:
        packed = self.problem.layout == "packed"
        return DispatchedRows(rows.tokens, rows.scales, rows.topk_idx, rows.topk_weights, packed, handle)

    def handle_of(self, memory: Tensor, num_tokens: int, rows: int) -> RowsHandle:
        """The handle again, from its own `memory`, `num_tokens` and `rows`: for what can pass tensors and numbers only.

        Args:
            memory: any tensor with those numbers. One that is strided or not aligned to 16 bytes, as slices of larger
                tensors may be, is copied.

        Raises:
            HandleError: the memory is not of a handle of this object.
        """
        memory = row_checks.handle_memory(self, memory, self.row_memory.words)
        num_tokens = checks.in_range("num_tokens", num_tokens, 0, self.problem.max_tokens)
        rows = checks.in_range("rows", rows, 0, row_checks.MAX_ROWS)
        numbers = self.row_memory.numbers(memory)
        if self.mode == "exact" and self.problem.path == "collective":
            numbers = replace(numbers, sources=numbers.source_counts.tolist())
        return RowsHandle(self, num_tokens, rows, memory, numbers.addresses, current_stream(self.device), numbers, None)

    def _note_writes(self, written: Sequence[Tensor]) -> None:
        """Of a dispatch. What it lends is written, too."""
        admission.note_writes((*written, self._alive().memory.local) if self.problem.borrowed else written)

    def _note_use(self, handle: RowsHandle) -> None:
        """The handle may be dropped before this stream has read it."""
        if handle.stream != current_stream(self.device):
            record(self.device, (handle.memory,))

    def _combine(
        self,
        y: Tensor,
        handle: RowsHandle,
        topk_weights: Tensor | None,
        *,
        bias: Tensor | Sequence[Tensor] = (),
        weighted: bool = True,
        out: Tensor | None = None,
        num_sms: int | None = None,
        timeout: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        ops = self._alive()
        self._raise_reported()
        admission.require_real_tensors()
        row_checks.handle(self, handle)
        y = row_checks.outputs(self, y, handle.rows)
        topk_weights = row_checks.weights(self, topk_weights, handle)
        shape = (handle.num_tokens, self.problem.hidden)
        biases = row_checks.biases(self, bias, shape)
        row_checks.combined_out(self, out, shape)
        weighted = checks.flag("weighted", weighted)
        num_sms = row_checks.launch(num_sms, timeout)
        given = out
        if given is not None:
            row_checks.combined_apart(given, ops.memory.local, y, topk_weights, biases, handle)
        if out is None:
            out = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        sums = None
        if topk_weights is not None:
            sums = torch.empty(handle.num_tokens, self.problem.num_topk, dtype=torch.float32, device=self.device)
        self._launch(ops.combine, y, handle, topk_weights, biases, out, sums, weighted, timeout, num_sms)
        if given is not None:
            admission.note_writes((given,))
        return out, sums


_NO_ROUTING = (None, None, None)
"""For a launch that moves rows by an earlier plan: no ids, weights, or device-side count."""
