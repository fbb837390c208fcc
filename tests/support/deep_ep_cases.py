# SPDX-License-Identifier: Apache-2.0
"""`moegen.compat.deep_ep.Buffer` called as frameworks call DeepEP, against an oracle of its own, on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import moegen
from moegen.compat import deep_ep, fewer_tokens
from moegen.runtime.worlds import RankWorld

MAX_TOKENS = 40


@dataclass(frozen=True)
class Case:
    """Shapes and options of one call."""

    ranks: int
    experts: int
    topk: int
    hidden: int
    options: dict[str, bool]
    max_tokens: int = MAX_TOKENS

    def __str__(self) -> str:
        words = "-".join(name for name, on in self.options.items() if on) or "bf16"
        return f"r{self.ranks}-e{self.experts}-k{self.topk}-h{self.hidden}-{words}"


BF16 = {"use_fp8": False}
FP8 = {"use_fp8": True}
ROUNDED = {"use_fp8": True, "round_scale": True}
UE8M0 = {"use_fp8": True, "round_scale": True, "use_ue8m0": True}

CASES = (
    Case(1, 8, 1, 2048, BF16),
    Case(2, 16, 8, 2880, BF16),
    Case(2, 64, 8, 7168, FP8),
    Case(2, 384, 16, 512, BF16),
    Case(3, 384, 6, 3584, UE8M0),
    Case(4, 8, 5, 2048, ROUNDED),
    Case(8, 16, 10, 512, FP8),
    Case(8, 256, 16, 8192, BF16),
)
MODES = ("plain", "hook", "async")


def inputs(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every rank can make every other's: tokens, ids (some -1), weights."""
    generator = torch.Generator().manual_seed(100 * case.hidden + rank)
    tokens = (7 * rank + 11) % (case.max_tokens + 1) if rank != 1 else 0
    x = torch.randn(tokens, case.hidden, generator=generator).bfloat16()
    ids = torch.rand(tokens, case.experts, generator=generator).topk(case.topk, dim=1).indices
    ids[torch.rand(tokens, case.topk, generator=generator) < 0.1] = -1
    weights = torch.rand(tokens, case.topk, generator=generator)
    return x, ids, weights


def dequantised(tokens: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[experts, rows, hidden] float32."""
    if scales.dtype == torch.int32:
        shape = (*scales.shape[:2], -1)
        exponents = scales.contiguous().view(torch.uint8).reshape(shape).int()
        scales = (exponents << 23).view(torch.float32)
    return tokens.float() * scales.repeat_interleave(128, dim=2)


def settle(event: deep_ep.EventOverlap, hook: Callable[[], None] | None, mode: str) -> None:
    assert (hook is not None) == (mode == "hook")
    if hook is not None:
        hook()
    if mode == "async":
        event.current_stream_wait()


def check_dispatch(case: Case, rank: int, received: Any, count: torch.Tensor, handle: tuple[Any, ...]) -> torch.Tensor:
    """Counts, ranges and rows against the routing of all ranks; what the experts are given, [experts, rows, hidden]."""
    src_info, layout_range, max_tokens, hidden, experts = handle
    local = case.experts // case.ranks
    assert (max_tokens, hidden, experts) == (case.max_tokens, case.hidden, case.experts)
    assert count.dtype == torch.int32
    assert src_info.shape == (local, case.ranks * case.max_tokens)
    assert layout_range.shape == (local, case.ranks)
    assert layout_range.dtype == torch.int64
    given = dequantised(*received) if case.options["use_fp8"] else received.float()
    assert given.shape == (local, case.ranks * case.max_tokens, case.hidden)
    everything = [inputs(case, source) for source in range(case.ranks)]
    for expert in range(local):
        total = 0
        for source, (x, ids, _) in enumerate(everything):
            wanted = (ids == rank * local + expert).any(dim=1).nonzero().flatten()
            begin, number = divmod(int(layout_range[expert, source]), 2**32)
            assert number == len(wanted)
            rows = slice(begin, begin + number)
            assert src_info[expert, rows].tolist() == wanted.tolist()
            got, want = given[expert, rows].cpu(), x[wanted].float()
            if case.options["use_fp8"]:  # three bits behind the leading one; a power of two wastes at most one of them
                assert ((got - want).abs() <= want.abs() / 8 + 0.01).all()
            else:
                assert torch.equal(got, want)
            total += number
        assert int(count[expert]) == total
    return given


def round_trip_of_rank(buffer: deep_ep.Buffer, world: RankWorld, case: Case, mode: str, *, given: bool = True) -> None:
    """Dispatch and combine of one rank in `mode`; `given`: the output, and the handle's buffer for the input."""
    x, ids, weights = (part.to(world.device) for part in inputs(case, world.rank))
    stats = torch.zeros(case.experts // case.ranks, dtype=torch.int32, device=world.device)
    asked = {"async_finish": mode == "async", "return_recv_hook": mode == "hook"}
    world.barrier()  # what torch does for the inputs, and to check, must not queue up behind a kernel that waits
    received, count, handle, event, hook = buffer.low_latency_dispatch(
        x, ids, case.max_tokens, case.experts, cumulative_local_expert_recv_stats=stats, **case.options, **asked
    )
    settle(event, hook, mode)
    layer = handle.owner
    layer.synchronize()
    world.barrier()
    y = check_dispatch(case, world.rank, received, count, handle).bfloat16()
    assert torch.equal(stats, count)
    if given:
        buffer.get_next_low_latency_combine_buffer(handle).copy_(y)
        y.fill_(torch.nan)  # and is not read
    out = torch.empty_like(x) if given else None
    layer.synchronize()
    world.barrier()
    combined, event, hook = buffer.low_latency_combine(x=y, topk_idx=ids, topk_weights=weights, handle=handle,
        zero_copy=given, out=out, **asked)  # fmt: skip
    settle(event, hook, mode)
    layer.synchronize()  # a rank that did not come is named before its numbers are missed
    assert combined is out or not given
    kept = (weights * (ids >= 0)).sum(dim=1, keepdim=True)
    want = x.float() * kept
    slack = 2**-3 if case.options["use_fp8"] else 2**-6
    assert ((combined.float() - want).abs() <= slack * want.abs() + 0.05 * kept).all()
    world.barrier()


def round_trip(case: Case, mode: str, device: str) -> None:
    def work(rank: RankWorld) -> None:
        buffer = deep_ep.Buffer(rank, num_rdma_bytes=1 << 20, low_latency_mode=True, num_qps_per_rank=8)
        round_trip_of_rank(buffer, rank, case, mode)
        buffer.destroy()

    moegen.LocalWorld(case.ranks, device).run(work)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trip(device: str, case: Case) -> None:
    round_trip(case, "plain", device)


@pytest.mark.parametrize("mode", ["hook", "async"])
def test_modes(device: str, mode: str) -> None:
    ranks = 1 if device == "cuda" and mode == "async" else 2  # virtual ranks have one hardware queue each
    round_trip(Case(ranks, 16, 4, 512, FP8), mode, device)


def test_bad_calls(device: str) -> None:
    world = moegen.LocalWorld(1, device)

    def work(rank: RankWorld) -> None:
        buffer = deep_ep.Buffer(rank)
        x, ids = (
            torch.zeros(3, 512, dtype=torch.bfloat16, device=device),
            torch.zeros(3, 2, dtype=torch.int64).to(device),
        )
        with pytest.raises(ValueError, match="needs use_fp8 and round_scale"):
            buffer.low_latency_dispatch(x, ids, 8, 4, use_ue8m0=True)
        with pytest.raises(ValueError, match=r"dispatch_wait_recv_cost_stats needs.*enable_shrink=True"):
            buffer.low_latency_dispatch(x, ids, 8, 4, dispatch_wait_recv_cost_stats=torch.zeros(1))
        with pytest.raises(TypeError, match="use_nvfp4"):
            buffer.low_latency_dispatch(x, ids, 8, 4, use_nvfp4=True)  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="max_tokens_per_rank=3"):
            buffer.low_latency_dispatch(x, ids, 2, 4)
        received, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, 8, 4, use_fp8=False)
        with pytest.raises(ValueError, match=r"combine_wait_recv_cost_stats needs.*enable_shrink=True"):
            buffer.low_latency_combine(received, ids, torch.ones(3, 2, device=device), handle,
                combine_wait_recv_cost_stats=torch.zeros(1))  # fmt: skip
        with pytest.raises(moegen.errors.HandleError, match="itself"):
            buffer.low_latency_combine(received, ids, torch.ones(3, 2, device=device), tuple(handle))  # type: ignore[arg-type]
        buffer.destroy()

    world.run(work)


def test_shrink(device: str) -> None:
    """A rank is late and masked; then it is taken back; its stats say that it was waited for."""
    ranks, experts, hidden, late = 2, 4, 512, 1
    world = moegen.LocalWorld(ranks, device)

    def work(rank: RankWorld) -> None:
        buffer = deep_ep.Buffer(rank, low_latency_mode=True, enable_shrink=True)
        buffer.timeout = 0.4
        x = torch.full((2, hidden), rank.rank + 1.0, dtype=torch.bfloat16, device=rank.device)
        ids = torch.tensor([[0, 3], [1, 2]], device=rank.device)
        weights = torch.tensor([[0.25, 0.5], [1.0, 2.0]], device=rank.device)
        waited = torch.zeros(2, ranks, dtype=torch.int64, device=rank.device)
        status = torch.zeros(ranks, dtype=torch.int32, device=rank.device)

        def pair() -> tuple[list[int], list[float], list[int]]:
            received, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, 8, experts, use_fp8=False,
                dispatch_wait_recv_cost_stats=waited[0])  # fmt: skip
            combined, _, _ = buffer.low_latency_combine(received, ids, weights, handle,  # type: ignore[arg-type]
                combine_wait_recv_cost_stats=waited[1])  # fmt: skip
            buffer.low_latency_query_mask_buffer(status)
            return count.tolist(), (combined[:, 0] / x[0, 0]).tolist(), status.tolist()

        together = [2, 2], [0.75, 3.0], [0, 0]
        assert pair() == together
        rank.barrier()
        if rank.rank == late:
            rank.barrier()
            pair()  # the call that it missed
        else:
            assert pair() == ([1, 1], [0.25, 1.0], [0, 1])
            assert 0.4 < int(waited[0, late]) / 1e9 < 20
            rank.barrier()
        rank.barrier()
        buffer.low_latency_clean_mask_buffer()
        assert pair() == together
        rank.barrier()
        buffer.destroy()

    world.run(work)


SMALL = Case(2, 16, 4, 512, FP8)


def settled(rank: RankWorld) -> None:
    """What torch does for one rank must not queue up behind another rank's kernel that waits."""
    if rank.device.type == "cuda":
        torch.cuda.current_stream(rank.device).synchronize()
    rank.barrier()


def test_numbers_of_tokens_share_objects(device: str) -> None:
    """Every call has results of exactly its own number's shape; a larger number at least doubles the room."""

    def work(rank: RankWorld) -> None:
        buffer = deep_ep.Buffer(rank)
        x, ids, weights = (part.to(rank.device) for part in inputs(replace(SMALL, max_tokens=7), rank.rank))
        round_trip_of_rank(buffer, rank, replace(SMALL, max_tokens=20), "plain")
        settled(rank)
        (tokens, _), _, early, _, _ = buffer.low_latency_dispatch(x, ids, 7, SMALL.experts)
        for number, mode in ((1, "hook"), (16, "plain"), (20, "hook"), (21, "plain"), (33, "hook"), (7, "plain")):
            round_trip_of_rank(buffer, rank, replace(SMALL, max_tokens=number), mode)
        y = torch.zeros(tokens.shape, dtype=torch.bfloat16, device=rank.device)
        settled(rank)
        assert not buffer.low_latency_combine(y, ids, weights, early)[0].any()  # type: ignore[arg-type]
        (sizes,) = buffer._layers._made.values()
        assert [whole.problem.max_tokens for whole in sizes._wholes] == [20, 40]
        old = early.owner
        rank.barrier()
        buffer.destroy()
        assert old.destroyed
        with pytest.raises(moegen.errors.DestroyedError):
            old.dispatch(x, ids)

    moegen.LocalWorld(2, device).run(work)


def test_few_numbers_of_tokens_are_kept(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fewer_tokens, "MOST_KEPT", 2)

    def work(rank: RankWorld) -> None:
        buffer = deep_ep.Buffer(rank)
        x = torch.ones(1, 512, dtype=torch.bfloat16, device=rank.device)
        ids = torch.zeros(1, 2, dtype=torch.int64, device=rank.device)
        for number in (8, 1, 2, 3, 4, 1, 8):
            tokens, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, number, 4, use_fp8=False)
            assert isinstance(tokens, torch.Tensor) and tokens.shape == (4, number, 512)
            assert tokens[0, 0].tolist() == [1.0] * 512 and handle[2] == number
        (sizes,) = buffer._layers._made.values()
        assert len(sizes._wholes) == 1 and len(sizes._by_tokens) == 2
        for wrong in (0, -3, 2.5, "2", 1 << 30):
            with pytest.raises(moegen.errors.InputError, match="num_max_dispatch_tokens_per_rank"):
                buffer.low_latency_dispatch(x, ids, wrong, 4, use_fp8=False)  # type: ignore[arg-type]
        buffer.destroy()

    moegen.LocalWorld(1, device).run(work)


def test_numbers_of_tokens_where_ranks_may_be_missing(device: str) -> None:
    case = Case(2, 4, 2, 512, BF16)

    def work(rank: RankWorld) -> None:
        buffer = deep_ep.Buffer(rank, enable_shrink=True)
        for number in (20, 8, 20, 3):
            round_trip_of_rank(buffer, rank, replace(case, max_tokens=number), "plain")
        status = torch.zeros(2, dtype=torch.int32, device=rank.device)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 0]
        rank.barrier()
        buffer.destroy()

    moegen.LocalWorld(2, device).run(work)


def test_more_tokens_than_another_ranks_number_are_reported(device: str) -> None:
    def work(rank: RankWorld) -> None:
        buffer = deep_ep.Buffer(rank)
        round_trip_of_rank(buffer, rank, SMALL, "plain")
        x = torch.ones(6 if rank.rank == 0 else 2, SMALL.hidden, dtype=torch.bfloat16, device=rank.device)
        ids = torch.arange(4, dtype=torch.int64, device=rank.device).mul(4).repeat(len(x), 1)
        settled(rank)
        _, count, handle, _, _ = buffer.low_latency_dispatch(x, ids, (8, 4)[rank.rank], SMALL.experts)
        rank.barrier()
        layer = handle.owner
        if rank.rank == 0:
            layer.synchronize()
            assert int(count.sum()) == 16
        else:
            with pytest.raises(moegen.errors.WorldError, match="what rank 0 has sent belongs to another call"):
                layer.synchronize()
        rank.barrier()
        buffer.destroy()

    moegen.LocalWorld(2, device).run(work)


def test_zero_copy_needs_its_buffer(device: str) -> None:
    def work(rank: RankWorld) -> None:
        buffer = deep_ep.Buffer(rank)
        x, ids, weights = (part.to(rank.device) for part in inputs(SMALL, rank.rank))
        arguments = (x, ids, MAX_TOKENS, SMALL.experts)
        settled(rank)
        handles = [buffer.low_latency_dispatch(*arguments)[2] for _ in range(2)]
        with torch.inference_mode():  # may be written in any mode
            given = [buffer.get_next_low_latency_combine_buffer(handle) for handle in handles]
        assert given[0].data_ptr() != given[1].data_ptr()
        assert buffer.get_next_low_latency_combine_buffer(handles[0]) is given[0]
        for value, handle in zip((1.0, 2.0), handles, strict=True):
            buffer.get_next_low_latency_combine_buffer(handle).fill_(value)
        for value, handle in zip((1.0, 2.0), handles, strict=True):
            settled(rank)
            combined, _, _ = buffer.low_latency_combine(given[0], ids, weights, handle, zero_copy=True)
            want = value * (weights * (ids >= 0)).sum(dim=1, keepdim=True).expand_as(x)
            torch.testing.assert_close(combined.float(), want, rtol=2**-6, atol=2**-6)
        settled(rank)
        for handle in (handles[0], buffer.low_latency_dispatch(*arguments)[2]):
            with pytest.raises(moegen.errors.InputError, match=r"get_next_low_latency_combine_buffer\(handle\)"):
                buffer.low_latency_combine(given[0], ids, weights, handle, zero_copy=True)
        rank.barrier()
        buffer.destroy()

    moegen.LocalWorld(2, device).run(work)


def dropped_selections(ids: torch.Tensor, weights: torch.Tensor, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first selection of every other token becomes -1, and its weight is no number; ids and weights for combine."""
    if how != "in place":
        ids = ids.clone()
    ids[::2, 0] = -1
    weights = weights.clone()
    weights[::2, 0] = torch.nan
    return ids, weights


DROPS = ("another tensor", "in place", "inference")


def test_selections_dropped_after_dispatch_are_left_out(device: str) -> None:
    def work(rank: RankWorld) -> None:
        buffer = deep_ep.Buffer(rank)
        for how in DROPS:
            with torch.inference_mode(how == "inference"):
                x, ids, weights = (part.to(rank.device) for part in inputs(SMALL, rank.rank))
                kept = (weights * (ids >= 0)).sum(dim=1, keepdim=True)
                settled(rank)
                received, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, MAX_TOKENS, SMALL.experts)
                y = torch.ones(received[0].shape, dtype=torch.bfloat16, device=rank.device)
                settled(rank)
                whole, _, _ = buffer.low_latency_combine(y, ids, weights, handle)
                now, safe = dropped_selections(ids, weights, "in place" if how == "inference" else how)
                settled(rank)
                combined, _, _ = buffer.low_latency_combine(y, now, safe, handle)
                left = torch.where(now >= 0, safe, 0.0).sum(dim=1, keepdim=True)
                assert rank.rank == 1 or (kept - left).max() > 0.1
                for sums, want in ((whole, kept), (combined, left)):
                    torch.testing.assert_close(sums.float(), want.expand_as(x), rtol=2**-6, atol=2**-6)
            rank.barrier()
        buffer.destroy()

    moegen.LocalWorld(2, device).run(work)
