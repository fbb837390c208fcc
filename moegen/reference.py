# SPDX-License-Identifier: Apache-2.0
"""The definition of right: dispatch and combine in plain torch, over all ranks at once.

Arguments are lists with one entry per rank. Layout `expert`: [local experts, ranks * max_tokens, hidden].
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
        ranges: int32 [local experts, ranks, 2]: rows, first row.
        sources: per local expert, (source rank, source token) of each row.
    """

    tokens: torch.Tensor
    counts: torch.Tensor
    ranges: torch.Tensor
    sources: list[list[tuple[int, int]]]


FP8_GROUP = 128
FP8_LARGEST = 448.0
SMALLEST_AMAX = 1e-4


def quantise(x: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in FP8: per token and group of 128 elements, divided by a scale that makes the largest magnitude 448.

    amax = max(|x|, 1e-4) over the group; scale = amax * fl(1/448); q = e4m3(x * (448 / amax)), all in fp32. With
    "fp8_pow2" and "fp8_ue8m0" the scale is the next power of two, and q = e4m3(x / scale), an exact division. The
    rules are DeepEP's (its `per_token_cast_to_fp8`).

    Args:
        x: [T, hidden], hidden a multiple of 128 (512 for "fp8_ue8m0").
        kind: "fp8", "fp8_pow2" or "fp8_ue8m0".

    Returns:
        float8_e4m3fn [T, hidden], and the scales: float32 [T, hidden / 128], or int32 [T, hidden / 512] with the
        exponents of four scales each, the first in the lowest byte.
    """
    tokens, hidden = x.shape
    groups = x.float().reshape(tokens, hidden // FP8_GROUP, FP8_GROUP)
    amax = groups.abs().amax(dim=2).clamp(min=SMALLEST_AMAX)
    scales = amax * torch.tensor(1 / FP8_LARGEST, dtype=torch.float32, device="cpu")
    factors = torch.full_like(amax, FP8_LARGEST) / amax  # torch divides a plain number by way of a reciprocal
    if kind != "fp8":
        bits = scales.view(torch.int32)
        exponents = (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()
        scales, factors = (exponents << 23).view(torch.float32), ((254 - exponents) << 23).view(torch.float32)
    quantised = (groups * factors.unsqueeze(2)).reshape(tokens, hidden).to(torch.float8_e4m3fn)
    if kind != "fp8_ue8m0":
        return quantised, scales
    packed = exponents.reshape(tokens, hidden // (4 * FP8_GROUP), 4).to(torch.uint8).contiguous()
    return quantised, packed.view(torch.int32).squeeze(2)


def dispatch(
    x: Sequence[torch.Tensor],
    topk_idx: Sequence[torch.Tensor],
    num_experts: int,
    max_tokens: int,
    *,
    missing: Sequence[Collection[int]] | None = None,
) -> list[Expected]:
    """Every rank's received tokens, rows of an expert ordered by source rank and token, each token once per expert.

    Args:
        x: per rank [T, hidden].
        topk_idx: per rank [T, topk], ids in [-1, num_experts).
        missing: per rank, the source ranks of which it gets nothing.
    """
    num_ranks = len(x)
    hidden = x[0].shape[1]
    results = []
    for rank, experts in enumerate(expert_ranges(num_experts, num_ranks)):
        absent = () if missing is None else missing[rank]
        tokens = torch.zeros(len(experts), num_ranks * max_tokens, hidden, dtype=x[0].dtype, device="cpu")
        ranges = torch.zeros(len(experts), num_ranks, 2, dtype=torch.int32, device="cpu")
        sources: list[list[tuple[int, int]]] = [[] for _ in experts]
        for local, expert in enumerate(experts):
            for source in range(num_ranks):
                selects = (topk_idx[source].cpu() == expert).any(dim=1)
                selected = [] if source in absent else selects.nonzero().flatten().tolist()
                first = len(sources[local])
                ranges[local, source] = torch.tensor([len(selected), first], dtype=torch.int32, device="cpu")
                tokens[local, first : first + len(selected)] = x[source].cpu()[selected]
                sources[local] += [(source, token) for token in selected]
        counts = torch.tensor([len(rows) for rows in sources], dtype=torch.int32, device="cpu")
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
    *,
    in_halves: bool = False,
    missing: Sequence[Collection[int]] | None = None,
    renormalize: bool = False,
) -> list[Combined]:
    """Every rank's combined tokens in float64: the sum over a token's selections of weight * expert output.

    The bound is that of the protocol: each remote rank's partial sum (if the op is launched in halves, the own rank's
    too) is rounded to bf16 once, the result once, and all additions are fp32, at most topk + ranks of them:
        2**-8 * (sum over those ranks |partial| + |result|) + (topk + ranks) * 2**-24 * sum |weight * output|,
    all times 1 + 2**-6 for the rounding of already rounded numbers, plus the smallest bf16 for underflow.

    Partial sums of missing ranks are left out. With `renormalize` what is left of a token that misses some is
    multiplied by the sum of all its weights over the sum of those whose ranks are not missing (by 0 if that is 0), and
    so is the bound of what comes before the last rounding, plus 2 * (topk + 2) * 2**-24 * |result| for the factor.

    Args:
        y: per rank, expert outputs in the layout of dispatch.
        expected: what `dispatch` returned.
        topk_weights: per rank [T, topk], or None for weights of 1.
        missing: per rank, the ranks whose partial sums it does not get.
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
        weights = torch.ones(num_tokens, num_topk, dtype=torch.float32, device="cpu") if given is None else given.cpu()
        absent = () if missing is None else missing[owner]
        weight_sums = torch.zeros(2, num_tokens, 1, dtype=torch.float64, device="cpu")
        complete = torch.ones(num_tokens, 1, dtype=torch.bool, device="cpu")
        partials = torch.zeros(num_ranks, num_tokens, hidden, dtype=torch.float64, device="cpu")
        magnitude = torch.zeros(num_tokens, hidden, dtype=torch.float64, device="cpu")
        for token in range(num_tokens):
            for k in range(num_topk):
                expert = int(ids[token, k])
                if expert < 0:
                    continue
                rank = next(r for r, experts in enumerate(ranges) if expert in experts)
                weight_sums[:, token] += weights[token, k].double() * torch.tensor(
                    [[1], [rank not in absent]], dtype=torch.float64, device="cpu"
                )
                if rank in absent:
                    complete[token] = False
                    continue
                local = expert - ranges[rank].start
                term = weights[token, k].double() * outputs[rank][local, row_of[rank][local][(owner, token)]]
                partials[rank, token] += term
                magnitude[token] += term.abs()
        exact = partials.sum(dim=0)
        rounded = partials.abs().sum(dim=0) - (0.0 if in_halves else 1.0) * partials[owner].abs()
        before = BF16_ROUNDING * rounded + (num_topk + num_ranks) * FP32_ROUNDING * magnitude
        if renormalize:
            factor = torch.where(weight_sums[1] == 0, 0.0, weight_sums[0] / weight_sums[1])
            factor = torch.where(complete, 1.0, factor)
            exact, before = exact * factor, before * factor.abs()
            before = before + 2 * (num_topk + 2) * FP32_ROUNDING * exact.abs()
        bound = before + BF16_ROUNDING * exact.abs()
        results.append(Combined(exact, bound * (1 + 2.0**-6) + 2.0**-133))
    return results
