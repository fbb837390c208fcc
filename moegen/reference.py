# SPDX-License-Identifier: Apache-2.0
"""The definition of right: dispatch and combine in plain torch, over all ranks at once.

Arguments are lists with one entry per rank. Layout `expert`: [local experts, ranks * max_tokens, hidden].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def expert_ranges(num_experts: int, num_ranks: int) -> list[range]:
    """The experts of each rank: contiguous, the first `num_experts % num_ranks` ranks hold one more."""
    small, larger = divmod(num_experts, num_ranks)
    starts = [rank * small + min(rank, larger) for rank in range(num_ranks + 1)]
    return [range(starts[rank], starts[rank + 1]) for rank in range(num_ranks)]


@dataclass(frozen=True)
class Expected:
    """What one rank gets from dispatch.

    Attributes:
        tokens: [local experts, ranks * max_tokens, hidden], zero beyond the counts.
        counts: int32 [local experts].
        ranges: int32 [local experts, ranks, 2]: first row, rows.
        sources: per local expert, (source rank, source token) of each row.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    ranges: torch.Tensor
    sources: list[list[tuple[int, int]]]


def dispatch(
    x: Sequence[torch.Tensor], topk_idx: Sequence[torch.Tensor], num_experts: int, max_tokens: int
) -> list[Expected]:
    """Every rank's received tokens, rows of an expert ordered by source rank and token, each token once per expert.

    Args:
        x: per rank [T, hidden].
        topk_idx: per rank [T, topk], ids in [-1, num_experts).
    """
    num_ranks = len(x)
    hidden = x[0].shape[1]
    results = []
    for experts in expert_ranges(num_experts, num_ranks):
        tokens = torch.zeros(len(experts), num_ranks * max_tokens, hidden, dtype=x[0].dtype)
        ranges = torch.zeros(len(experts), num_ranks, 2, dtype=torch.int32)
        sources: list[list[tuple[int, int]]] = [[] for _ in experts]
        for local, expert in enumerate(experts):
            for source in range(num_ranks):
                selected = (topk_idx[source].cpu() == expert).any(dim=1).nonzero().flatten().tolist()
                first = len(sources[local])
                ranges[local, source] = torch.tensor([first, len(selected)])
                tokens[local, first : first + len(selected)] = x[source].cpu()[selected]
                sources[local] += [(source, token) for token in selected]
        counts = torch.tensor([len(rows) for rows in sources], dtype=torch.int32)
        results.append(Expected(tokens, counts, ranges, sources))
    return results


@dataclass(frozen=True)
class Combined:
    """The exact sum of one rank's tokens, and how far a right kernel may be from it.

    Attributes:
        exact: float64 [T, hidden].
        bound: float64 [T, hidden], absolute.
    """

    exact: torch.Tensor
    bound: torch.Tensor


BF16_ROUNDING = 2.0**-8
FP32_ROUNDING = 2.0**-24
"""Unit roundoff: half an ulp of a number with 8 and 24 significant bits, relative to that number."""


def combine(
    y: Sequence[torch.Tensor],
    expected: Sequence[Expected],
    topk_idx: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor | None],
    num_experts: int,
) -> list[Combined]:
    """Every rank's combined tokens in float64: the sum over a token's selections of weight * expert output.

    The bound is that of the protocol: each remote rank's partial sum is rounded to bf16 once, the result once, and all
    additions are fp32, at most topk + ranks of them:
        2**-8 * (sum over remote ranks |partial| + |result|) + (topk + ranks) * 2**-24 * sum |weight * output|,
    all times 1 + 2**-6 for the rounding of already rounded numbers, plus the smallest bf16 for underflow.

    Args:
        y: per rank, expert outputs in the layout of dispatch.
        expected: what `dispatch` returned.
        topk_weights: per rank [T, topk], or None for weights of 1.
    """
    num_ranks = len(y)
    row_of = [
        [{source: row for row, source in enumerate(rows)} for rows in expected[rank].sources]
        for rank in range(num_ranks)
    ]
    ranges = expert_ranges(num_experts, num_ranks)
    outputs = [part.detach().cpu().double() for part in y]
    results = []
    for owner in range(num_ranks):
        ids = topk_idx[owner].cpu()
        num_tokens, num_topk = ids.shape
        hidden = outputs[0].shape[2]
        given = topk_weights[owner]
        weights = torch.ones(num_tokens, num_topk) if given is None else given.cpu()
        partials = torch.zeros(num_ranks, num_tokens, hidden, dtype=torch.float64)
        magnitude = torch.zeros(num_tokens, hidden, dtype=torch.float64)
        for token in range(num_tokens):
            for k in range(num_topk):
                expert = int(ids[token, k])
                if expert < 0:
                    continue
                rank = next(r for r, experts in enumerate(ranges) if expert in experts)
                local = expert - ranges[rank].start
                term = weights[token, k].double() * outputs[rank][local, row_of[rank][local][(owner, token)]]
                partials[rank, token] += term
                magnitude[token] += term.abs()
        exact = partials.sum(dim=0)
        remote = partials.abs().sum(dim=0) - partials[owner].abs()
        bound = BF16_ROUNDING * (remote + exact.abs()) + (num_topk + num_ranks) * FP32_ROUNDING * magnitude
        results.append(Combined(exact, bound * (1 + 2.0**-6) + 2.0**-133))
    return results
