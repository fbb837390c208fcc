# SPDX-License-Identifier: Apache-2.0
"""The definition of right for layouts `token` and `packed`, as `moegen.reference` is for layout `expert`.

Arguments are lists with one entry per rank. FP8 tokens are moved as they are: `moegen.reference.quantise` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegen.reference import BF16_ROUNDING, FP32_ROUNDING, Combined, expert_ranges


@dataclass(frozen=True)
class ExpectedRows:
    """What one rank gets from dispatch. An arrival is a (token, rank) pair, by source rank and then token.

    Attributes:
        tokens, scales: [rows, ...]; zero in rows that nothing came for (layout `packed`, between experts).
        topk_idx: int64 [rows, topk] local experts or -1 (layout `token`); else None.
        topk_weights: float32 [rows, topk] (layout `token`) or [rows].
        counts: int32 [local experts].
        expert_starts: int32 [local experts + 1] (layout `packed`); else None.
        source_starts: int32 [ranks + 1]: arrivals from lower ranks.
        row_tokens: int32 [arrivals]: the source's token.
        rows: int64 [arrivals, terms]: the rows that an arrival's sum is over, or -1: its one row (layout `token`), or
            one for each selection.
        weights: float32 [arrivals, terms]: what each of them is multiplied by.
    """

    tokens: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor
    counts: torch.Tensor
    expert_starts: torch.Tensor | None
    source_starts: torch.Tensor
    row_tokens: torch.Tensor
    rows: torch.Tensor
    weights: torch.Tensor


def dispatch_rows(
    x: Sequence[torch.Tensor],
    topk_idx: Sequence[torch.Tensor],
    topk_weights: Sequence[torch.Tensor | None],
    num_experts: int,
    *,
    layout: str,
    alignment: int = 1,
    scales: Sequence[torch.Tensor] | None = None,
) -> list[ExpectedRows]:
    """Every rank's rows.

    Args:
        x: per rank [T, hidden], of any dtype.
        topk_idx: per rank [T, topk], ids in [-1, num_experts).
        topk_weights: per rank [T, topk] float32, or None for weights of 1.
        layout: "token" (a row per arrival) or "packed" (a row per arrival and distinct local expert, experts one after
            the other, each beginning at a multiple of `alignment`).
        scales: per rank [T, words], which go with their tokens.
    """
    ids = [given.cpu().long() for given in topk_idx]
    given = [
        torch.ones(part.shape, dtype=torch.float32, device="cpu") if some is None else some.cpu()
        for part, some in zip(ids, topk_weights, strict=True)
    ]
    results = []
    for experts in expert_ranges(num_experts, len(x)):
        coming = [((part >= experts.start) & (part < experts.stop)).any(dim=1).nonzero().flatten() for part in ids]
        numbers = torch.tensor([0, *(len(tokens) for tokens in coming)], dtype=torch.int64, device="cpu")
        selected = _gathered(ids, coming) - experts.start
        local = torch.where((selected >= 0) & (selected < len(experts)), selected, -1)
        selects = (local[:, :, None] == torch.arange(len(experts), dtype=torch.int64, device="cpu")).any(dim=1)
        weights = torch.where(local < 0, 0.0, _gathered(given, coming))
        counts = selects.sum(dim=0)
        if layout == "token":
            expert_starts = None
            rows, number = torch.arange(len(local), dtype=torch.int64, device="cpu")[:, None], len(local)
            terms, row_weights = torch.ones(len(local), 1, dtype=torch.float32, device="cpu"), weights
        else:
            begins = ((counts + alignment - 1) // alignment * alignment).cumsum(0)
            expert_starts = torch.cat((torch.zeros(1, dtype=torch.int64, device="cpu"), begins))
            slots = expert_starts[:-1] + selects.cumsum(dim=0) - 1
            rows, number = torch.where(local < 0, -1, slots.gather(1, local.clamp(min=0))), int(expert_starts[-1])
            terms, row_weights = weights, torch.zeros(number, dtype=torch.float32, device="cpu")
            for k in range(local.shape[1]):  # in this order, in fp32
                to, of = rows[:, k][local[:, k] >= 0], weights[:, k][local[:, k] >= 0]
                row_weights[to] = row_weights[to] + of
        results.append(
            ExpectedRows(
                _spread(_gathered(x, coming), rows, number),
                None if scales is None else _spread(_gathered(scales, coming), rows, number),
                local if layout == "token" else None,
                row_weights,
                counts.int(),
                None if expert_starts is None else expert_starts.int(),
                numbers.cumsum(0).int(),
                torch.cat(coming).int(),
                rows,
                terms,
            )
        )
    return results


def _gathered(parts: Sequence[torch.Tensor], coming: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each source's part what comes, one after the other."""
    return torch.cat([part.detach().cpu()[tokens] for part, tokens in zip(parts, coming, strict=True)])


def _spread(arrivals: torch.Tensor, rows: torch.Tensor, number: int) -> torch.Tensor:
    """[number, ...]: each arrival at each of its rows."""
    out = torch.zeros(number, *arrivals.shape[1:], dtype=arrivals.dtype, device="cpu")
    for of_term in rows.T:
        out[of_term[of_term >= 0]] = arrivals[of_term >= 0]
    return out


def combine_rows(
    y: Sequence[torch.Tensor],
    expected: Sequence[ExpectedRows],
    num_tokens: Sequence[int],
    num_topk: int,
    *,
    biases: Sequence[Sequence[torch.Tensor]] | None = None,
) -> list[Combined]:
    """Every rank's combined tokens in float64: layout `token`: the sum over ranks of a token's rows; `packed`: the sum
    over its selections of weight * row. Biases are added. A row that `y` is too short for is left out.

    The bound is that of the protocol. Rows of layout `token` cross as they are. In layout `packed` each remote rank's
    partial sum is rounded to bf16 once. All additions are fp32, at most topk + ranks + biases of them; the result is
    rounded once:
        2**-8 * (sum over remote ranks |partial|, layout `packed`, + |result|)
            + (topk + ranks + biases) * 2**-24 * sum |term|,
    all times 1 + 2**-6 for the rounding of already rounded numbers, plus the smallest bf16 for underflow.

    Args:
        y: per rank [rows, hidden], rows where dispatch put them.
        expected: what `dispatch_rows` returned.
        num_tokens: per rank, how many tokens it dispatched.
        biases: per rank, tensors [T, hidden].
    """
    num_ranks = len(y)
    outputs = [part.detach().cpu().double() for part in y]
    results = []
    for owner, tokens in enumerate(num_tokens):
        exact = torch.zeros(tokens, outputs[0].shape[1], dtype=torch.float64, device="cpu")
        rounded, magnitude = torch.zeros_like(exact), torch.zeros_like(exact)
        for rank, rows in enumerate(expected):
            of_owner = slice(*rows.source_starts[owner : owner + 2].tolist())
            partial = torch.zeros_like(exact)
            to = rows.row_tokens[of_owner].long()
            for slots, weights in zip(rows.rows[of_owner].T, rows.weights[of_owner].T, strict=True):
                there = (slots >= 0) & (slots < len(outputs[rank]))
                term = weights[there, None].double() * outputs[rank][slots[there]]
                partial[to[there]] += term
                magnitude[to[there]] += term.abs()
            exact += partial
            if rank != owner and rows.expert_starts is not None:
                rounded += partial.abs()
        more = () if biases is None else biases[owner]
        for bias in more:
            exact += bias.cpu().double()
            magnitude += bias.cpu().double().abs()
        additions = num_topk + num_ranks + len(more)
        bound = BF16_ROUNDING * (rounded + exact.abs()) + additions * FP32_ROUNDING * magnitude
        results.append(Combined(exact, bound * (1 + 2.0**-6) + 2.0**-133))
    return results


def sum_weights(
    given: Sequence[torch.Tensor], expected: Sequence[ExpectedRows], num_tokens: Sequence[int]
) -> list[Combined]:
    """What combine of layout `token` makes of weights beside the rows: their sum over ranks, in fp32. The bound is
    ranks * 2**-24 * sum |weight|, times 1 + 2**-6, plus the smallest fp32.

    Args:
        given: per rank [rows, topk] float32.
    """
    results = []
    for owner, tokens in enumerate(num_tokens):
        exact = torch.zeros(tokens, given[0].shape[1], dtype=torch.float64, device="cpu")
        magnitude = torch.zeros_like(exact)
        for weights, rows in zip(given, expected, strict=True):
            first, end = rows.source_starts[owner : owner + 2].tolist()
            of_owner = weights[first:end].cpu().double()
            exact[rows.row_tokens[first:end].long()] += of_owner
            magnitude[rows.row_tokens[first:end].long()] += of_owner.abs()
        bound = len(given) * FP32_ROUNDING * magnitude
        results.append(Combined(exact, bound * (1 + 2.0**-6) + 2.0**-149))
    return results
