# SPDX-License-Identifier: Apache-2.0
"""The definition of right for `OneSided`, as `moegen.reference` is for layout `expert`.

Arguments are lists with one entry per rank. Payloads are opaque: rows of bytes, whatever their dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegen.reference import FP32_ROUNDING, Combined, expert_ranges


@dataclass(frozen=True)
class ExpectedPayloads:
    """What one rank gets from dispatch.

    Attributes:
        payloads: each [ranks, max_tokens, columns]; zero in slots that nothing came for, unless those are filled.
        counts: int32 [ranks]: rows from each source.
        tokens: int64 [ranks, max_tokens]: the source's token in each slot, -1 where nothing came.
        stats: int32 [ranks, S]; zero where a source takes no part. Or None.
    """

    payloads: tuple[torch.Tensor, ...]
    counts: torch.Tensor
    tokens: torch.Tensor
    stats: torch.Tensor | None

    @property
    def used(self) -> torch.Tensor:
        """Which slots something came for: bool [ranks, max_tokens]."""
        return self.tokens >= 0


def dispatch_payloads(
    payloads: Sequence[Sequence[torch.Tensor]],
    topk_idx: Sequence[torch.Tensor],
    num_experts: int,
    max_tokens: int,
    *,
    num_tokens: Sequence[int] | None = None,
    unused_ids: tuple[int, int] | None = None,
    stats: Sequence[torch.Tensor] | None = None,
    active_ranks: int | None = None,
) -> list[ExpectedPayloads]:
    """Every rank's slots: slot i of source s has the i-th token of s, in token order, that selects an expert here. A
    token that selects several experts of a rank has one slot there.

    Args:
        payloads: per rank its payloads, each [T, columns]; what payload p is, is the same on every rank.
        topk_idx: per rank [T, topk], ids in [-1, num_experts); -1 selects nothing.
        max_tokens: slots per source.
        num_tokens: per rank, how many of the T tokens count: less than 0 is none, more than T is all. None: all.
        unused_ids: (payload, value): slots of that payload that nothing came for hold the value.
        stats: per rank int32 [S], which every rank gets.
        active_ranks: bit r: rank r takes part. The others send nothing, and get nothing. None: all do.

    Raises:
        ValueError: a rank has more tokens for another than slots.
    """
    ranks = range(len(topk_idx))
    active = [_is_active(active_ranks, rank) for rank in ranks]
    ids = [_counted(part.cpu(), num_tokens, rank, active) for rank, part in enumerate(topk_idx)]
    gathered = None if stats is None else torch.stack([stats[r].cpu() * active[r] for r in ranks])
    results = []
    for rank, experts in enumerate(expert_ranges(num_experts, len(ids))):
        tokens = torch.full((len(ids), max_tokens), -1, dtype=torch.int64, device="cpu")
        for source, selected in enumerate(ids):
            coming = ((selected >= experts.start) & (selected < experts.stop)).any(dim=1).nonzero().flatten()
            if len(coming) > max_tokens:
                raise ValueError(f"rank {source} has {len(coming)} tokens for rank {rank} and {max_tokens} slots there")
            if active[rank]:
                tokens[source, : len(coming)] = coming
        planes = [_plane([part[p].detach().cpu() for part in payloads], tokens) for p in range(len(payloads[0]))]
        if unused_ids is not None:
            planes[unused_ids[0]][tokens < 0] = unused_ids[1]
        counts = (tokens >= 0).sum(dim=1).int()
        results.append(ExpectedPayloads(tuple(planes), counts, tokens, gathered))
    return results


def _is_active(active_ranks: int | None, rank: int) -> bool:
    return active_ranks is None or bool(active_ranks >> rank & 1)


def _counted(ids: torch.Tensor, num_tokens: Sequence[int] | None, rank: int, active: Sequence[bool]) -> torch.Tensor:
    """The ids of the tokens that count."""
    if not active[rank]:
        return ids[:0]
    return ids if num_tokens is None else ids[: max(0, num_tokens[rank])]


def _plane(of_sources: Sequence[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """[ranks, max_tokens, columns]: one payload's rows, each in its slot."""
    first = of_sources[0]
    plane = torch.zeros(*tokens.shape, first.shape[1], dtype=first.dtype, device="cpu")
    for source, rows in enumerate(of_sources):
        used = tokens[source] >= 0
        plane[source, used] = rows[tokens[source, used]]
    return plane


OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def out_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """Of combine, if the call does not say: that of the rows, and bfloat16 for FP8."""
    return dtype if dtype in OUT_DTYPES else torch.bfloat16


_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
"""Of the result, relative: half an ulp; none where the sum has that dtype already."""
_SMALLEST = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24, torch.float32: 2.0**-149}


@dataclass(frozen=True)
class CombinedPayloads(Combined):
    """The exact sums of one rank's tokens, how far a right kernel may be from them, and what it gives.

    Attributes:
        exact, bound: as `Combined`.
        rounded: [T, hidden] of the result's dtype: the rows added in fp32 in the order of the ranks, rounded once.
    """

    rounded: torch.Tensor


def combine_payloads(
    y: Sequence[torch.Tensor],
    expected: Sequence[ExpectedPayloads],
    num_tokens: Sequence[int],
    *,
    out_dtype: torch.dtype | None = None,
    active_ranks: int | None = None,
) -> list[CombinedPayloads]:
    """Every rank's combined tokens: the sum over the ranks that a token went to of the one row that each made of it. A
    token that went nowhere gets zeros.

    The bound is that of the protocol. Rows cross as they are; the sum has at most `ranks` additions in fp32 and is
    rounded once:
        u(out_dtype) * |result| + ranks * 2**-24 * sum |row|,   u: 2**-8 bfloat16, 2**-11 float16, 0 float32,
    all times 1 + 2**-6 for the rounding of already rounded numbers, plus the smallest number of out_dtype for
    underflow. It says nothing of sums beyond the largest number of out_dtype; `rounded` does.

    Args:
        y: per rank [ranks, max_tokens, hidden], rows where dispatch put them.
        expected: what `dispatch_payloads` returned.
        num_tokens: per rank, how many rows its result has.
        out_dtype: of the result; None: `out_dtype_of` the rows'.
        active_ranks: bit r: rank r takes part; rows of others are left out, and so are their results' rows, which are
            zero here. None: all do.
    """
    dtype = out_dtype_of(y[0].dtype) if out_dtype is None else out_dtype
    rows = [part.detach().cpu() for part in y]
    results = []
    for owner, tokens in enumerate(num_tokens):
        exact = torch.zeros(tokens, rows[0].shape[2], dtype=torch.float64, device="cpu")
        magnitude, rounded = torch.zeros_like(exact), exact.float()
        for rank, part in enumerate(rows):
            if not (_is_active(active_ranks, rank) and _is_active(active_ranks, owner)):
                continue
            used = expected[rank].tokens[owner] >= 0
            to, of = expected[rank].tokens[owner, used], part[owner, used].float()
            exact[to] += of.double()
            magnitude[to] += of.double().abs()
            rounded[to] += of
        bound = _ROUNDING[dtype] * exact.abs() + len(y) * FP32_ROUNDING * magnitude
        results.append(CombinedPayloads(exact, bound * (1 + 2.0**-6) + _SMALLEST[dtype], rounded.to(dtype)))
    return results
