# SPDX-License-Identifier: Apache-2.0
"""`moegen.functional`: room, operators as torch checks them, and what is refused."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

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
    run_experts,
)
from support.layer import Shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("room", [20, 200])
def test_room_for_fewer_or_more_rows(device: str, layout: str, room: int) -> None:
    shape = Shape(1, 4, 2, 64, 16)
    routing = make_routing(shape, (7,), seed=4, kind="uniform")
    targets = make_targets(routing)

    def how(
        layer: moegen.HighThroughput, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor, up: torch.Tensor, down: Any
    ) -> torch.Tensor:
        routed = functional.dispatch(layer, x, ids, w, max_rows=room if layout == "token" else room + 12)
        assert routed.rows.shape[0] in (room, room + 12)
        return functional.combine(layer, run_experts(routed, up, down), routed.handle)

    def work(world: Any) -> Grads:
        with make_layer(world, shape, layout) as layer:
            rank = Rank(layer, shape, routing, targets)
            return rank.backward(rank.forward(how))

    compare(moegen.LocalWorld(1, device).run(work)[0], dense(shape, routing, targets)[0])


def test_second_derivatives_are_an_error(device: str) -> None:
    def work(world: Any) -> None:
        with make_layer(world, Shape(1, 4, 2, 64, 16), "token") as layer:
            x = torch.ones(3, 64, dtype=torch.bfloat16, device=layer.device, requires_grad=True)
            routed = functional.dispatch(layer, x, torch.tensor([[0, 1]] * 3, device=layer.device))
            out = functional.combine(layer, routed.rows * routed.rows, routed.handle)
            (grad,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
            with pytest.raises(RuntimeError, match="moegen"):
                grad.sum().backward()

    moegen.LocalWorld(1, device).run(work)


def test_weights_may_be_left_out(device: str) -> None:
    def work(world: Any) -> torch.Tensor:
        with make_layer(world, Shape(1, 4, 2, 64, 16), "packed") as layer:
            x = torch.ones(3, 64, dtype=torch.bfloat16, device=layer.device, requires_grad=True)
            routed = functional.dispatch(layer, x, torch.tensor([[0, 1]] * 3, device=layer.device))
            functional.combine(layer, routed.rows, routed.handle).sum().backward()
            layer.synchronize()
            assert x.grad is not None
            return x.grad.cpu()

    (grad,) = moegen.LocalWorld(1, device).run(work)
    assert torch.equal(grad, torch.full_like(grad, 2))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operators_are_what_they_say(device: str, layout: str, mode: str) -> None:
    """The check of torch itself: schemas, fake results, autograd and dynamic shapes."""
    shape = Shape(1, 4, 2, 64, 16)
    routing = make_routing(shape, (5,), seed=2)

    def work(world: Any) -> None:
        with make_layer(world, shape, layout, mode) as layer:
            rank = Rank(layer, shape, routing, routing.x)
            ops: Any = torch.ops.moegen
            arguments = (rank.x, rank.ids, rank.w, layer.number, -1)
            rows, ids, weights, memory = ops.dispatch(*arguments)
            y, of_rows = (part.detach().requires_grad_() for part in (rows, weights))
            packed = layout == "packed"
            checked: dict[Any, tuple[Any, ...]] = {
                ops.combine: (y, of_rows, memory, layer.number, 5, packed),
                ops.dispatch_backward: (rows.detach(), weights.detach(), ids, memory, layer.number, 5),
                ops.combine_backward: (
                    rank.x.detach(), rows.detach() if packed else None, weights.detach(), memory, layer.number,
                    rows.shape[0],
                ),
            }  # fmt: skip
            if mode == "capacity":  # what lies behind the counts in its memory is undefined and never the same
                torch.library.opcheck(ops.dispatch, arguments, test_utils=OPCHECKS[1:3])
            for op, given in checked.items():
                torch.library.opcheck(op, given, test_utils=OPCHECKS)

    moegen.LocalWorld(1, device).run(work)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_what_cannot_be_differentiated_is_an_error(device: str) -> None:
    shape = Shape(1, 4, 2, 128, 16)

    def work(world: Any) -> None:
        x = torch.ones(3, 128, dtype=torch.bfloat16, device=device)
        ids = torch.zeros(3, 2, dtype=torch.int64, device=device)
        quantised = make_layer(world, shape, "token", quantize="fp8")
        with pytest.raises(moegen.errors.InputError, match="bfloat16 tokens"):
            functional.dispatch(quantised, x, ids)
        layer, other = make_layer(world, shape, "token"), make_layer(world, shape, "token")
        with pytest.raises(moegen.errors.InputError, match="x is torch"):
            functional.dispatch(layer, x.float(), ids)
        with pytest.raises(moegen.errors.InputError, match="HighThroughput; got NoneType"):
            functional.dispatch(None, x, ids)  # type: ignore[arg-type]
        routed = functional.dispatch(layer, x.requires_grad_(), ids)
        with pytest.raises(moegen.errors.HandleError, match="another layer"):
            functional.combine(other, routed.rows, routed.handle)
        with pytest.raises(moegen.errors.HandleError, match=r"functional\.dispatch"):
            functional.combine(layer, routed.rows, layer.dispatch(x.detach(), ids).handle)  # type: ignore[arg-type]
        out = functional.combine(layer, routed.rows, routed.handle)
        del layer
        gc.collect()
        with pytest.raises(moegen.errors.DestroyedError, match="until the last backward"):
            out.sum().backward()

    moegen.LocalWorld(1, device).run(work)


@pytest.mark.filterwarnings("ignore:Input #. requires gradient and is not a double")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(device: str, layout: str) -> None:
    """Torch's own comparison with differences of the outputs. Small integers and powers of two make them exact, since
    the layer is linear in the tokens and in the weights; each rank's outputs depend on its own.
    """
    shape = Shape(2, 4, 2, 8, 4)
    factors = torch.tensor([1.0, 2.0, 4.0, -2.0], device=device)
    starts = moegen.reference.expert_ranges(shape.experts, shape.ranks)

    def work(world: Any) -> None:
        generator = torch.Generator().manual_seed(world.rank)
        x = torch.randint(-2, 3, (2, shape.hidden), generator=generator).to(device, torch.bfloat16)
        w = torch.randint(1, 4, (2, shape.topk), generator=generator).to(device, torch.float32)
        ids = torch.tensor([[0, 3], [world.rank + 1, -1]], device=device)
        own = factors[starts[world.rank].start : starts[world.rank].stop]

        def moe_of(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            rows, local, weights, handle = functional.dispatch(layer, x, ids, w)
            if local is not None:
                factor = (weights * own[local.clamp(min=0)] * (local >= 0)).sum(dim=1)
            else:
                assert handle.expert_starts is not None
                number = torch.arange(rows.shape[0], device=device)
                factor = own[(number.unsqueeze(1) >= handle.expert_starts[1:-1]).sum(dim=1)]
            return functional.combine(layer, (rows.float() * factor.unsqueeze(1)).bfloat16(), handle).float()

        with make_layer(world, shape, layout) as layer:
            assert torch.autograd.gradcheck(moe_of, (x.requires_grad_(), w.requires_grad_()), eps=1.0, atol=0, rtol=0)

    moegen.LocalWorld(shape.ranks, device).run(work)
