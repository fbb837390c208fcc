# SPDX-License-Identifier: Apache-2.0
"""`EPHandle`, what `ElasticBuffer.dispatch` returns for combine and for further dispatches."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch

from moegen.compat.rows import Shape, rounded_up
from moegen.rows import DispatchedRows
from moegen.runtime.ownership import ProcessBound
from moegen.runtime.streams import record

Tensor = torch.Tensor


class EPHandle(ProcessBound):
    """A routing. Names and meanings are DeepEP's; tensors that need computing are made when they are read.

    Attributes:
        do_expand: whether there is a row per (token, expert), grouped by expert, in place of one per (token, rank).
        num_experts, expert_alignment, num_max_tokens_per_rank, num_sms: as given to dispatch, or chosen by it.
        topk_idx: [T, topk], as given; a copy unless `do_handle_copy` was False.
        num_recv_tokens: (token, rank) rows; without do_cpu_sync, the most that could have come.
        num_expanded_tokens: rows of `recv_x`.
        num_recv_tokens_per_expert_list: rows of each local expert, rounded up to the alignment; [] without do_cpu_sync.
        psum_num_recv_tokens_per_scaleup_rank: int32 [ranks]: (token, rank) rows that came from ranks 0..r.
        num_unaligned_recv_tokens_per_expert: int32 [local experts].
        token_metadata_at_forward, channel_linked_list: None: nothing is forwarded.
        shape, received, recv_topk_idx: what further calls need; not the rows themselves.
    """

    _noun: ClassVar[str] = "handle"
    _belongs_to: ClassVar[str] = "its process and its buffer"
    token_metadata_at_forward: None = None
    channel_linked_list: None = None

    def __init__(
        self,
        shape: Shape,
        received: DispatchedRows,
        topk_idx: Tensor,
        *,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
    ) -> None:
        self.shape, self.received, self.recv_topk_idx = shape, received.handle, received.topk_idx
        self._source_counts, self._expert_starts = received.source_counts, received.expert_starts
        self.do_expand = shape.layout == "packed"
        self.num_experts = shape.num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        arrivals = received.handle.host_arrivals
        self.num_recv_tokens = self._ranks * num_max_tokens_per_rank if arrivals is None else arrivals
        self.num_expanded_tokens = received.handle.rows
        self.num_recv_tokens_per_expert_list = rounded_up(received.host_counts or [], expert_alignment)
        self.psum_num_recv_tokens_per_scaleup_rank = received.source_starts[1:]
        self.num_unaligned_recv_tokens_per_expert = received.counts

    @property
    def _ranks(self) -> int:
        return len(self._source_counts)

    @cached_property
    def psum_num_recv_tokens_per_expert(self) -> Tensor:
        """Int32 [local experts]. With do_expand, where the rows of an expert end, not counting what fills it up to the
        alignment; else the sum of the aligned numbers up to it.
        """
        self._record()
        counts, alignment = self.num_unaligned_recv_tokens_per_expert, self.expert_alignment
        if self._expert_starts is not None:
            return self._expert_starts[:-1] + counts
        aligned = (counts + alignment - 1) // alignment * alignment
        return aligned.cumsum(dim=0, dtype=torch.int32)

    @cached_property
    def recv_src_metadata(self) -> Tensor:
        """Int32 [num_recv_tokens, topk + 2]: source rank * num_max_tokens_per_rank + source token; source rank * topk +
        the first k that selects an expert here; then with do_expand for each k the row of recv_x, or -1. Rows that
        nothing came for are -1.
        """
        self._record()
        number, topk = self.num_recv_tokens, self.topk_idx.shape[1]
        numbers = self.received.numbers
        ends = self.psum_num_recv_tokens_per_scaleup_rank
        sources = torch.searchsorted(ends, torch.arange(number, dtype=torch.int64, device=ends.device), right=True)
        slots = _filled(numbers.part("row_slots").view(-1, topk), number)
        tokens = _filled(numbers.row_tokens, number)
        made = torch.full((number, topk + 2), -1, dtype=torch.int32, device=ends.device)
        made[:, 0] = sources * self.num_max_tokens_per_rank + tokens
        made[:, 1] = sources * topk + (slots >= 0).int().argmax(dim=1)
        if self.do_expand:
            made[:, 2:] = slots
        return made.masked_fill_((sources == self._ranks).unsqueeze(1), -1)

    @cached_property
    def dst_buffer_slot_idx(self) -> Tensor:
        """Int32 [T, topk]: at the first k that selects an expert of a rank, how many earlier tokens of this rank go to
        that rank; else -1.
        """
        share = self.num_experts // self._ranks
        ranks = torch.where(self.topk_idx >= 0, self.topk_idx // share, self._ranks).long()
        goes = torch.zeros(len(ranks), self._ranks + 1, dtype=torch.int32, device=ranks.device).scatter_(1, ranks, 1)
        before = (goes.cumsum(dim=0, dtype=torch.int32) - goes).gather(1, ranks)
        same = ranks.unsqueeze(2) == ranks.unsqueeze(1)
        repeated = same.tril(diagonal=-1).any(dim=2)
        return before.masked_fill_(repeated | (ranks == self._ranks), -1)

    def _record(self) -> None:
        record(self.received.memory.device, (self.received.memory,))


def _filled(values: Tensor, number: int) -> Tensor:
    """The first `number` of them: zeros where there are not so many."""
    missing = max(0, number - len(values))
    return torch.cat((values[:number], values.new_zeros(missing, *values.shape[1:])))
