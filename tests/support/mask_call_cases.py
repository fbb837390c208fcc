# SPDX-License-Identifier: Apache-2.0
"""Ranks that may be missing: what calls measure, take and refuse."""

from __future__ import annotations

import time

import pytest
import torch

import moegen
from moegen import errors
from moegen.runtime.worlds import RankWorld
from support.layer import Layer, Shape, expert_outputs, random_routing
from support.mask_layer import (
    ABSENT,
    EVERYBODY,
    OTHERS,
    PAIR,
    PLENTY,
    SHAPE,
    TIMEOUT,
    TOKENS,
    How,
    make,
    masks,
    round_trip,
)


@pytest.mark.parametrize("wire", ["inline", "row"])
def test_time_waited_for_each_rank(device: str, wire: str) -> None:
    layer = make(device, wire=wire, timeout=PLENTY, slots=2)
    routing = random_routing(SHAPE, TOKENS, 6)
    seconds = 0.3

    def work(world: RankWorld) -> list[list[int]]:
        rank, r = layer.ranks[world.rank], world.rank
        waited = torch.zeros(4, SHAPE.ranks, dtype=torch.int64, device=world.device)
        inputs = [part[r].to(world.device) for part in (routing.x, routing.ids, routing.weights)]

        def step() -> None:
            rank.synchronize()
            world.barrier()
            if r == ABSENT:
                time.sleep(seconds)

        step()
        received = rank.dispatch(*inputs, waited_ns=waited[0])
        step()
        rank.combine(expert_outputs(received), received.handle, waited_ns=waited[1])
        step()
        received, receive = rank.dispatch(*inputs, waited_ns=waited[2], return_recv_hook=True)
        receive()
        step()
        _, receive = rank.combine(expert_outputs(received), received.handle, waited_ns=waited[3], return_recv_hook=True)
        receive()
        rank.synchronize()
        return waited.tolist()

    waited = layer.world.run(work)
    for r in EVERYBODY:
        for call in waited[r]:
            assert call[r] == 0
            assert all(nanoseconds >= 0 for nanoseconds in call)
    for r in OTHERS:
        for call in waited[r]:
            assert 0.5 * seconds < call[ABSENT] / 1e9 < 20
    layer.destroy()


def test_timeout_of_one_call(device: str) -> None:
    layer = make(device, timeout=600.0)
    routing = random_routing(SHAPE, TOKENS, 8)
    round_trip(layer, routing, How(timeout=TIMEOUT), combining=OTHERS)
    assert masks(layer, OTHERS) == [[1, 1, 0]] * 2
    layer.destroy()


def test_timeout_of_one_call_that_needs_everybody(device: str) -> None:
    layer = Layer(PAIR, device, timeout=600.0)
    x = torch.ones(1, PAIR.hidden, dtype=torch.bfloat16, device=device)

    def work(world: RankWorld) -> None:
        if world.rank == 0:
            layer.ranks[0].dispatch(x, torch.tensor([[0, 3]], device=device), timeout=0.3)
            layer.ranks[0].synchronize()

    with pytest.raises(errors.PeerTimeoutError) as caught:
        layer.world.run(work)
    assert caught.value.timeout == 0.3
    layer.destroy()


def test_objects_that_share_a_mask(device: str) -> None:
    world = moegen.LocalWorld(2, device)

    def work(rank: RankWorld) -> list[list[int]]:
        mask = torch.ones(2, dtype=torch.int32, device=rank.device)
        layers = [
            moegen.ExpertParallel(rank, num_experts=4, num_topk=2, hidden=hidden, max_tokens_per_rank=8,
                timeout=TIMEOUT, active_ranks=mask)
            for hidden in (64, 128)
        ]  # fmt: skip
        if rank.rank == 0:
            for layer in layers:
                x = torch.ones(2, layer.problem.hidden, dtype=torch.bfloat16, device=rank.device)
                layer.dispatch(x, torch.tensor([[0, 3], [1, 2]], device=rank.device))
                layer.synchronize()
        seen = [layer.active_ranks.tolist() for layer in layers]
        rank.barrier()
        for layer in layers:
            layer.destroy()
        return seen

    assert world.run(work) == [[[1, 0], [1, 0]], [[1, 1], [1, 1]]]


def test_bad_masks_and_options(device: str) -> None:
    shape = Shape(1, 4, 2, 64, 8)
    plain, masked = Layer(shape, device), make(device, shape=shape)

    def work(world: RankWorld) -> None:
        x = torch.ones(1, 64, dtype=torch.bfloat16, device=world.device)
        ids = torch.tensor([[0, 3]], device=world.device)
        good = torch.zeros(1, dtype=torch.int64, device=world.device)
        one, two = plain.ranks[0], masked.ranks[0]
        with pytest.raises(errors.InputError, match="active_ranks=True"):
            _ = one.active_ranks
        with pytest.raises(errors.InputError, match=r"no waited_ns.*active_ranks=True"):
            one.dispatch(x, ids, waited_ns=good)
        with pytest.raises(errors.InputError, match=r"waited_ns is torch.int64; got torch.int32"):
            two.dispatch(x, ids, waited_ns=good.int())
        with pytest.raises(errors.InputError, match=r"waited_ns is \[1\]; got \[2\]"):
            two.dispatch(x, ids, waited_ns=torch.zeros(2, dtype=torch.int64, device=world.device))
        with pytest.raises(errors.InputError, match="timeout is a number of seconds"):
            two.dispatch(x, ids, timeout=0)
        received = one.dispatch(x, ids)
        with pytest.raises(errors.InputError, match=r"no renormalize.*active_ranks=True"):
            one.combine(expert_outputs(received), received.handle, renormalize=True)
        received = two.dispatch(x, ids, waited_ns=good)
        two.combine(expert_outputs(received), received.handle, waited_ns=good, renormalize=True)
        two.synchronize()
        assert good.tolist() == [0]
        for bad, says in (
            (torch.ones(2, dtype=torch.int32, device=world.device), r"active_ranks is \[1\]; got \[2\]"),
            (torch.ones(1, device=world.device), "active_ranks is torch.int32; got torch.float32"),
            (torch.ones(1, dtype=torch.int32, device="meta"), "active_ranks is on meta"),
            ("all", "active_ranks is a torch tensor; got str"),
        ):
            with pytest.raises(errors.InputError, match=says):
                moegen.ExpertParallel(
                    world, num_experts=4, num_topk=2, hidden=64, max_tokens_per_rank=8, active_ranks=bad
                )

    plain.world.run(work)
    plain.destroy()
    masked.destroy()
