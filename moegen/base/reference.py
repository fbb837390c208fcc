# SPDX-License-Identifier: Apache-2.0
"""What the families' references share. References import torch and formats only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BF16_ROUNDING = 2.0**-8
FP32_ROUNDING = 2.0**-24
"""Unit roundoff: half an ulp of a number with 8 and 24 significant bits, relative to that number."""

SMALLEST_BF16 = 2.0**-133
LARGEST_E4M3 = 448.0


def expert_ranges(num_experts: int, num_ranks: int) -> list[range]:
    """The experts of each rank: contiguous, the first `num_experts % num_ranks` ranks hold one more."""
    small, larger = divmod(num_experts, num_ranks)
    starts = [rank * small + min(rank, larger) for rank in range(num_ranks + 1)]
    return [range(starts[rank], starts[rank + 1]) for rank in range(num_ranks)]


@dataclass(frozen=True)
class Combined:
    """The exact sum of one rank's tokens, and how far a right kernel may be from it.

    Attributes:
        exact: float64 [T, hidden].
        bound: float64 [T, hidden], absolute.
    """

    exact: torch.Tensor
    bound: torch.Tensor
