# SPDX-License-Identifier: Apache-2.0
"""MSCCL++ EP's low-latency calls, with results into tensors of the caller and without; its intranode calls."""

from __future__ import annotations

import gc

import pytest
import torch
from support import deep_ep_normal_cases as normal
from support.deep_ep_cases import BF16, DROPS, FP8, MAX_TOKENS, Case, check_dispatch, dropped_selections, inputs

import moegen
from moegen import errors
from moegen.compat import mscclpp
from moegen.runtime.worlds import RankWorld


def outputs(case: Case, fp8: bool) -> dict[str, torch.Tensor]:
    local, rows = case.experts // case.ranks, case.ranks * MAX_TOKENS
    tokens = torch.empty(local, rows, case.hidden, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16)
    made = {
        "out_packed_recv_x": tokens,
        "out_packed_recv_src_info": torch.empty(local, rows, dtype=torch.int32),
        "out_packed_recv_layout_range": torch.empty(local, case.ranks, dtype=torch.int64),
        "out_packed_recv_count": torch.empty(local, dtype=torch.int32),
    }
    if fp8:
        made["out_packed_recv_x_scales"] = torch.empty(local, case.hidden // 128, rows).transpose(1, 2)
    return made


@pytest.mark.parametrize("given", [False, True], ids=["allocated", "given"])
@pytest.mark.parametrize("case", [Case(2, 8, 4, 512, BF16), Case(4, 16, 8, 2048, FP8)], ids=str)
@pytest.mark.parametrize("hook", [False, True], ids=["plain", "hook"])
def test_round_trip(case: Case, given: bool, hook: bool) -> None:
    fp8 = case.options["use_fp8"]

    def work(rank: RankWorld) -> None:
        buffer = mscclpp.Buffer(rank, num_rdma_bytes=1 << 20, low_latency_mode=True)
        x, ids, weights = inputs(case, rank.rank)
        mine = outputs(case, fp8) if given else {}
        tokens, scales, count, src_info, ranges, event, receive = buffer.low_latency_dispatch(
            x, ids, MAX_TOKENS, case.experts, fp8, False, hook, **mine
        )
        assert event is None
        if receive is not None:
            receive()
        if given:
            assert tokens is mine["out_packed_recv_x"]
            assert count is mine["out_packed_recv_count"]
            assert ranges is mine["out_packed_recv_layout_range"]
        handle = (src_info, ranges, MAX_TOKENS, case.hidden, case.experts)
        y = check_dispatch(case, rank.rank, (tokens, scales) if fp8 else tokens, count, handle).bfloat16()
        combined, _, receive = buffer.low_latency_combine(
            y, ids, weights, src_info, ranges, MAX_TOKENS, case.experts, False, False, hook
        )
        if receive is not None:
            receive()
        want = x.float() * (weights * (ids >= 0)).sum(dim=1, keepdim=True)
        assert ((combined.float() - want).abs() <= 2**-3 * want.abs() + 0.3).all()
        with pytest.raises(errors.HandleError, match="not a copy"):
            buffer.low_latency_combine(
                y, ids, weights, src_info, ranges.clone(), MAX_TOKENS, case.experts, False, False, False
            )
        rank.barrier()
        buffer.destroy()

    moegen.LocalWorld(case.ranks).run(work)


def test_what_combine_reads() -> None:
    """Selections that became -1 are left out; there is no memory that zero_copy would read."""
    case = Case(2, 8, 4, 512, BF16)

    def work(rank: RankWorld) -> None:
        buffer = mscclpp.Buffer(rank, num_rdma_bytes=1 << 20, low_latency_mode=True)
        for how in DROPS[:2]:
            x, ids, weights = inputs(case, rank.rank)
            for number in (MAX_TOKENS, 20):  # the second is served by the object of the first
                tokens, _, _, src_info, ranges, _, _ = buffer.low_latency_dispatch(
                    x, ids, number, case.experts, False, False, False
                )
                assert tokens.shape == (4, 2 * number, 512) and src_info.shape == (4, 2 * number)
            rest = (src_info, ranges, 20, case.experts)
            now, safe = dropped_selections(ids, weights, how)
            with pytest.raises(NotImplementedError, match="zero_copy=True"):
                buffer.low_latency_combine(tokens, now, safe, *rest, True, False, False)
            y = torch.ones_like(tokens)
            combined, _, _ = buffer.low_latency_combine(y, now, safe, *rest, False, False, False)
            want = torch.where(now >= 0, safe, 0.0).sum(dim=1, keepdim=True).expand_as(x)
            torch.testing.assert_close(combined.float(), want, rtol=2**-6, atol=2**-6)
            rank.barrier()
        buffer.destroy()

    moegen.LocalWorld(2).run(work)


def test_outputs_that_do_not_fit() -> None:
    case = Case(1, 4, 2, 512, FP8)

    def work(rank: RankWorld) -> None:
        buffer = mscclpp.Buffer(rank)
        x, ids, _ = inputs(case, 0)
        for name, wrong, says in (
            ("out_packed_recv_count", torch.empty(5, dtype=torch.int32), r"counts is \[4\]"),
            ("out_packed_recv_x", torch.empty(4, MAX_TOKENS, 512, dtype=torch.bfloat16), "float8_e4m3fn"),
            ("out_packed_recv_x_scales", torch.empty(4, MAX_TOKENS, 4), "side by side"),
            ("out_packed_recv_src_info", torch.empty(4, 3, dtype=torch.int32), r"row_tokens is \[4, 40\]"),
        ):
            with pytest.raises(errors.InputError, match=says):
                buffer.low_latency_dispatch(x, ids, MAX_TOKENS, 4, True, False, False, **{name: wrong})
        buffer.destroy()

    moegen.LocalWorld(1).run(work)


def test_what_nobody_holds_is_not_kept() -> None:
    def work(rank: RankWorld) -> None:
        buffer = mscclpp.Buffer(rank)
        x, ids, _ = inputs(Case(1, 4, 2, 512, BF16), 0)
        for _ in range(5):
            buffer.low_latency_dispatch(x, ids, MAX_TOKENS, 4, False, False, False)
            gc.collect()
        assert len(buffer._dispatched) <= 2
        buffer.destroy()

    moegen.LocalWorld(1).run(work)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["plain", "async"])
def test_intranode(kind: str, asynchronous: bool) -> None:
    """Fresh, cached and back, with the numbers of DeepEP's handle as single results."""
    case = normal.Case(2, 8, 4, 512, kind)
    config = mscclpp.Config(num_sms=normal.NUM_SMS)

    def work(world: RankWorld) -> None:
        buffer = mscclpp.Buffer(world, 1 << 20)
        streams = (None, asynchronous, False)
        x, ids, weights = normal.inputs(case, world.rank)
        tokens, scales = x if isinstance(x, tuple) else (x, None)
        want = normal.wanted(case, world.rank)
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, case.experts, *streams)
        rows, row_scales, topk_idx, topk_weights, counts, *numbers, event = buffer.intranode_dispatch(
            tokens, scales, ids, weights, per_rank, in_rank, per_expert, 0, None, None, 1, config, *streams
        )
        assert (event is not None) == asynchronous
        assert normal.same((rows, row_scales) if scales is not None else rows, want.tokens)
        assert torch.equal(topk_idx, want.topk_idx) and torch.equal(topk_weights, want.topk_weights)
        assert counts == want.counts
        prefix, channels, received, src_idx, head = numbers
        normal.check_handle(case, world.rank, (prefix, channels, received, src_idx, in_rank, head), want)
        again, again_scales, *nothing, cached_prefix, _, _, again_src, _, _ = buffer.intranode_dispatch(
            tokens, scales, None, None, None, in_rank, None, len(rows), prefix, channels, 1, config, *streams
        )
        assert nothing == [None, None, []] and cached_prefix is prefix
        assert normal.same((again, again_scales) if scales is not None else again, want.tokens)
        assert torch.equal(again_src, src_idx)
        back = (src_idx, prefix, received, head, config, *streams)
        combined, sums, _ = buffer.intranode_combine(rows.bfloat16(), topk_weights, *back)
        assert torch.equal(sums, weights * (ids >= 0))
        expected = normal.plain(x).float() * normal.in_ranks(case, ids).sum(dim=1, keepdim=True)
        assert ((combined.float() - expected).abs() <= expected.abs() / 64).all()
        with pytest.raises(errors.HandleError, match="not a copy"):
            buffer.intranode_combine(rows.bfloat16(), None, src_idx, prefix.clone(), received, head, config, *streams)
        with pytest.raises(NotImplementedError, match="internode_dispatch"):
            buffer.internode_dispatch()
        with pytest.raises(NotImplementedError, match="internode_combine"):
            buffer.internode_combine()
        world.barrier()
        buffer.destroy()

    moegen.LocalWorld(case.ranks).run(work)


def test_intranode_routings_that_nobody_holds_are_not_kept() -> None:
    case = normal.CASES[0]

    def work(world: RankWorld) -> None:
        buffer = mscclpp.Buffer(world)
        x, ids, weights = normal.inputs(case, 0)
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, case.experts, None, False, False)
        for _ in range(5):
            buffer.intranode_dispatch(
                x, None, ids, weights, per_rank, in_rank, per_expert, 0, None, None, 1, mscclpp.Config(4), None, False,
                False,
            )  # fmt: skip
            gc.collect()
        assert len(buffer._routings) <= 2
        buffer.destroy()

    moegen.LocalWorld(1).run(work)
