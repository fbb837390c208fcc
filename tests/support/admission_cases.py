# SPDX-License-Identifier: Apache-2.0
"""Tensors that kernels cannot read or write are refused whichever argument they are; those whose values are lazily
negated or conjugated arrive as what they stand for; autograd is not passed by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from moegen import functional
from moegen.errors import InputError
from support.call_arguments import (
    OBJECTS,
    Call,
    assert_equal,
    calls_of,
    experts,
    flat,
    in_world,
    packed_rows,
    payloads,
    rows,
)

objects = pytest.mark.parametrize("name", OBJECTS)
Use = Callable[[torch.Tensor], Any]


def freed(tensor: torch.Tensor, use: Use) -> None:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    use(copy)


def cut_short(tensor: torch.Tensor, use: Use) -> None:
    copy = tensor.clone()
    copy.untyped_storage().resize_(copy.nbytes - 1)
    use(copy)


def zeros_without_memory(tensor: torch.Tensor, use: Use) -> None:
    use(torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype, device=tensor.device))


def meta(tensor: torch.Tensor, use: Use) -> None:
    use(tensor.to("meta"))


def sparse(tensor: torch.Tensor, use: Use) -> None:
    use(tensor.to_sparse())


def of_mkldnn(tensor: torch.Tensor, use: Use) -> None:
    use(tensor.to_mkldnn())


def fake(tensor: torch.Tensor, use: Use) -> None:
    with FakeTensorMode() as mode:
        stand_in = mode.from_tensor(tensor)
    use(stand_in)


def functionalized(tensor: torch.Tensor, use: Use) -> None:
    torch.func.functionalize(lambda inner: (use(inner), inner)[1])(tensor)


def vmapped(tensor: torch.Tensor, use: Use) -> None:
    torch.func.vmap(lambda inner: (use(inner), inner)[1])(tensor.expand(2, *tensor.shape))


def with_tangent_by_func(tensor: torch.Tensor, use: Use) -> None:
    torch.func.jvp(lambda inner: (use(inner), inner)[1], (tensor,), (torch.ones_like(tensor),))


def with_tangent(tensor: torch.Tensor, use: Use) -> None:
    with forward_ad.dual_level():
        use(forward_ad.make_dual(tensor, torch.ones_like(tensor)))


def tracked(tensor: torch.Tensor, use: Use) -> None:
    use(tensor.clone().requires_grad_())


def tracked_inside(tensor: torch.Tensor, use: Use) -> None:
    use(tensor.clone().requires_grad_() * 1)


ANY = (freed, cut_short, zeros_without_memory, meta, sparse, fake, functionalized, vmapped)
OF_FLOATS = (with_tangent, with_tangent_by_func, of_mkldnn)
TRACKED = (tracked, tracked_inside)
RIGHT_FOR_OPERATORS = (functionalized, fake)
"""torch's own operators take them: the first is unwrapped, the second gives shapes if all are."""


def kinds_for(name: str, tensor: torch.Tensor) -> list[Callable[[torch.Tensor, Use], None]]:
    kinds = list(ANY)
    if name == "functional":
        kinds = [kind for kind in kinds if kind not in RIGHT_FOR_OPERATORS]
    if tensor.is_floating_point():
        kinds += OF_FLOATS if tensor.device.type == "cpu" else OF_FLOATS[:-1]
        kinds += TRACKED if name != "functional" else ()
    return kinds


def each_argument(calls: dict[str, Call]) -> list[tuple[Call, str, torch.Tensor]]:
    return [(call, name, each) for call in calls.values() for name, each in {**call.reads, **call.writes}.items()]


@objects
def test_what_has_no_plain_memory_is_refused(device: str, name: str) -> None:
    def work(world: Any) -> None:
        calls = calls_of(world, name)
        before = {key: call.without_outputs() for key, call in calls.items()}
        for call, argument, tensor in each_argument(calls):
            for kind in kinds_for(name, tensor):
                with pytest.raises(InputError, match=r"\w"):  # noqa: PT012
                    kind(tensor, lambda bad, call=call, argument=argument: call(**{argument: bad}))  # type: ignore[misc]
                    pytest.fail(f"{argument}: {kind.__name__} was taken")
        for key, call in calls.items():
            assert_equal(call.without_outputs(), before[key])  # nothing was launched, and nothing is broken

    in_world(device, work)


@objects
def test_lazily_negated_and_conjugated_values_arrive(device: str, name: str) -> None:
    def work(world: Any) -> None:
        for call in calls_of(world, name).values():
            for argument, tensor in call.reads.items():
                if tensor.is_floating_point():
                    lazy = torch._neg_view(tensor)
                    assert lazy.is_neg()
                    assert_equal(call.without_outputs(**{argument: lazy}), call.without_outputs(**{argument: -tensor}))
                if tensor.is_complex():
                    lazy = tensor.conj()
                    assert lazy.is_conj()
                    wanted = call.without_outputs(**{argument: lazy.resolve_conj()})
                    assert_equal(call.without_outputs(**{argument: lazy}), wanted)
            for argument, tensor in call.writes.items():
                if tensor.is_floating_point():
                    with pytest.raises(InputError, match="negated or conjugated view"):
                        call(**{argument: torch._neg_view(tensor)})

    in_world(device, work)


@pytest.mark.parametrize("name", ["experts", "rows", "payloads"])
def test_autograd_is_not_passed_by(device: str, name: str) -> None:
    """What requires grad is refused with a word on what to use, and taken where no gradients are wanted; what a call
    writes counts as written.
    """

    def work(world: Any) -> None:
        for call in calls_of(world, name).values():
            for argument, tensor in {**call.reads, **call.writes}.items():
                if tensor.is_floating_point():
                    with pytest.raises(InputError, match=r"requires grad.*moegen\.functional.*no_grad"):
                        call(**{argument: tensor.clone().requires_grad_()})
                    with torch.no_grad():
                        call(**{argument: tensor.clone().requires_grad_()})
            before = {argument: tensor._version for argument, tensor in call.writes.items()}
            call()
            for argument, tensor in call.writes.items():
                assert tensor._version > before[argument], argument

    in_world(device, work)


def test_gradients_are_not_computed_with_what_was_overwritten(device: str) -> None:
    def work(world: Any) -> None:
        factor = torch.ones((), device=device, requires_grad=True)
        layer = experts(world)
        memory = layer.allocate()
        x = torch.ones(3, 64, dtype=torch.bfloat16, device=device)
        ids = torch.tensor([[0, 1]] * 3, device=device)
        received, receive = layer.dispatch(x, ids, out=memory, return_recv_hook=True)
        saved_between = factor * received.tokens
        receive()
        saved_before = factor * received.tokens
        layer.dispatch(x, ids, out=received)
        for saved in (saved_between, saved_before):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                saved.sum().backward()
        other = payloads(world)
        parts = [x.new_zeros(3, 128), x.new_zeros(3, 2, dtype=torch.int32), x.new_zeros(3, 2, dtype=torch.float32)]
        lent = other.dispatch(ids, parts).payloads[0]
        saved = factor * lent
        other.dispatch(ids, parts)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()

    in_world(device, work)


def test_inference_tensors_may_be_given(device: str) -> None:
    """They count no versions, because autograd never keeps them."""

    def work(world: Any) -> None:
        call = calls_of(world, "rows")["combine"]
        wanted = call()
        with torch.inference_mode():
            out = torch.zeros_like(call.writes["out"])
        assert_equal(call(out=out), wanted)

    in_world(device, work)


@pytest.mark.parametrize("make", [experts, rows, payloads])
def test_objects_and_calls_need_real_tensors(device: str, make: Any) -> None:
    def work(world: Any) -> None:
        with FakeTensorMode(), pytest.raises(InputError, match="outside of it"):
            make(world)
        name = {experts: "experts", rows: "rows", payloads: "payloads"}[make]
        for call in calls_of(world, name).values():
            with FakeTensorMode(), pytest.raises(InputError, match="outside of it"):
                call.without_outputs()
            call.without_outputs()

    in_world(device, work)


def test_freed_memory_of_handles(device: str) -> None:
    def work(world: Any) -> None:
        x, ids = torch.ones(3, 128, dtype=torch.bfloat16, device=device), torch.tensor([[0, 1]] * 3, device=device)
        few, many, one = experts(world), rows(world), payloads(world)
        parts = [x, x.new_zeros(3, 2, dtype=torch.int32), x.new_zeros(3, 2, dtype=torch.float32)]
        results: list[tuple[Any, Any, Any]] = [
            (few, few.dispatch(x[:, :64].contiguous(), ids), "tokens"),
            (many, many.dispatch(x, ids), "tokens"),
            (one, one.dispatch(ids, parts), "payloads"),
        ]
        for made, received, name in results:
            made.synchronize()
            y = getattr(received, name)
            y = (y[0] if isinstance(y, tuple) else y).clone()
            received.counts.untyped_storage().resize_(0)
            with pytest.raises(InputError, match="the memory of the handle was freed"):
                made.combine(y, received.handle)

    in_world(device, work)


@pytest.mark.slow
def test_a_mask_whose_memory_was_freed(device: str) -> None:
    """Its kernels are of no other test's shape."""

    def work(world: Any) -> None:
        x, ids = torch.ones(3, 64, dtype=torch.bfloat16, device=device), torch.tensor([[0, 1]] * 3, device=device)
        layer = experts(world, active_ranks=True)
        layer.dispatch(x, ids)
        layer.synchronize()
        layer.active_ranks.untyped_storage().resize_(0)
        with pytest.raises(InputError, match="the memory of active_ranks was freed"):
            layer.dispatch(x, ids)

    in_world(device, work)


def test_subclasses_with_memory_of_their_own_are_tensors(device: str) -> None:
    class Weight(torch.nn.Parameter):
        pass

    class Named(torch.Tensor):
        pass

    def work(world: Any) -> None:
        call = calls_of(world, "experts")["dispatch"]
        wanted = call.without_outputs()
        x = call.reads["x"]
        with torch.no_grad():
            assert_equal(call.without_outputs(x=Weight(x, requires_grad=False)), wanted)
            assert_equal(call.without_outputs(x=x.as_subclass(Named)), wanted)

    in_world(device, work)


def test_operators_of_other_devices(device: str) -> None:
    """Torch asks only for shapes if one tensor has no memory, and would return rows that no kernel has written."""

    def work(world: Any) -> None:
        layer = packed_rows(world)
        x = torch.ones(3, 64, dtype=torch.bfloat16, device=device)
        ids = torch.tensor([[0, 1]] * 3, device=device)
        weights = torch.ones(3, 2, device=device)
        for given in ((x.to("meta"), ids, weights), (x, ids.to("meta"), weights), (x, ids, weights.to("meta"))):
            with pytest.raises(InputError, match="on meta and the layer on"):
                functional.dispatch(layer, *given)
            with pytest.raises(InputError, match="on meta and the layer on"):
                torch.ops.moegen.dispatch(*given, layer.number, -1)
        routed = functional.dispatch(layer, x, ids, weights)
        with pytest.raises(InputError, match="on meta and the layer on"):
            functional.combine(layer, routed.rows.to("meta"), routed.handle)
        for room in (-5, -1, 2**40, 2.0, True):
            with pytest.raises(InputError, match="max_rows is an integer"):
                functional.dispatch(layer, x, ids, weights, max_rows=room)  # type: ignore[arg-type]
        for tokens in (-1, 9):
            with pytest.raises(InputError, match="num_tokens is an integer"):
                functional.combine(layer, routed.rows, routed.handle._replace(num_tokens=tokens))

    in_world(device, work)


def test_gradients_of_lazily_negated_weights(device: str) -> None:
    def work(world: Any) -> None:
        layer = packed_rows(world)
        x = torch.randn(3, 64, device=device).bfloat16()
        ids = torch.tensor([[0, 1], [2, 3], [1, 3]], device=device)
        grads = []
        for negate in (torch.neg, torch._neg_view):
            weights = torch.ones(3, 2, device=device, requires_grad=True)
            routed = functional.dispatch(layer, x, ids, negate(weights))
            out = functional.combine(layer, routed.rows, routed.handle)
            out.float().sum().backward()
            grads.append((out.detach(), weights.grad))
        assert_equal(*grads)
        assert flat(grads)[1].abs().sum() > 0

    in_world(device, work)


def test_operators_trace(device: str) -> None:
    """With stand-ins for all tensors they give the shapes; functionalize passes through them."""

    def work(world: Any) -> None:
        layer = packed_rows(world)
        x = torch.ones(3, 64, dtype=torch.bfloat16, device=device)
        ids = torch.tensor([[0, 1]] * 3, device=device)
        with FakeTensorMode() as mode:
            routed = functional.dispatch(layer, mode.from_tensor(x), mode.from_tensor(ids))
            assert functional.combine(layer, routed.rows, routed.handle).shape == (3, 64)
        traced = torch.func.functionalize(lambda given: functional.dispatch(layer, given, ids).rows)(x)
        assert torch.equal(traced, functional.dispatch(layer, x, ids).rows)

    in_world(device, work)
