# SPDX-License-Identifier: Apache-2.0
"""What family `ll` can do beside a plain call, on every device: FP8, hooks and slots, streams, reused outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moegen
from moegen import errors, reference
from moegen.runtime.worlds import RankWorld
from support.layer import Layer, RankResult, Routing, Shape, expert_outputs, random_routing

KINDS = ("fp8", "fp8_pow2", "fp8_ue8m0")
SHAPE = Shape(3, 10, 4, 512, 24)
TOKENS = (24, 0, 13)
FP8_SHAPES = (
    (Shape(1, 4, 2, 128, 8), "fp8"),
    (Shape(2, 8, 3, 2944, 70), "fp8"),
    (Shape(3, 10, 4, 512, 24), "fp8_pow2"),
    (Shape(4, 16, 4, 1024, 80), "fp8_ue8m0"),
)


def inputs(routing: Routing, world: RankWorld) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, ids, weights = (part[world.rank].to(world.device) for part in (routing.x, routing.ids, routing.weights))
    return x, ids, weights


def check_tokens(shape: Shape, routing: Routing, kind: str, results: list[moegen.Dispatched]) -> None:
    """Rows, scales, counts and where rows come from, bit by bit."""
    quantised = [reference.quantise(x, kind) for x in routing.x]
    bits = reference.dispatch([q.view(torch.uint8) for q, _ in quantised], routing.ids, shape.experts, shape.max_tokens)
    scales = reference.dispatch([s for _, s in quantised], routing.ids, shape.experts, shape.max_tokens)
    for want, want_scales, got in zip(bits, scales, results, strict=True):
        assert got.scales is not None
        assert got.scales.stride(1) == 1  # rows lie side by side
        assert torch.equal(got.counts.cpu(), want.counts)
        for expert, rows in enumerate(want.sources):
            n = len(rows)
            assert torch.equal(got.tokens[expert, :n].cpu().view(torch.uint8), want.tokens[expert, :n])
            assert torch.equal(got.scales[expert, :n].cpu(), want_scales.tokens[expert, :n])
            assert got.row_tokens[expert, :n].tolist() == [token for _, token in rows]


@pytest.mark.parametrize(("shape", "kind"), FP8_SHAPES, ids=str)
def test_fp8_dispatch_equals_quantised_reference(device: str, shape: Shape, kind: str) -> None:
    layer = Layer(shape, device, quantize=kind)
    tokens = [(shape.max_tokens + 5 * rank) % (shape.max_tokens + 1) for rank in range(shape.ranks)]
    routing = random_routing(shape, tokens, 3, kind="free")
    # All sizes of numbers: groups of zeros, tiny and huge ones, and one number that rounds up to the next scale.
    for x in routing.x:
        x *= torch.logspace(-6, 6, len(x), base=2).unsqueeze(1).bfloat16() if len(x) else 1
        x[: len(x) // 3, :128] = 0
        x[: len(x) // 2, 100] = 448.0

    def work(world: RankWorld) -> moegen.Dispatched:
        rank = layer.ranks[world.rank]
        received = rank.dispatch(*inputs(routing, world))
        rank.synchronize()
        return received

    check_tokens(shape, routing, kind, layer.world.run(work))
    layer.destroy()


@pytest.mark.slow
def test_fp8_by_two_teams_of_sixteen_warps(device: str) -> None:
    """64 registers a thread, where NVRTC 13.5 once compiled the order of an inline row's packets wrongly."""
    shape = Shape(2, 16, 4, 7168, 4)
    layer = Layer(shape, device, quantize="fp8", wire="inline", warp_groups="2x16")
    routing = random_routing(shape, (4, 3), 1)

    def work(world: RankWorld) -> moegen.Dispatched:
        received = layer.ranks[world.rank].dispatch(*inputs(routing, world))
        layer.ranks[world.rank].synchronize()
        return received

    check_tokens(shape, routing, "fp8", layer.world.run(work))
    layer.destroy()


def test_fp8_then_combine(device: str) -> None:
    """The experts' outputs are bf16 whatever was dispatched."""
    layer = Layer(SHAPE, device, quantize="fp8")
    routing = random_routing(SHAPE, TOKENS, 5)

    def work(world: RankWorld) -> RankResult:
        rank = layer.ranks[world.rank]
        received = rank.dispatch(*inputs(routing, world))
        rank.synchronize()
        assert received.scales is not None
        y = received.tokens.float() * received.scales.repeat_interleave(128, dim=2)
        beyond = torch.arange(y.shape[1], device=world.device)[None, :] >= received.counts[:, None]
        y = y.masked_fill(beyond[:, :, None], 0).bfloat16()
        combined = rank.combine(y, received.handle)
        rank.synchronize()
        return RankResult(received.tokens, received.counts.cpu(), received.ranges.cpu(), y.cpu(), combined.cpu())

    results = layer.world.run(work)
    expected = reference.dispatch(routing.x, routing.ids, SHAPE.experts, SHAPE.max_tokens)
    sums = reference.combine([r.y for r in results], expected, routing.ids, routing.weights, SHAPE.experts)
    for got, want in zip(results, sums, strict=True):
        assert ((got.combined.double() - want.exact).abs() <= want.bound).all()
    layer.destroy()


def hooked_round_trip(layer: Layer, routing: Routing, *, late: bool) -> list[RankResult]:
    """As Layer.round_trip, in halves; inputs are overwritten between the halves."""

    def work(world: RankWorld) -> RankResult:
        rank = layer.ranks[world.rank]
        x, ids, weights = inputs(routing, world)
        x = x.clone()
        received, receive = rank.dispatch(x, ids, None if late else weights, return_recv_hook=True)
        x.fill_(torch.nan)
        receive()
        y = expert_outputs(received)
        kept = y.clone()
        combined, receive = rank.combine(y, received.handle, weights if late else None, return_recv_hook=True)
        y.fill_(torch.nan)
        receive()
        rank.synchronize()
        parts = (received.tokens, received.counts, received.ranges, kept, combined)
        return RankResult(*(part.cpu() for part in parts))

    return layer.world.run(work)


def verify_in_halves(layer: Layer, routing: Routing, results: list[RankResult]) -> None:
    shape = layer.shape
    expected = reference.dispatch(routing.x, routing.ids, shape.experts, shape.max_tokens)
    sums = reference.combine(
        [r.y for r in results], expected, routing.ids, routing.weights, shape.experts, in_halves=True
    )
    for want, total, got in zip(expected, sums, results, strict=True):
        assert torch.equal(got.counts, want.counts)
        assert torch.equal(got.ranges, want.ranges)
        for expert, count in enumerate(want.counts.tolist()):
            assert torch.equal(got.tokens[expert, :count], want.tokens[expert, :count])
        assert ((got.combined.double() - total.exact).abs() <= total.bound).all()


@pytest.mark.parametrize("wire", ["inline", "row"])
@pytest.mark.parametrize("late", [False, True], ids=["at_dispatch", "at_combine"])
def test_hooks(device: str, wire: str, late: bool) -> None:
    layer = Layer(SHAPE, device, slots=2, wire=wire)
    for seed, kind in enumerate(("uniform", "free", "one", "none")):
        routing = random_routing(SHAPE, TOKENS, seed, kind=kind)
        verify_in_halves(layer, routing, hooked_round_trip(layer, routing, late=late))
    layer.destroy()


def test_fp8_with_hooks(device: str) -> None:
    layer = Layer(SHAPE, device, slots=2, quantize="fp8_ue8m0")
    routing = random_routing(SHAPE, TOKENS, 7)

    def work(world: RankWorld) -> moegen.Dispatched:
        rank = layer.ranks[world.rank]
        received, receive = rank.dispatch(*inputs(routing, world), return_recv_hook=True)
        receive()
        rank.synchronize()
        return received

    check_tokens(SHAPE, routing, "fp8_ue8m0", layer.world.run(work))
    layer.destroy()


def two_micro_batches(device: str, rounds: int) -> None:
    """Two micro-batches in flight: while one's rows are under way, the other sends; whole calls go in between."""
    layer = Layer(SHAPE, device, slots=2)
    routings = [random_routing(SHAPE, [(7 * r + 5 * s) % 25 for r in range(3)], s) for s in range(4)]
    golden = [hooked_round_trip(layer, routing, late=False) for routing in routings]
    for routing, results in zip(routings, golden, strict=True):
        verify_in_halves(layer, routing, results)

    def work(world: RankWorld) -> int:
        rank, r = layer.ranks[world.rank], world.rank
        given = [inputs(routing, world) for routing in routings]
        wanted = [results[r].combined.to(world.device) for results in golden]
        wrong = torch.zeros((), dtype=torch.int64, device=world.device)
        for step in range(rounds):
            one, two = step % 4, (step + 1) % 4
            received_1, receive_1 = rank.dispatch(*given[one], return_recv_hook=True)
            received_2, receive_2 = rank.dispatch(*given[two], return_recv_hook=True)
            receive_1()
            combined_1, finish_1 = rank.combine(expert_outputs(received_1), received_1.handle, return_recv_hook=True)
            if step % 3 == 0:
                rank.dispatch(*given[two])  # takes the slot that is free
            receive_2()
            combined_2, finish_2 = rank.combine(expert_outputs(received_2), received_2.handle, return_recv_hook=True)
            finish_1()
            finish_2()
            wrong += (combined_1 != wanted[one]).sum() + (combined_2 != wanted[two]).sum()
        rank.synchronize()
        return int(wrong)

    assert layer.world.run(work) == [0, 0, 0]
    layer.destroy()


def test_two_micro_batches_100(device: str) -> None:
    two_micro_batches(device, 100)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_micro_batches_1000(device: str) -> None:
    two_micro_batches(device, 1000)


def test_handles_that_nothing_was_dispatched_into(device: str) -> None:
    layer = Layer(Shape(1, 4, 2, 64, 8), device, slots=2)
    routing = random_routing(layer.shape, (3,), 1)

    def work(world: RankWorld) -> None:
        rank = layer.ranks[0]
        memory = rank.allocate()
        with pytest.raises(errors.HandleError, match="nothing was dispatched"):
            rank.combine(memory.tokens, memory.handle)
        received, receive = rank.dispatch(*inputs(routing, world), out=memory, return_recv_hook=True)
        with pytest.raises(errors.HandleError, match="hook"):
            rank.combine(memory.tokens, received.handle)
        receive()
        assert rank.combine(expert_outputs(received), received.handle).shape == (3, 64)
        _, receive = rank.dispatch(*inputs(routing, world), return_recv_hook=True)
        rank.synchronize()
        rank.destroy()
        with pytest.raises(errors.DestroyedError):
            receive()

    layer.world.run(work)


def test_one_hook_too_many(device: str) -> None:
    layer = Layer(Shape(1, 4, 2, 64, 8), device, slots=2)
    routing = random_routing(layer.shape, (3,), 1)

    def work(world: RankWorld) -> None:
        rank = layer.ranks[0]
        hooks = [rank.dispatch(*inputs(routing, world), return_recv_hook=True)[1] for _ in range(2)]
        with pytest.raises(errors.SlotError, match="slots=3"):
            rank.dispatch(*inputs(routing, world), return_recv_hook=True)
        with pytest.raises(errors.SlotError, match="all 2 slots"):
            rank.dispatch(*inputs(routing, world))
        hooks[0]()
        with pytest.raises(errors.SlotError, match="called once"):
            hooks[0]()
        received = rank.dispatch(*inputs(routing, world))
        hooks[1]()
        rank.combine(expert_outputs(received), received.handle)
        rank.synchronize()

    layer.world.run(work)
    layer.destroy()


def test_hooks_need_slots(device: str) -> None:
    layer = Layer(Shape(1, 4, 2, 64, 8), device)
    routing = random_routing(layer.shape, (3,), 1)

    def work(world: RankWorld) -> None:
        with pytest.raises(errors.SlotError, match="slots=2"):
            layer.ranks[0].dispatch(*inputs(routing, world), return_recv_hook=True)
        with pytest.raises(errors.InputError, match="exclude each other"):
            layer.ranks[0].dispatch(*inputs(routing, world), return_recv_hook=True, async_finish=True)  # type: ignore[call-overload]

    layer.world.run(work)
    layer.destroy()


@pytest.mark.parametrize("num_sms", [1, 2, 3, 7])
@pytest.mark.parametrize("late", [False, True], ids=["at_dispatch", "at_combine"])
def test_few_blocks_have_several_roles(device: str, num_sms: int, late: bool) -> None:
    layer = Layer(SHAPE, device, slots=2, num_sms=num_sms, timeout=5.0)
    routing = random_routing(SHAPE, TOKENS, num_sms, kind="free")
    layer.verify(routing, layer.round_trip(routing, late=late))
    verify_in_halves(layer, routing, hooked_round_trip(layer, routing, late=late))
    layer.destroy()


@pytest.mark.parametrize("late", [False, True], ids=["at_dispatch", "at_combine"])
@pytest.mark.parametrize("wire", ["inline", "row"])
def test_few_tokens_are_split_over_teams(device: str, wire: str, late: bool) -> None:
    """Three tokens and four or five destinations, for which there are up to 32 blocks."""
    shape = Shape(5, 7, 2, 16, 3)
    layer = Layer(shape, device, slots=2, num_sms=32, wire=wire, timeout=5.0)
    for seed, tokens in enumerate([(3, 1, 3, 0, 2), (1, 1, 1, 1, 1)]):
        routing = random_routing(shape, tokens, seed, kind="free")
        layer.verify(routing, layer.round_trip(routing, late=late))
        verify_in_halves(layer, routing, hooked_round_trip(layer, routing, late=late))
    layer.destroy()


def test_async_finish(device: str) -> None:
    """On a GPU with one rank: virtual ranks there have a hardware queue each, and these calls take another stream."""
    shape = SHAPE if device == "cpu" else Shape(1, 10, 4, 512, 24)
    layer = Layer(shape, device)
    routing = random_routing(shape, TOKENS[: shape.ranks], 9)
    wanted = layer.round_trip(routing)

    def work(world: RankWorld) -> torch.Tensor:
        rank = layer.ranks[world.rank]
        received, event = rank.dispatch(*inputs(routing, world), async_finish=True)
        event.wait()
        combined, event = rank.combine(expert_outputs(received), received.handle, async_finish=True)
        event.wait()
        result: Any = combined.cpu()
        rank.synchronize()
        return result

    for got, want in zip(layer.world.run(work), wanted, strict=True):
        assert torch.equal(got, want.combined)
    layer.destroy()


def test_nothing_is_allocated_with_out(device: str) -> None:
    layer = Layer(SHAPE, device, quantize="fp8")
    routing = random_routing(SHAPE, TOKENS, 2)

    def work(world: RankWorld) -> None:
        rank, r = layer.ranks[world.rank], world.rank
        mine = inputs(routing, world)
        memory = rank.allocate()
        out = torch.empty(routing.x[r].shape, dtype=torch.bfloat16, device=world.device)
        y = torch.zeros(memory.tokens.shape, dtype=torch.bfloat16, device=world.device)
        totals = torch.zeros(len(rank.local_experts), dtype=torch.int32, device=world.device)
        rank.combine(y, rank.dispatch(*mine, out=memory, total_counts=totals).handle, out=out)
        # All ranks count in one place: between two barriers nothing runs but the calls.
        world.barrier()
        before = allocations(world)
        world.barrier()
        received = rank.dispatch(*mine, out=memory, total_counts=totals)
        combined = rank.combine(y, received.handle, out=out)
        world.barrier()
        made = allocations(world) - before
        world.barrier()
        assert made == 0
        assert received.tokens is memory.tokens
        assert combined is out
        rank.synchronize()
        assert torch.equal(totals, 2 * received.counts)

    layer.world.run(work)
    layer.destroy()


def allocations(world: RankWorld) -> int:
    if world.device.type != "cuda":
        return 0
    return int(torch.cuda.memory_stats(world.device)["allocation.all.allocated"])


def test_result_of_another_object_is_no_out(device: str) -> None:
    shape = Shape(1, 4, 2, 64, 8)
    one, two = Layer(shape, device), Layer(shape, device)
    routing = random_routing(shape, (3,), 1)

    def work(world: RankWorld) -> None:
        with pytest.raises(errors.HandleError, match="another ExpertParallel"):
            one.ranks[0].dispatch(*inputs(routing, world), out=two.ranks[0].allocate())

    one.world.run(work)
    one.destroy()
    two.destroy()
