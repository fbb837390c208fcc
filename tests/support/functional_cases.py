# SPDX-License-Identifier: Apache-2.0
"""`moegen.functional`: gradients against one dense float64 computation of the same layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moegen
from moegen import functional
from support.functional_layer import (
    LAYOUTS,
    MODES,
    Grads,
    Rank,
    compare,
    dense,
    make_layer,
    make_routing,
    make_targets,
    moe,
    run_and_compare,
    run_experts,
    skip_what_hangs,
)
from support.layer import Shape


@pytest.mark.parametrize(
    ("ranks", "tokens"), [(1, (13,)), (2, (16, 9)), (4, (5, 0, 16, 9))], ids=lambda value: str(value)
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_dense_layer(
    device: str, layout: str, mode: str, ranks: int, tokens: tuple[int, ...]
) -> None:
    run_and_compare(device, Shape(ranks, 7, 3, 64, 16), tokens, layout, mode)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpointing_dispatches_again(device: str, layout: str, reentrant: bool) -> None:
    def how(layer: moegen.HighThroughput, *tensors: torch.Tensor) -> torch.Tensor:
        out = checkpoint(lambda *given: moe(layer, *given), *tensors, use_reentrant=reentrant)
        assert isinstance(out, torch.Tensor)
        return out

    run_and_compare(device, Shape(2, 6, 2, 64, 16), (11, 4), layout, "capacity", how)


def test_checkpointing_in_mode_exact(device: str) -> None:
    def how(layer: moegen.HighThroughput, *tensors: torch.Tensor) -> torch.Tensor:
        out = checkpoint(lambda *given: moe(layer, *given), *tensors, use_reentrant=False)
        assert isinstance(out, torch.Tensor)
        return out

    run_and_compare(device, Shape(2, 6, 2, 64, 16), (11, 4), "packed", "exact", how)


def compiled(backend: str, mode: str) -> Callable[..., torch.Tensor]:
    """The whole layer as one graph, which every virtual rank compiles for itself."""
    if backend == "inductor":
        needs_inductor()

    def how(*arguments: Any) -> torch.Tensor:
        exact = mode == "exact"
        with torch._dynamo.config.patch(recompile_limit=64, capture_dynamic_output_shape_ops=exact):
            out: torch.Tensor = torch.compile(moe, backend=backend, fullgraph=True)(*arguments)
        return out

    return how


def needs_inductor() -> None:
    try:
        torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.ones(3))
    except Exception as error:
        pytest.skip(f"inductor does not work here: {error}")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(device: str, backend: str, layout: str, mode: str) -> None:
    run_and_compare(device, Shape(1, 6, 2, 64, 16), (11,), layout, mode, compiled(backend, mode))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_on_two_ranks(device: str, layout: str) -> None:
    run_and_compare(device, Shape(2, 6, 2, 64, 16), (11, 4), layout, "capacity", compiled("aot_eager", "capacity"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_handles_live_side_by_side(device: str, layout: str) -> None:
    """Three layers of tokens under way; combined and differentiated in other orders than they were dispatched in."""
    shape = Shape(2, 6, 2, 64, 16)
    routings = [make_routing(shape, (16 - n, 3 * n), seed=n) for n in range(3)]
    targets = [make_targets(routing, seed=n) for n, routing in enumerate(routings)]

    def work(world: Any) -> list[Grads]:
        with make_layer(world, shape, layout) as layer:
            ranks = [Rank(layer, shape, *given) for given in zip(routings, targets, strict=True)]
            routed = [functional.dispatch(layer, rank.x, rank.ids, rank.w) for rank in ranks]
            ys = [run_experts(part, rank.up, rank.down) for part, rank in zip(routed, ranks, strict=True)]
            outs = [functional.combine(layer, ys[n], routed[n].handle) for n in (2, 1, 0)][::-1]
            del routed, ys
            grads = {n: ranks[n].backward(outs[n]) for n in (1, 2, 0)}
            return [grads[n] for n in range(3)]

    results = moegen.LocalWorld(2, device).run(work)
    for n in range(3):
        for rank, expected in enumerate(dense(shape, routings[n], targets[n])):
            compare(results[rank][n], expected)


def test_one_handle_for_several_combines(device: str) -> None:
    """Gradients of weights and tokens add up."""
    shape = Shape(2, 6, 2, 64, 16)
    routing = make_routing(shape, (8, 8), seed=1)

    def work(world: Any) -> list[tuple[Any, ...]]:
        with make_layer(world, shape, "packed") as layer:
            results = []
            for times in (1, 2):
                rank = Rank(layer, shape, routing, make_targets(routing))
                routed = functional.dispatch(layer, rank.x, rank.ids, rank.w)
                y = run_experts(routed, rank.up, rank.down)
                out = sum(functional.combine(layer, y, routed.handle) for _ in range(times))
                assert isinstance(out, torch.Tensor)
                rank.backward(out)
                results.append((rank.x.grad, rank.w.grad))
            return results

    for (x, w), (x_twice, w_twice) in moegen.LocalWorld(2, device).run(work):
        torch.testing.assert_close(x_twice, 2 * x, rtol=2**-6, atol=2**-6)
        torch.testing.assert_close(w_twice, 2 * w)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_integers_come_out_exactly(device: str, layout: str) -> None:
    """Each row once, whatever its weight: the gradient is the number of rows (ranks, or ranks' experts) times that of
    the sum; a weight's gradient is what the caller gives its row, and zero where nothing is selected.
    """
    shape = Shape(4, 7, 3, 64, 16)
    routing = make_routing(shape, (16, 0, 5, 9), seed=8)
    ranges = moegen.reference.expert_ranges(shape.experts, shape.ranks)

    def work(world: Any) -> tuple[torch.Tensor, ...]:
        with make_layer(world, shape, layout) as layer:
            rank = Rank(layer, shape, routing, routing.x)
            routed = functional.dispatch(layer, rank.x, rank.ids, rank.w)
            out = functional.combine(layer, routed.rows, routed.handle, weighted=False)
            given = torch.randint(-4, 5, out.shape, generator=torch.Generator().manual_seed(world.rank)).to(out)
            torch.autograd.backward((out, routed.row_weights.sum()), (given, torch.tensor(3.0, device=layer.device)))
            layer.synchronize()
            assert rank.x.grad is not None and rank.w.grad is not None
            return tuple(part.cpu() for part in (given, rank.x.grad, rank.w.grad))

    for ids, (given, grad_x, grad_w) in zip(routing.ids, moegen.LocalWorld(4, device).run(work), strict=True):
        of_rank = torch.tensor([[expert in experts for expert in range(7)] for experts in ranges])
        for token, selected in enumerate(ids.tolist()):
            experts = {expert for expert in selected if expert >= 0}
            reached = of_rank[:, sorted(experts)].any(dim=1).sum() if experts else 0
            rows = int(reached) if layout == "token" else len(experts)
            assert torch.equal(grad_x[token], rows * given[token])
        assert torch.equal(grad_w, 3.0 * (ids >= 0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_without_rows_keeps_in_step(device: str, layout: str, mode: str) -> None:
    """All tokens go to rank 0; rank 1's outputs depend on nothing, and its backward makes every call still."""
    shape = Shape(2, 4, 2, 64, 16)
    skip_what_hangs(device, mode, shape.ranks)

    def work(world: Any) -> torch.Tensor:
        with make_layer(world, shape, layout, mode) as layer:
            x = torch.ones(3, 64, dtype=torch.bfloat16, device=layer.device, requires_grad=True)
            ids = torch.tensor([[0, -1]] * 3, device=layer.device)
            routed = functional.dispatch(layer, x, ids)
            y = routed.rows * 2 if world.rank == 0 else torch.zeros_like(routed.rows)
            functional.combine(layer, y, routed.handle).sum().backward()
            layer.synchronize()
            assert x.grad is not None
            return x.grad.cpu()

    for grad in moegen.LocalWorld(2, device).run(work):
        assert torch.equal(grad, torch.full_like(grad, 2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_nothing_came_for(device: str, layout: str, mode: str) -> None:
    """They are zeros, also in gradients, and what `y` holds there goes nowhere."""
    shape = Shape(1, 4, 2, 64, 16)
    routing = make_routing(shape, (5,), seed=2, kind="uniform")

    def work(world: Any) -> None:
        with make_layer(world, shape, layout, mode) as layer:
            rank = Rank(layer, shape, routing, routing.x)
            rows, ids, weights, handle = functional.dispatch(layer, rank.x, rank.ids, rank.w)
            if handle.expert_starts is None:
                came = torch.arange(rows.shape[0], device=layer.device) < 5
            else:
                spans = zip(handle.expert_starts.tolist(), handle.counts.tolist(), strict=False)
                held = [first + row for first, count in spans for row in range(count)]
                came = torch.zeros(rows.shape[0], dtype=torch.bool, device=layer.device)
                came[held] = True
            assert mode == "exact" or int(came.sum()) < rows.shape[0]
            assert not rows[~came].any() and not weights[~came].any()
            assert ids is None or bool((ids[~came] == -1).all())
            y = rows.detach().masked_fill(~came.unsqueeze(1), torch.nan).requires_grad_()
            out = functional.combine(layer, y, handle)
            out.float().square().sum().backward()
            layer.synchronize()
            assert y.grad is not None and rank.w.grad is not None and rank.x.grad is not None
            assert not y.grad[~came].any()
            for tensor in (out, y.grad, rank.w.grad, rank.x.grad):
                assert bool(tensor.isfinite().all())

    moegen.LocalWorld(1, device).run(work)
