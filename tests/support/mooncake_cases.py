# SPDX-License-Identifier: Apache-2.0
"""`moegen.compat.mooncake.Buffer` called as its users call Mooncake EP, against the oracle of DeepEP's calls."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import moegen
from moegen import errors
from moegen.compat import mooncake
from moegen.runtime.worlds import RankWorld
from support.deep_ep_cases import (
    BF16,
    DROPS,
    FP8,
    MODES,
    SMALL,
    Case,
    check_dispatch,
    dropped_selections,
    inputs,
    settle,
    settled,
)

CASES = (Case(1, 8, 2, 512, FP8), Case(2, 16, 8, 2880, BF16), Case(2, 16, 4, 512, FP8), Case(4, 8, 5, 2048, FP8))
NO_DEADLINE = -1


def buffer_of(world: RankWorld, case: Case) -> mooncake.Buffer:
    size = mooncake.Buffer.get_ep_buffer_size_hint(case.max_tokens, case.hidden, case.ranks, case.experts)
    return mooncake.Buffer(world, size)


def round_trip_of_rank(world: RankWorld, case: Case, mode: str, *, zero_copy: bool) -> None:
    buffer = buffer_of(world, case)
    calls_of_rank(buffer, world, case, mode, zero_copy=zero_copy)
    buffer.destroy()


def calls_of_rank(buffer: mooncake.Buffer, world: RankWorld, case: Case, mode: str, *, zero_copy: bool) -> None:
    x, ids, weights = (part.to(world.device) for part in inputs(case, world.rank))
    active_ranks = torch.ones(case.ranks, dtype=torch.int32, device=world.device)
    asked = {"async_finish": mode == "async", "return_recv_hook": mode == "hook"}
    world.barrier()  # what torch does for the inputs must not queue up behind a kernel that waits
    received, count, handle, event, hook = buffer.dispatch(
        x, ids, active_ranks, case.max_tokens, case.experts, 60_000_000, use_fp8=case.options["use_fp8"], **asked
    )
    settle_all(event, hook, mode)
    layer = handle.owner
    layer.synchronize()
    world.barrier()
    y = check_dispatch(case, world.rank, received, count, handle).bfloat16()
    if zero_copy:
        buffer.get_next_combine_buffer(handle).copy_(y)
        y.fill_(torch.nan)  # and is not read
    out = torch.empty_like(x) if zero_copy else None
    layer.synchronize()
    world.barrier()
    combined, event, hook = buffer.combine(
        y, ids, weights, active_ranks, NO_DEADLINE, handle, zero_copy=zero_copy, out=out, **asked
    )
    settle_all(event, hook, mode)
    layer.synchronize()
    assert combined is out or not zero_copy
    kept = (weights * (ids >= 0)).sum(dim=1, keepdim=True)
    want = x.float() * kept
    slack = 2**-3 if case.options["use_fp8"] else 2**-6
    assert ((combined.float() - want).abs() <= slack * want.abs() + 0.05 * kept).all()
    assert active_ranks.tolist() == [1] * case.ranks
    world.barrier()


def settle_all(event: Any, hook: Any, mode: str) -> None:
    """The event may always be waited for."""
    settle(event, hook, mode)
    if mode == "plain":
        event.current_stream_wait()


@pytest.mark.parametrize("zero_copy", [False, True], ids=["any", "zero_copy"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trip(device: str, case: Case, zero_copy: bool) -> None:
    moegen.LocalWorld(case.ranks, device).run(partial(round_trip_of_rank, case=case, mode="plain", zero_copy=zero_copy))


@pytest.mark.parametrize("mode", MODES[1:])
def test_modes(device: str, mode: str) -> None:
    ranks = 1 if device == "cuda" and mode == "async" else 2  # virtual ranks have one hardware queue each
    case = Case(ranks, 16, 4, 512, FP8)
    moegen.LocalWorld(ranks, device).run(partial(round_trip_of_rank, case=case, mode=mode, zero_copy=False))


@pytest.mark.parametrize("same", [True, False], ids=["same", "another"])
@pytest.mark.parametrize("mode", ["plain", "hook"])
def test_a_missing_rank_is_left_out_and_taken_back(device: str, mode: str, same: bool) -> None:
    """The last rank makes no calls in one round. Its 0 comes into the tensor that the calls were given, whether it is
    that of the calls before or `another`.
    """
    ranks, hidden = 3, 512
    late = ranks - 1

    def work(world: RankWorld) -> None:
        buffer = mooncake.Buffer(world)
        x = torch.full((1, hidden), world.rank + 1.0, dtype=torch.bfloat16, device=world.device)
        ids = torch.arange(ranks, device=world.device)[None]  # one expert each
        weights = torch.tensor([[1.0, 2.0, 4.0]], device=world.device)
        first = torch.ones(ranks, dtype=torch.int32, device=world.device)

        def pair(active_ranks: torch.Tensor, timeout_us: int) -> tuple[int, float, list[int]]:
            received, count, handle, event, hook = buffer.dispatch(
                x, ids, active_ranks, 4, ranks, timeout_us, use_fp8=False, return_recv_hook=mode == "hook"
            )
            settle_all(event, hook, mode)
            combined, event, hook = buffer.combine(
                received, ids, weights, active_ranks, timeout_us, handle, return_recv_hook=mode == "hook"
            )
            settle_all(event, hook, mode)
            return int(count), float(combined[0, 0] / x[0, 0]), active_ranks.tolist()

        assert pair(first, 60_000_000) == (ranks, 7.0, [1, 1, 1])
        world.barrier()
        if world.rank != late:
            assert pair(first if same else torch.ones_like(first), 400_000) == (ranks - 1, 3.0, [1, 1, 0])
        world.barrier()
        buffer.update_ep_member()
        assert pair(first.fill_(1), 60_000_000) == (ranks, 7.0, [1, 1, 1])
        world.barrier()
        buffer.destroy()

    moegen.LocalWorld(ranks, device).run(work)


def test_bad_calls(device: str) -> None:
    def work(world: RankWorld) -> None:
        buffer = mooncake.Buffer(world)
        x = torch.zeros(3, 512, dtype=torch.bfloat16, device=device)
        ids = torch.zeros(3, 2, dtype=torch.int64, device=device)
        healthy = torch.ones(1, dtype=torch.int32, device=device)
        for wrong, said in (
            (torch.ones(3, dtype=torch.int32, device=device), r"torch.int32 \[3\]"),  # one per token
            (torch.ones(1, device=device), r"torch.float32 \[1\]"),
            ([1], r"\[1\]"),
        ):
            with pytest.raises(errors.InputError, match=rf"active_ranks is a contiguous torch.int32 \[1\].*got {said}"):
                buffer.dispatch(x, ids, wrong, 8, 4, NO_DEADLINE)  # type: ignore[arg-type]
        with pytest.raises(errors.InputError, match="timeout_us is microseconds, or -1"):
            buffer.dispatch(x, ids, healthy, 8, 4, 0)
        with pytest.raises(errors.InputError, match="exclude each other"):
            buffer.dispatch(x, ids, healthy, 8, 4, 1000, async_finish=True, return_recv_hook=True)
        with pytest.raises(errors.CapacityError, match="max_tokens_per_rank=3"):
            buffer.dispatch(x, ids, healthy, 2, 4, NO_DEADLINE)
        received, _, handle, _, _ = buffer.dispatch(x, ids, healthy, 8, 4, NO_DEADLINE, use_fp8=False)
        weights = torch.ones(3, 2, device=device)
        with pytest.raises(errors.HandleError, match="itself"):
            buffer.combine(received, ids, weights, healthy, NO_DEADLINE, tuple(handle))  # type: ignore[arg-type]
        with pytest.raises(errors.InputError, match="must have the shape of the dispatch's topk_idx"):
            buffer.combine(received, ids, weights[:2], healthy, NO_DEADLINE, handle)  # type: ignore[arg-type]
        buffer.update_ep_member()
        with pytest.raises(errors.DestroyedError):
            buffer.combine(received, ids, weights, healthy, NO_DEADLINE, handle)  # type: ignore[arg-type]
        buffer.destroy()

    moegen.LocalWorld(1, device).run(work)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mooncakes_switch_takes_alltoall(device: str, case: Case, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_EP_USE_TORCH_ALLTOALL", "on")
    used = []

    def work(world: RankWorld) -> None:
        exchange = type(world).all_to_all

        def counted(*arguments: Any) -> None:
            used.append(world.rank)
            exchange(world, *arguments)

        world.all_to_all = counted  # type: ignore[method-assign]
        try:
            round_trip_of_rank(world, case, mode, zero_copy=False)
        finally:
            del world.all_to_all

    moegen.LocalWorld(case.ranks, device).run(work)
    assert set(used) == set(range(case.ranks))


@pytest.mark.parametrize("alltoall", [False, True], ids=["ipc", "alltoall"])
def test_numbers_of_tokens_share_objects(device: str, alltoall: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_EP_USE_TORCH_ALLTOALL", "on" if alltoall else "off")

    def work(world: RankWorld) -> None:
        buffer = buffer_of(world, SMALL)
        for number, mode in ((20, "plain"), (7, "plain"), (1, "hook"), (21, "plain"), (7, "hook")):
            calls_of_rank(buffer, world, replace(SMALL, max_tokens=number), mode, zero_copy=number == 7)
        (sizes,) = buffer._layers._made.values()
        assert [whole.problem.max_tokens for whole in sizes._wholes] == [20, 40]
        world.barrier()
        buffer.destroy()

    moegen.LocalWorld(2, device).run(work)


def test_what_combine_reads(device: str) -> None:
    """Selections that became -1 are left out; with zero_copy the handle's buffer is read."""

    def work(world: RankWorld) -> None:
        buffer = buffer_of(world, SMALL)
        active = torch.ones(2, dtype=torch.int32, device=world.device)
        for how in DROPS[:2]:
            x, ids, weights = (part.to(world.device) for part in inputs(SMALL, world.rank))
            settled(world)
            received, _, handle, _, _ = buffer.dispatch(x, ids, active, SMALL.max_tokens, SMALL.experts, NO_DEADLINE)
            y = torch.ones(received[0].shape, dtype=torch.bfloat16, device=world.device)
            with pytest.raises(errors.InputError, match=r"get_next_combine_buffer\(handle\)"):
                buffer.combine(y, ids, weights, active, NO_DEADLINE, handle, zero_copy=True)
            now, safe = dropped_selections(ids, weights, how)
            settled(world)
            combined, _, _ = buffer.combine(y, now, safe, active, NO_DEADLINE, handle)
            want = torch.where(now >= 0, safe, 0.0).sum(dim=1, keepdim=True).expand_as(x)
            torch.testing.assert_close(combined.float(), want, rtol=2**-6, atol=2**-6)
            world.barrier()
        buffer.destroy()

    moegen.LocalWorld(2, device).run(work)
