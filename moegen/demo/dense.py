# SPDX-License-Identifier: Apache-2.0
"""The same layer in one process: every expert in float64, and how far the ranks' result may be from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moegen.demo.layer import make_expert
from moegen.demo.plan import Plan
from moegen.demo.progress import reported
from moegen.demo.ranks import RankResult
from moegen.reference import BF16_ROUNDING, FP32_ROUNDING


@dataclass(frozen=True)
class Verdict:
    """How far the ranks were from the dense layer.

    Attributes:
        error: the largest absolute error.
        scale: the largest absolute value of the dense layer.
        worst: the largest error in units of its bound; right is at most 1.
        elements: how many numbers were compared.
    """

    error: float
    scale: float
    worst: float
    elements: int

    @property
    def ok(self) -> bool:
        return self.worst <= 1.0


def compare(plan: Plan, results: Sequence[RankResult]) -> Verdict:
    """Compares every number that combine returned with the dense layer, on the routing that the ranks used.

    The bound of one number, with u = 2**-8 and v = 2**-24, half an ulp of bfloat16 and float32 relative to the number:
        experts   sum |w| * (e + u * (|y| + e))     y an expert's exact output, e the error of its float32 sums
        combine   u * (sum over remote ranks of |partial| + |result|) + (topk + ranks) * v * sum |w * y|
    times 1 + 2**-6, because rounded numbers are rounded again, plus the smallest bfloat16 for underflow.
    """
    device = torch.device(plan.device)
    x, ids, weights, out = (
        torch.stack([getattr(result, name) for result in results]).to(device) for name in ("x", "ids", "weights", "out")
    )
    dense = _Dense(plan, x, ids, weights)
    for expert in reported(range(plan.preset.num_experts), "experts of the dense layer"):
        dense.add(expert)
    bound = dense.bound()
    error = (out.flatten(0, 2).double() - dense.exact).abs()
    # Not a number is no small error.
    worst = (error / bound).nan_to_num(nan=float("inf"))
    return Verdict(float(error.max()), float(dense.exact.abs().max()), float(worst.max()), error.numel())


class _Dense:
    """Sums over experts; a row is a token of any rank and step."""

    def __init__(self, plan: Plan, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self._plan = plan
        self._x, self._ids, self._weights = x.flatten(0, 2), ids.flatten(0, 2), weights.flatten(0, 2).double()
        self._owner = torch.arange(plan.num_ranks, dtype=torch.int64, device=x.device).repeat_interleave(
            x.shape[1] * x.shape[2]
        )
        wide = torch.zeros_like(self._x, dtype=torch.float64)
        self.exact = wide
        self._expert_error, self._magnitude = wide.clone(), wide.clone()
        self._partials = wide.new_zeros(plan.num_ranks, *wide.shape)
        problem = plan.problem
        self._ranks = [rank for rank in range(plan.num_ranks) for _ in problem.local_experts(rank)]

    def add(self, expert: int) -> None:
        """Adds one expert's part to every token that selected it."""
        selected = self._ids == expert
        rows = selected.any(dim=1).nonzero().flatten()
        if not len(rows):
            return
        y, error = make_expert(self._plan.preset, expert, self._x.device).exact(self._x[rows])
        weight = (self._weights * selected).sum(dim=1)[rows, None]
        self._partials[self._ranks[expert], rows] += weight * y
        self.exact[rows] += weight * y
        self._magnitude[rows] += (weight * y).abs()
        self._expert_error[rows] += weight.abs() * (error + BF16_ROUNDING * (y.abs() + error))

    def bound(self) -> torch.Tensor:
        own = self._partials[self._owner, torch.arange(len(self._owner), dtype=torch.int64, device=self._owner.device)]
        remote = self._partials.abs().sum(dim=0) - own.abs()
        terms = self._plan.preset.num_topk + self._plan.num_ranks
        combine = BF16_ROUNDING * (remote + self.exact.abs()) + terms * FP32_ROUNDING * self._magnitude
        return (self._expert_error + combine) * (1 + 2.0**-6) + 2.0**-133
