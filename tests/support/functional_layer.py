# SPDX-License-Identifier: Apache-2.0
"""An MoE layer of `moegen.functional`, and the dense one that it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import moegen
from moegen import functional
from support.layer import Routing, Shape, random_routing

LAYOUTS = ("token", "packed")
MODES = ("capacity", "exact")
INNER = 24
TOLERANCE = 2**-6
"""Of the largest element: rows, partial sums and results are rounded to bf16 (2**-9 each), forward and backward."""

Grads = dict[str, torch.Tensor]


def make_layer(world: Any, shape: Shape, layout: str, mode: str = "capacity", **more: Any) -> moegen.HighThroughput:
    return moegen.HighThroughput(
        world,
        num_experts=shape.experts,
        num_topk=shape.topk,
        hidden=shape.hidden,
        max_tokens_per_rank=shape.max_tokens,
        layout=layout,
        mode=mode,
        alignment=4 if layout == "packed" else 1,
        timeout=60,
        **more,
    )


def make_routing(shape: Shape, tokens: Sequence[int], seed: int, kind: str = "free") -> Routing:
    """Weights of zero among them, by which a gradient cannot be divided."""
    routing = random_routing(shape, tokens, seed, kind=kind)
    for weights in routing.weights:
        weights[::3, 0] = 0
    return routing


def make_experts(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    up = torch.randn(shape.experts, shape.hidden, INNER, generator=generator) / shape.hidden**0.5
    return up, torch.randn(shape.experts, INNER, shape.hidden, generator=generator) / INNER**0.5


def make_targets(routing: Routing, seed: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator).bfloat16() for x in routing.x]


def mlp(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x @ up) @ down


def run_experts(routed: functional.Routed, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Every expert over all rows, in fp32, without waiting for the host."""
    rows, ids, weights, handle = routed
    number = torch.arange(rows.shape[0], device=rows.device)
    total = torch.zeros_like(rows, dtype=torch.float32)
    for expert in range(up.shape[0]):
        if ids is not None:
            factor = (weights * (ids == expert)).sum(dim=1)
        else:
            assert handle.expert_starts is not None
            first = handle.expert_starts[expert]
            factor = ((number >= first) & (number < first + handle.counts[expert])).float()
        total = total + factor.unsqueeze(1) * mlp(rows.float(), up[expert], down[expert])
    return total.bfloat16()


def moe(
    layer: moegen.HighThroughput, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, up: torch.Tensor, down: Any
) -> torch.Tensor:
    routed = functional.dispatch(layer, x, ids, w)
    return functional.combine(layer, run_experts(routed, up, down), routed.handle)


def dense(shape: Shape, routing: Routing, targets: Sequence[torch.Tensor]) -> list[Grads]:
    """Outputs and gradients of every rank in float64; an expert that is selected twice counts with both weights."""
    up, down = (part.double().requires_grad_() for part in make_experts(shape))
    leaves = [
        (x.double().requires_grad_(), w.double().requires_grad_())
        for x, w in zip(routing.x, routing.weights, strict=True)
    ]
    outs = []
    for (x, w), ids in zip(leaves, routing.ids, strict=True):
        every = torch.stack([mlp(x, up[expert], down[expert]) for expert in range(shape.experts)])
        factors = torch.stack([(w * (ids == expert)).sum(dim=1) for expert in range(shape.experts)])
        outs.append((factors.unsqueeze(2) * every).sum(dim=0))
    torch.stack([(out * t.double()).sum() for out, t in zip(outs, targets, strict=True)]).sum().backward()
    assert up.grad is not None and down.grad is not None
    grads = []
    for rank, experts in enumerate(moegen.reference.expert_ranges(shape.experts, shape.ranks)):
        (x, w), part = leaves[rank], slice(experts.start, experts.stop)
        assert x.grad is not None and w.grad is not None
        grads.append({"out": outs[rank], "x": x.grad, "w": w.grad, "up": up.grad[part], "down": down.grad[part]})
    return grads


class Rank:
    """One rank's leaves and what a call made of them."""

    def __init__(self, layer: moegen.HighThroughput, shape: Shape, routing: Routing, targets: Sequence[Any]) -> None:
        self.layer = layer
        rank, device = layer.rank, layer.device
        held = slice(layer.local_experts.start, layer.local_experts.stop)
        self.x = routing.x[rank].to(device, copy=True).requires_grad_()
        self.w = routing.weights[rank].to(device, copy=True).requires_grad_()
        self.ids = routing.ids[rank].to(device)
        self.up, self.down = (part[held].to(device, copy=True).requires_grad_() for part in make_experts(shape))
        self.target = targets[rank].to(device)

    def forward(self, how: Callable[..., torch.Tensor] = moe) -> torch.Tensor:
        return how(self.layer, self.x, self.ids, self.w, self.up, self.down)

    def backward(self, out: torch.Tensor) -> Grads:
        (out * self.target).sum().backward()
        self.layer.synchronize()
        leaves = {"x": self.x, "w": self.w, "up": self.up, "down": self.down}
        grads = {name: leaf.grad for name, leaf in leaves.items()}
        return {"out": out.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


def compare(got: Grads, expected: Grads) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        result = got[name].cpu().double()
        assert result.shape == value.shape
        if value.numel():
            error = float((result - value).detach().abs().max())
            assert error <= TOLERANCE * float(value.detach().abs().max()), (name, error)


def skip_what_hangs(device: str, mode: str, ranks: int) -> None:
    if device == "cuda" and mode == "exact" and ranks > 1:
        pytest.skip("virtual ranks on one H200 were seen to hang in mode exact; tests/dist has it between processes")


def run_and_compare(
    device: str, shape: Shape, tokens: Sequence[int], layout: str, mode: str, how: Callable[..., torch.Tensor] = moe
) -> None:
    skip_what_hangs(device, mode, shape.ranks)
    routing = make_routing(shape, tokens, seed=3)
    targets = make_targets(routing)

    def work(world: Any) -> Grads:
        with make_layer(world, shape, layout, mode) as layer:
            rank = Rank(layer, shape, routing, targets)
            return rank.backward(rank.forward(how))

    for got, expected in zip(
        moegen.LocalWorld(shape.ranks, device).run(work), dense(shape, routing, targets), strict=True
    ):
        compare(got, expected)
