# SPDX-License-Identifier: Apache-2.0
"""Random routings: which experts each token of each rank selects. Every rank can compute every rank's."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from moegen.reference import expert_ranges

ZIPF_EXPONENT = 1.0
_CERTAIN = 100.0
"""Added to the log-probability of the hot rank's experts: far above what the random part can be."""


def _uniform(num_experts: int, num_ranks: int, generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(num_experts, dtype=torch.float32, device="cpu")


def _zipf(num_experts: int, num_ranks: int, generator: torch.Generator) -> torch.Tensor:
    places = torch.randperm(num_experts, generator=generator, dtype=torch.int64, device="cpu") + 1
    return -ZIPF_EXPONENT * torch.log(places.float())


def _hot(num_experts: int, num_ranks: int, generator: torch.Generator) -> torch.Tensor:
    hot = int(torch.randint(num_ranks, (1,), generator=generator, dtype=torch.int64, device="cpu"))
    experts = expert_ranges(num_experts, num_ranks)[hot]
    weights = torch.zeros(num_experts, dtype=torch.float32, device="cpu")
    weights[experts.start : experts.stop] = _CERTAIN
    return weights


ROUTINGS: dict[str, Callable[[int, int, torch.Generator], torch.Tensor]] = {
    "uniform": _uniform,
    "zipf": _zipf,
    "hot": _hot,
}
"""Name -> log-probability of each expert, up to a constant: all alike; the n-th most popular with 1/n; those of one
rank alone (and others where it has fewer than topk)."""


def draw(routing: str, num_ranks: int, tokens: int, num_experts: int, num_topk: int, seed: int) -> list[torch.Tensor]:
    """Per rank, int64 [tokens, topk]: distinct experts for each token, drawn without replacement.

    The most popular experts are the same for all ranks.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    log_probability = ROUTINGS[routing](num_experts, num_ranks, generator)
    # The topk largest of log p + Gumbel noise are a draw without replacement with those probabilities.
    uniform = torch.rand(num_ranks, tokens, num_experts, generator=generator, dtype=torch.float32, device="cpu").clamp_(
        min=math.ulp(0.5)
    )
    noise = -torch.log(-torch.log(uniform).clamp_(max=-1e-9))
    ids = (log_probability + noise).topk(num_topk, dim=2).indices
    return list(ids.unbind(0))
