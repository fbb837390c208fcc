# SPDX-License-Identifier: Apache-2.0
"""The memory that a dispatch of layout `expert` fills: tokens, scales, and one block of numbers."""

from __future__ import annotations

from itertools import accumulate

import torch

from moegen.handle import Dispatched, GivenNumbers, Handle, NumbersLayout
from moegen.kernels.ll import SCALES_PER_WORD, scale_words
from moegen.kernels.problem import Problem

_DTYPES = {"bf16": torch.bfloat16}
_WORD_BYTES = 4
_NOTHING_GIVEN = GivenNumbers()
FOR_EVERY_COMBINE = ("first_rows", "row_origin", "row_slots", "row_weights", "token_ranks", "tokens_sent")
FOR_MASKED_COMBINE = ("selected_ranks", "selected_weights")
FOR_COLLECTIVE = (
    "token_ranks",
    "tokens_sent",
    "sent_rows",
    "first_rows",
    "row_origin",
    "row_slots",
    "row_weights",
    "source_counts",
)
_FOR_USER = ("counts", "ranges", "row_tokens")


class Received:
    """Makes that memory; knows where everything lies in it."""

    def __init__(self, problem: Problem, local_experts: int, device: torch.device) -> None:
        ranks, topk = problem.num_ranks, problem.num_topk
        rows = ranks * problem.max_tokens
        sizes = {
            "token_ranks": 2 * problem.max_tokens,  # 64-bit masks come first,
            "ranges": 2 * local_experts * ranks,  # and pairs that may be read as 64-bit numbers next
            "counts": local_experts,
            "row_tokens": local_experts * rows,
            "row_origin": rows,
            "row_slots": rows * topk,
            "row_weights": rows * topk,
            "tokens_sent": 1,
        }
        if problem.path == "collective":
            for_combine = FOR_COLLECTIVE
            sizes["sent_rows"] = problem.max_tokens * min(ranks, topk)
            sizes |= {"first_rows": ranks + 1, "source_counts": ranks * (1 + ranks)}
        else:
            for_combine = (*FOR_EVERY_COMBINE, *(FOR_MASKED_COMBINE if problem.masked else ()))
            sizes["first_rows"] = ranks + 1
        if problem.masked:
            sizes.update(dict.fromkeys(FOR_MASKED_COMBINE, problem.max_tokens * topk))
        at = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
        self._words = sum(sizes.values())
        self.layout = NumbersLayout(
            local_experts, ranks, rows, ranges=at["ranges"], counts=at["counts"], row_tokens=at["row_tokens"]
        )
        self._for_combine = [_WORD_BYTES * at[name] for name in for_combine]
        self._for_user = [_WORD_BYTES * at[name] for name in _FOR_USER]
        self._device = device
        self.tokens_shape = (local_experts, rows, problem.hidden)
        self.dtype = _DTYPES.get(problem.dtype, torch.float8_e4m3fn)
        words = scale_words(problem.hidden, problem.dtype)
        self.scales_storage = (local_experts, words, rows) if words else None
        self.scales_dtype = torch.int32 if SCALES_PER_WORD[problem.dtype] > 1 else torch.float32

    def allocate(
        self,
        owner: object,
        num_tokens: int,
        stream: int,
        tokens: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        given: GivenNumbers = _NOTHING_GIVEN,
    ) -> Dispatched:
        """Memory for one dispatch of `num_tokens` tokens; what is given is used in place of new memory."""
        if tokens is None:
            tokens = torch.empty(self.tokens_shape, dtype=self.dtype, device=self._device)
        if scales is None and self.scales_storage is not None:
            scales = torch.empty(self.scales_storage, dtype=self.scales_dtype, device=self._device).transpose(1, 2)
        memory = torch.empty(self._words, dtype=torch.int32, device=self._device)
        base = memory.data_ptr()
        addresses = tuple([base + offset for offset in self._for_combine])
        return Dispatched(tokens, scales, Handle(owner, num_tokens, memory, addresses, stream), self.layout, given)

    def user_addresses(self, received: Dispatched) -> tuple[int, int, int]:
        """Of counts, ranges and row_tokens."""
        base, given = received.handle.memory.data_ptr(), received.given
        counts, ranges, row_tokens = self._for_user
        if given is _NOTHING_GIVEN:
            return base + counts, base + ranges, base + row_tokens
        return (
            base + counts if given.counts is None else given.counts.data_ptr(),
            base + ranges if given.ranges is None else given.ranges.data_ptr(),
            base + row_tokens if given.row_tokens is None else given.row_tokens.data_ptr(),
        )
