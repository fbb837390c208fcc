# SPDX-License-Identifier: Apache-2.0
"""Memory that a call would both read and write: refused with the names of both tensors, before anything is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moegen
from moegen.errors import HandleError, InputError
from support.call_arguments import BF16, F32, FP8, Maker, experts, in_world, payloads, rows

paths = pytest.mark.parametrize("path", ["ipc", "collective"])
IDS = [[0, 1], [2, 3], [1, 0]]


def refused(call: Callable[[], object], *names: str) -> None:
    with pytest.raises(InputError, match="share memory") as caught:
        call()
    for name in names:
        assert name in str(caught.value)


@paths
def test_experts(device: str, path: str) -> None:
    def work(world: Any) -> None:
        layer, new = experts(world, path), Maker(device)
        hidden = layer.problem.hidden
        x, weights, ids = new(3, hidden), new(3, 2, dtype=F32), torch.tensor(IDS, device=device)
        over_x = new(4, 8, hidden)
        inside = over_x.view(-1, hidden)[5:8]
        refused(lambda: layer.dispatch(inside, ids, weights, out=over_x), "x", "out")
        memory = layer.allocate(tokens=over_x)
        refused(lambda: layer.dispatch(inside, ids, weights, out=memory), "x", "out.tokens")
        received = layer.dispatch(x, ids, weights, out=memory)
        assert received is memory
        refused(lambda: layer.dispatch(x, ids, num_tokens=received.counts[:1], out=received), "num_tokens", "out")
        refused(lambda: layer.dispatch(x, ids, total_counts=received.counts, out=received), "total_counts", "out")
        y = received.tokens.clone()
        refused(lambda: layer.combine(y, received.handle, out=y.view(-1, hidden)[:3]), "y", "out")
        refused(
            lambda: layer.combine(y, received.handle, weights, out=overlay(weights, 3, hidden)), "topk_weights", "out"
        )
        wanted = layer.combine(y, received.handle)
        assert torch.equal(layer.combine(y, received.handle, out=torch.empty_like(wanted)), wanted)

    in_world(device, work)


def overlay(tensor: torch.Tensor, tokens: int, hidden: int) -> torch.Tensor:
    """bfloat16 [tokens, hidden] in a tensor's memory, which is made longer for it."""
    storage = tensor.untyped_storage()
    storage.resize_(max(storage.nbytes(), 2 * tokens * hidden))
    return torch.empty(0, dtype=BF16, device=tensor.device).set_(storage, 0, (tokens, hidden))


@paths
def test_results_of_open_hooks(device: str, path: str) -> None:
    def work(world: Any) -> None:
        layer, new = experts(world, path), Maker(device)
        x, ids = new(3, layer.problem.hidden), torch.tensor(IDS, device=device)
        received, receive = layer.dispatch(x, ids, return_recv_hook=True)
        refused(lambda: layer.dispatch(x, ids, out=received), "out.tokens", "hook was not called")
        refused(lambda: layer.dispatch(x, ids, out=received.tokens), "out", "hook was not called")
        receive()
        sums, receive = layer.combine(received.tokens.clone(), received.handle, return_recv_hook=True)
        refused(lambda: layer.combine(received.tokens.clone(), received.handle, out=sums), "out", "hook was not called")
        refused(lambda: layer.dispatch(x, ids, out=received), "the memory of out", "hook was not called")
        own = torch.empty_like(sums)
        _, receive_again = layer.combine(received.tokens.clone(), received.handle, out=own, return_recv_hook=True)
        receive()
        receive_again()  # both only read what the handle is made of
        assert torch.equal(own, sums)
        layer.dispatch(x, ids, out=received)
        layer.synchronize()

    in_world(device, work)


@paths
@pytest.mark.parametrize("tokens", [2, 3])
def test_handles_whose_memory_was_used_again(device: str, path: str, tokens: int) -> None:
    def work(world: Any) -> None:
        layer, new = experts(world, path), Maker(device)
        x, ids = new(3, layer.problem.hidden), torch.tensor(IDS, device=device)
        received = layer.dispatch(x, ids)
        old = received.handle
        with pytest.raises(InputError):
            layer.dispatch(x, ids[:1], out=received)
        layer.combine(received.tokens.clone(), old)  # nothing was launched: it is still good
        again = layer.dispatch(-x[:tokens], ids[:tokens], out=received)
        assert again is received
        with pytest.raises(HandleError, match="later dispatch wrote its results"):
            layer.combine(again.tokens.clone(), old)
        assert layer.combine(again.tokens.clone(), received.handle).shape == (tokens, layer.problem.hidden)
        layer.synchronize()

    in_world(device, work)


@paths
def test_rows(device: str, path: str) -> None:
    def work(world: Any) -> None:
        layer, new = rows(world, path), Maker(device)
        hidden, topk = layer.problem.hidden, layer.problem.num_topk
        x, ids = new(3, hidden), new.ids(topk=topk)
        over_x = new(layer.max_rows, hidden)
        refused(lambda: layer.dispatch(over_x[:3], ids, out=over_x), "x", "out")
        received = layer.dispatch(x, ids)
        refused(lambda: layer.dispatch(over_x[2:5], handle=received.handle, out=over_x), "x", "out")
        y = received.tokens.clone()
        refused(lambda: layer.combine(y, received.handle, out=y[:3]), "y", "out")
        bias = new(4, hidden)
        refused(lambda: layer.combine(y, received.handle, bias=bias[:3], out=bias[1:]), "bias", "out")
        wanted, _ = layer.combine(y, received.handle, bias=bias[:3])
        result, _ = layer.combine(y, received.handle, bias=bias[:3], out=bias[:3])  # element for element
        assert torch.equal(result, wanted)

    in_world(device, work)


def test_scales_that_share_memory(device: str) -> None:
    def work(world: Any) -> None:
        layer, new = rows(world, dtype=FP8, hidden=512), Maker(device)
        x, ids = (new(3, 512).to(FP8), new(3, 4, dtype=F32)), torch.tensor(IDS, device=device)
        number = layer.max_rows
        for strides in ((0, 1), (2, 1), (1, 1), (4, 0)):
            shared = torch.zeros(64, device=device).as_strided((number, 4), strides)
            with pytest.raises(InputError, match="elements of out_scales share memory"):
                layer.dispatch(x, ids, out_scales=shared)
        wanted = layer.dispatch(x, ids).scales
        assert wanted is not None
        for strides in ((4, 1), (1, number), (9, 2)):
            own = torch.zeros(128, device=device).as_strided((number, 4), strides)
            got = layer.dispatch(x, ids, out_scales=own).scales
            assert got is own and torch.equal(own[:3], wanted[:3])
        scales = torch.zeros(number + 1, 4, device=device)
        refused(lambda: layer.dispatch((x[0], scales[:3]), ids, out_scales=scales[1:]), "scales", "out_scales")

    in_world(device, work)


def test_rows_that_were_lent(device: str) -> None:
    def work(world: Any) -> None:
        layer, new = rows(world, borrow=True), Maker(device)
        x, ids = new(3, 128), torch.tensor(IDS, device=device)
        lent = layer.dispatch(x, ids).tokens[0, :3]
        with pytest.raises(InputError, match="x lies in this object's receive buffer"):
            layer.dispatch(lent, ids)
        assert torch.equal(layer.dispatch(lent.clone(), ids).tokens[0, :3], x)
        received = layer.dispatch(x, ids)
        y = new(received.handle.rows, 128)
        refused(lambda: layer.combine(y, received.handle, out=lent), "out", "receive buffer")

    in_world(device, work)


@paths
def test_payloads(device: str, path: str) -> None:
    def work(world: Any) -> None:
        layer, other, new = payloads(world, path), payloads(world, path), Maker(device)
        parts = [new(3, 128), new.zeros(3, 2), new(3, 2, dtype=F32)]
        ids = torch.tensor(IDS, device=device)
        received = layer.dispatch(ids, parts)
        came = [plane[0, :3] for plane in received.payloads]
        with pytest.raises(InputError, match=r"payloads\[0\] lies in this object's receive buffer"):
            layer.dispatch(ids, came)
        with pytest.raises(InputError, match="topk_idx lies in this object's receive buffer"):
            layer.dispatch(came[1], parts)
        passed_on = other.dispatch(ids, came)  # the other one's is not where anyone writes now
        assert torch.equal(passed_on.payloads[0][0, :3], parts[0])
        y = new(1, 8, 128)
        refused(lambda: layer.combine(y, received.handle, out=y.view(-1, 128)[:3]), "y", "out")
        refused(lambda: layer.combine(y, received.handle, out=came[0]), "out", "receive buffer")
        wanted = layer.combine(y, received.handle)
        assert torch.equal(layer.combine(y, received.handle, out=torch.empty_like(wanted)), wanted)

    in_world(device, work)


def test_rows_that_others_read(device: str) -> None:
    """`expert_rows()` lies beside the receive buffer: rows come from there, results do not go there."""

    def work(world: Any) -> None:
        layer, new = payloads(world, expert_rows=True), Maker(device)
        parts = [new(3, 128), new.zeros(3, 2), new(3, 2, dtype=F32)]
        received = layer.dispatch(torch.tensor(IDS, device=device), parts)
        y = layer.expert_rows()
        y.copy_(received.payloads[0])
        out = torch.empty(3, 128, dtype=BF16, device=device)
        layer.combine(y, received.handle, out=out)
        layer.synchronize()
        assert torch.equal(out, parts[0])
        refused(lambda: layer.combine(y, received.handle, out=y[0, 5:]), "out", "receive buffer")

    in_world(device, work)


def test_quantised_results(device: str) -> None:
    def work(world: Any) -> None:
        layer, new = payloads(world), Maker(device)
        handle = layer.dispatch(
            torch.tensor(IDS, device=device), [new(3, 128), new.zeros(3, 2), new.zeros(3, 2)]
        ).handle
        memory = torch.zeros(4096, dtype=torch.uint8, device=device)
        y = memory[:2048].view(BF16).view(1, 8, 128)
        data, scales = memory[:384].view(FP8).view(3, 128), new.zeros(3, 4, dtype=torch.uint8)
        out = moegen.Quantised(data, scales)
        refused(lambda: layer.combine(y, handle, out=out, quantize="mxfp8"), "y", "out.data")
        inside = memory[2048:2432]
        out = moegen.Quantised(inside.view(FP8).view(3, 128), inside[:12].view(3, 4))
        refused(lambda: layer.combine(y, handle, out=out, quantize="mxfp8"), "out.data", "out.scales")

    in_world(device, work)
