# SPDX-License-Identifier: Apache-2.0
"""The memory that a dispatch of layouts `token` and `packed` fills: the user's rows, and one block of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from moegen.codegen.problem import Problem
from moegen.codegen.row_spec import RowDispatch
from moegen.limits import VECTOR_BYTES, WORD_BYTES, ceil_div

OF_HANDLE = ("token_ranks", "tokens_sent", "first_rows", "row_tokens", "row_slots", "row_weights", "own_rows")


@dataclass(frozen=True, eq=False)
class Numbers:
    """One dispatch's numbers, in one allocation of 32-bit words.

    Attributes:
        addresses: of OF_HANDLE.
        sources: `source_counts`, if the host knows them: in mode "exact".
    """

    memory: torch.Tensor
    addresses: tuple[int, ...]
    home: RowMemory
    sources: list[list[int]] | None = None

    def part(self, name: str) -> torch.Tensor:
        """One of the parts, as int32: a view, made when it is asked for, because most calls ask for none."""
        return self.home.part(self.memory, name)

    def address(self, name: str) -> int:
        return self.home.address(self.memory, name)

    @property
    def counts(self) -> torch.Tensor:
        return self.part("counts")

    @property
    def first_slots(self) -> torch.Tensor:
        return self.part("first_slots")

    @property
    def first_rows(self) -> torch.Tensor:
        return self.part("first_rows")

    @property
    def row_tokens(self) -> torch.Tensor:
        return self.part("row_tokens")

    @property
    def source_counts(self) -> torch.Tensor:
        return self.part("source_counts").view(self.home.source_shape)


@dataclass(frozen=True, eq=False)
class Rows:
    """The user's tensors; None is what this layout or call does not have."""

    tokens: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None

    @property
    def number(self) -> int:
        """How many rows there are; those that are borrowed are [source, token]."""
        return self.tokens.shape[0] if self.tokens.dim() == 2 else self.tokens.shape[0] * self.tokens.shape[1]


class RowMemory:
    """Makes that memory; knows where everything lies in it."""

    def __init__(
        self, problem: Problem, spec: RowDispatch, local_experts: int, alignment: int, device: torch.device
    ) -> None:
        self._spec = spec
        self._device = device
        self._topk = problem.num_topk
        self._hidden = problem.hidden
        self._local_experts = local_experts
        rows = problem.num_ranks * problem.max_tokens
        # On path collective a token's row with each of its ranks.
        known = min(problem.num_ranks, problem.num_topk) if problem.path == "collective" else 1
        sizes = {
            "token_ranks": 2 * problem.max_tokens,  # 64-bit masks come first
            "tokens_sent": 1,
            "first_rows": problem.num_ranks + 1,
            "row_tokens": rows,
            "row_slots": rows * problem.num_topk,
            "row_weights": rows * problem.num_topk,
            "own_rows": problem.max_tokens * known,
            "counts": local_experts,
            "first_slots": local_experts + 1,
            "source_counts": problem.num_ranks * spec.source_words,
        }
        self._sizes = sizes
        self.source_shape = (problem.num_ranks, spec.source_words)
        self._at = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
        self.words = sum(sizes.values())
        """32-bit words of a dispatch's numbers."""
        self.capacity = rows
        """Rows that can come at most."""
        if spec.packed:
            most = rows * min(problem.num_topk, local_experts) + (alignment - 1) * local_experts
            self.capacity = ceil_div(most, alignment) * alignment
        self.dtype, self.scales_dtype = spec.format.dtype, spec.format.scale_dtypes[0]

    def empty_numbers(self) -> torch.Tensor:
        return torch.empty(self.words, dtype=torch.int32, device=self._device)

    def numbers(self, memory: torch.Tensor) -> Numbers:
        """The numbers that lie in `memory`: a dispatch's, or `empty_numbers()`."""
        base = memory.data_ptr()
        return Numbers(memory, tuple(base + WORD_BYTES * self._at[name] for name in OF_HANDLE), self)

    def address(self, memory: torch.Tensor, name: str) -> int:
        return memory.data_ptr() + WORD_BYTES * self._at[name]

    def lend(self, staged: torch.Tensor) -> None:
        """Rows are not made but lie here, uint8, a slot for each (source, token)."""
        self._lent = staged

    def _borrowed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens and scales, [source, token, ...], as they were received."""
        spec = self._spec
        slots = self._lent[: self.capacity * spec.slot_bytes].view(spec.num_ranks, -1, spec.slot_bytes)
        end = spec.row_bytes + WORD_BYTES * spec.scale_words
        tokens = slots[:, :, : spec.row_bytes].view(self.dtype)
        return tokens, slots[:, :, spec.row_bytes : end].view(self.scales_dtype) if spec.scale_words else None

    def part(self, memory: torch.Tensor, name: str) -> torch.Tensor:
        """The numbers `name` of a dispatch's memory, as int32."""
        start = self._at[name]
        return memory[start : start + self._sizes[name]]

    def rows(
        self,
        number: int,
        *,
        selections: bool,
        tokens: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        zeroed: bool = False,
        by_column: bool = False,
    ) -> Rows:
        """Tensors for `number` rows; `selections`: also for what each selects. What is given is used as it is.
        `by_column`: scales lie in columns that begin at multiples of 16 bytes.
        """
        packed = self._spec.packed
        make = self._zeros if zeroed else self._empty
        if self._spec.borrowed:
            tokens, scales = self._borrowed()
        if tokens is None:
            tokens = make((number, self._hidden), self.dtype)
        words = self._spec.scale_words
        if scales is None and words:
            column = ceil_div(WORD_BYTES * number, VECTOR_BYTES) * VECTOR_BYTES // WORD_BYTES
            shape = (words, column) if by_column else (number, words)
            scales = make(shape, self.scales_dtype)
            scales = scales.t()[:number] if by_column else scales
        ids = make((number, self._topk), torch.int64) if selections and not packed else None
        weights = make((number,) if packed else (number, self._topk), torch.float32) if selections else None
        return Rows(tokens, scales, ids, weights)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)
