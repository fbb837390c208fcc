# SPDX-License-Identifier: Apache-2.0
"""The MoE layer of the demo: a byte embedding, a router, SwiGLU experts. Random weights that every rank can make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

from moegen.kernels.presets import Preset

CONTEXT = 4
"""Bytes that make one token: its own and those before it, so that equal bytes need not go to equal experts."""

_SEED = 20_240
FP32_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class Expert:
    """One SwiGLU expert: down @ (silu(gate @ x) * (up @ x)).

    Attributes:
        gate, up: [ffn, hidden] bfloat16.
        down: [hidden, ffn] bfloat16.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, hidden], computed in float32, rounded once to x's dtype."""
        wide = x.float()
        inner = silu(wide @ self.gate.float().T) * (wide @ self.up.float().T)
        return (inner @ self.down.float().T).to(x.dtype)

    def exact(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in float64, and how far `__call__` may be from it before it rounds to x's dtype.

        A float32 sum of n products whose rounding errors are independent is off by at most
        sqrt(n) * 2**-24 * sum |a * b| (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, 2019,
        with a constant of 1: the partial sums are far below sum |a * b|). Errors of different sums add up as the root
        of their squares. silu has a slope of at most 1.1 and a few float32 roundings of its own; 16 is generous.
        """
        gate, up, down = (weight.double() for weight in (self.gate, self.up, self.down))
        wide = x.double()
        hidden, ffn = wide.shape[1], gate.shape[0]
        gated, raised = wide @ gate.T, wide @ up.T
        gated_error = hidden**0.5 * FP32_ROUNDING * (wide.abs() @ gate.abs().T)
        raised_error = hidden**0.5 * FP32_ROUNDING * (wide.abs() @ up.abs().T)
        inner = silu(gated) * raised
        inner_error = 1.1 * gated_error * (raised.abs() + raised_error) + silu(gated).abs() * raised_error
        inner_error += 16 * FP32_ROUNDING * inner.abs()
        error = (inner_error.square() @ down.square().T).sqrt()
        return inner @ down.T, error + ffn**0.5 * FP32_ROUNDING * (inner.abs() @ down.abs().T)


@dataclass(frozen=True)
class Router:
    """Softmax over all experts, the best top-k, their weights renormalised to a sum of 1.

    Attributes:
        weight: [num_experts, hidden] float32.
        num_topk: experts per token.
    """

    weight: torch.Tensor
    num_topk: int

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, hidden] -> ids [n, topk] int64, weights [n, topk] float32."""
        scores, ids = (x.float() @ self.weight.T).softmax(dim=1).topk(self.num_topk, dim=1)
        return ids, scores / scores.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Embedding:
    """A token is the sum of one row per byte of its context, scaled to a mean square of about 1.

    Attributes:
        tables: [CONTEXT, 256, hidden] float32.
    """

    tables: torch.Tensor

    def __call__(self, content: Sequence[int]) -> torch.Tensor:
        """CONTEXT - 1 + n bytes -> [n, hidden] bfloat16."""
        ids = torch.tensor(content, dtype=torch.int64, device=self.tables.device).unfold(0, CONTEXT, 1)
        places = torch.arange(CONTEXT, dtype=torch.int64, device=ids.device)
        return self.tables[places, ids].sum(dim=1).bfloat16()


def make_embedding(preset: Preset, device: torch.device) -> Embedding:
    return Embedding(_random((CONTEXT, 256, preset.hidden), CONTEXT**-0.5, 1, device))


def make_router(preset: Preset, device: torch.device) -> Router:
    return Router(_random((preset.num_experts, preset.hidden), preset.hidden**-0.5, 2, device), preset.num_topk)


def make_expert(preset: Preset, expert: int, device: torch.device) -> Expert:
    """The weights of one expert, the same wherever they are made on this kind of device."""
    shapes = ((preset.ffn, preset.hidden), (preset.ffn, preset.hidden), (preset.hidden, preset.ffn))
    return Expert(
        *(
            _random(shape, shape[1] ** -0.5, 3 + 3 * expert + index, device, torch.bfloat16)
            for index, shape in enumerate(shapes)
        )
    )


def _random(
    shape: tuple[int, ...], scale: float, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(_SEED + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device=device).mul_(scale).to(dtype)
