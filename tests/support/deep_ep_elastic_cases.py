# SPDX-License-Identifier: Apache-2.0
"""DeepEP V2's `ElasticBuffer` called as frameworks call it, against the oracle of the normal mode, on every device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moegen
from moegen import errors
from moegen.compat import deep_ep
from moegen.runtime.worlds import RankWorld
from support.deep_ep_normal_cases import Case, in_ranks, inputs, on, plain, same, wanted

MAX_TOKENS = 64
TWO = Case(2, 8, 4, 512)
CASES = (Case(1, 4, 2, 256), TWO, Case(3, 9, 3, 512), Case(4, 8, 4, 512))


class Rank:
    """One rank's buffer, its inputs, and calls in step: torch's work must not queue up behind a kernel that waits."""

    def __init__(self, world: RankWorld, case: Case, **options: Any) -> None:
        self.world, self.case = world, case
        self.buffer = deep_ep.ElasticBuffer(world, num_max_tokens_per_rank=MAX_TOKENS, hidden=case.hidden, **options)
        x, ids, weights = inputs(case, world.rank)
        self.x, self.ids, self.weights = on(world.device, x), ids.to(world.device), weights.to(world.device)
        self.want = wanted(case, world.rank)

    def step(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.world.barrier()

    def dispatch(self, **options: Any) -> tuple[Any, ...]:
        self.step()
        given = {"topk_idx": self.ids, "topk_weights": self.weights, "num_experts": self.case.experts} | options
        result = self.buffer.dispatch(self.x, **given)
        if options.get("async_with_compute_stream"):
            result[4].current_stream_wait()
        self.step()
        return result

    def combine(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.step()
        combined, weights, event = self.buffer.combine(*arguments, **options)
        if options.get("async_with_compute_stream"):
            event.current_stream_wait()
        self.step()
        return combined, weights

    def check_sums(self, combined: torch.Tensor, expand: bool, plus: int = 0) -> None:
        """Of rows that came back as they were."""
        ids = self.ids.cpu()
        visits = (ids >= 0) if expand else in_ranks(self.case, ids)
        want = plain(self.x).float() * (visits.sum(dim=1, keepdim=True) + plus)
        assert ((combined.float().cpu() - want).abs() <= want.abs() / 64 + 0.01).all()

    def expanded(self, alignment: int) -> tuple[torch.Tensor, list[int], int]:
        """For each row that came and each k the expanded row or -1; the experts' first rows; the rows in all."""
        starts, at = [], 0
        for count in self.want.counts:
            starts.append(at)
            at += -(-count // alignment) * alignment
        slots = torch.full_like(self.want.topk_idx, -1)
        for local, start in enumerate(starts):
            selects = self.want.topk_idx == local
            slots[selects] = torch.arange(start, start + int(selects.sum()))
        return slots, starts, at


def run(case: Case, device: str, work: Any, **options: Any) -> None:
    moegen.LocalWorld(case.ranks, device).run(lambda world: work(Rank(world, case, **options)))


def check_handle(rank: Rank, handle: deep_ep.EPHandle, expand: bool, sync: bool, alignment: int) -> None:
    case, want, me = rank.case, rank.want, rank.world.rank
    rows = len(want.rows)
    assert (handle.do_expand, handle.num_experts, handle.expert_alignment) == (expand, case.experts, alignment)
    assert handle.num_max_tokens_per_rank == MAX_TOKENS and handle.num_sms > 0
    assert torch.equal(handle.topk_idx, rank.ids)
    aligned = [-(-count // alignment) * alignment for count in want.counts]
    assert handle.num_recv_tokens_per_expert_list == (aligned if sync else [])
    assert handle.num_recv_tokens == (rows if sync else case.ranks * MAX_TOKENS)
    ends = [sum(source <= rank_ for source, _ in want.rows) for rank_ in range(case.ranks)]
    assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == ends
    assert handle.num_unaligned_recv_tokens_per_expert.tolist() == want.counts
    slots, starts, _ = rank.expanded(alignment)
    sums = [start + count for start, count in zip(starts, want.counts, strict=True)]
    if not expand:
        sums = [sum(aligned[: local + 1]) for local in range(case.share)]
    assert handle.psum_num_recv_tokens_per_expert.tolist() == sums
    metadata = handle.recv_src_metadata.cpu()
    assert metadata.shape == (handle.num_recv_tokens, case.topk + 2) and metadata.dtype == torch.int32
    assert metadata[:rows, 0].tolist() == [source * MAX_TOKENS + token for source, token in want.rows]
    first_k = [int((of >= 0).nonzero()[0]) for of in want.topk_idx]
    assert metadata[:rows, 1].tolist() == [s * case.topk + k for (s, _), k in zip(want.rows, first_k, strict=True)]
    assert torch.equal(metadata[:rows, 2:].long(), slots if expand else torch.full_like(slots, -1))
    assert (metadata[rows:] == -1).all()
    goes = in_ranks(case, rank.ids.cpu())
    for token, ids in enumerate(rank.ids.tolist()):
        seen: set[int] = set()
        for k, expert in enumerate(ids):
            to = expert // case.share
            fresh = expert >= 0 and to not in seen
            assert int(handle.dst_buffer_slot_idx[token, k]) == (int(goes[:token, to].sum()) if fresh else -1)
            seen.add(to)
    assert me == rank.buffer.rank_idx


def check_rows(rank: Rank, got: Any, topk_idx: Any, weights: torch.Tensor, expand: bool, alignment: int) -> None:
    want, rows = rank.want, len(rank.want.rows)
    parts = got if isinstance(got, tuple) else (got,)
    if not expand:
        assert same(tuple(part[:rows] for part in parts), want.tokens)
        assert torch.equal(topk_idx[:rows].cpu(), want.topk_idx) and (topk_idx[rows:] == -1).all()
        assert torch.equal(weights[:rows].cpu(), want.topk_weights)
        return
    assert topk_idx is None
    slots, _, _ = rank.expanded(alignment)
    rows_of, selections = (slots >= 0).nonzero(as_tuple=True)
    placed = slots[rows_of, selections].to(parts[0].device)
    assert same(tuple(part[placed].contiguous() for part in parts), [part[rows_of] for part in want.tokens])
    assert torch.equal(weights[placed].cpu(), want.topk_weights[rows_of, selections])


def round_trip(rank: Rank, expand: bool, sync: bool, alignment: int = 1, asynchronous: bool = False) -> None:
    streams: dict[str, Any] = {"async_with_compute_stream": asynchronous}
    if asynchronous:
        streams |= {"previous_event": rank.buffer.capture(), "allocate_on_comm_stream": True}
    stats = torch.full((rank.case.share,), 3, dtype=torch.int32, device=rank.world.device)
    got, topk_idx, weights, handle, event = rank.dispatch(
        do_expand=expand,
        do_cpu_sync=sync,
        expert_alignment=alignment,
        cumulative_local_expert_recv_stats=stats,
        do_zero_padding=expand,
        **streams,
    )
    assert (event.event is not None) == asynchronous
    _, _, rows = rank.expanded(alignment)
    if sync:
        assert len(plain(got)) == handle.num_expanded_tokens == (rows if expand else len(rank.want.rows))
    elif not expand:
        assert len(got) == rank.case.ranks * MAX_TOKENS
    assert stats.tolist() == [3 + count for count in rank.want.counts]
    check_rows(rank, got, topk_idx, weights, expand, alignment)
    check_handle(rank, handle, expand, sync, alignment)
    if expand:
        slots, _, _ = rank.expanded(alignment)
        empty = torch.ones(len(got), dtype=torch.bool)
        empty[slots[slots >= 0]] = False
        assert not got.cpu()[empty].any() and not weights.cpu()[empty].any()
    y, bias = plain(got).to(rank.world.device), plain(rank.x).to(rank.world.device)
    for biases, plus in ((None, 0), (bias, 1), ((bias, bias), 2)):
        combined, sums = rank.combine(y, handle, weights, biases, **streams)
        rank.check_sums(combined, expand, plus)
        assert torch.equal(sums.cpu(), (rank.weights * (rank.ids >= 0)).cpu())
    combined, sums = rank.combine(y, handle)
    assert sums is None
    rank.check_sums(combined, expand)
    for again_weights in (None, rank.weights):
        again, again_idx, back, same_handle, _ = rank.dispatch(
            topk_idx=None, topk_weights=again_weights, num_experts=None, handle=handle
        )
        assert same_handle is handle and (back is None) == (again_weights is None)
        check_rows(rank, again, again_idx, weights if back is None else back, expand, alignment)
    rank.buffer.destroy()


@pytest.mark.parametrize("expand", [False, True], ids=["token", "expand"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trip(device: str, case: Case, expand: bool) -> None:
    run(case, device, lambda rank: round_trip(rank, expand, sync=True))


@pytest.mark.parametrize("expand", [False, True], ids=["token", "expand"])
def test_without_the_host(device: str, expand: bool) -> None:
    run(TWO, device, lambda rank: round_trip(rank, expand, sync=False, alignment=8))


@pytest.mark.parametrize("sync", [False, True], ids=["capacity", "exact"])
def test_own_stream(device: str, sync: bool) -> None:
    case = CASES[0] if device == "cuda" else TWO  # virtual ranks have one hardware queue each
    run(case, device, lambda rank: round_trip(rank, expand=True, sync=sync, alignment=4, asynchronous=True))


def test_scales_by_column(device: str) -> None:
    case = Case(2, 8, 4, 512, "fp8")

    def work(rank: Rank) -> None:
        for sync in (True, False):
            got, topk_idx, weights, handle, _ = rank.dispatch(
                do_expand=True, do_cpu_sync=sync, expert_alignment=3, use_tma_aligned_col_major_sf=True
            )
            check_rows(rank, got, topk_idx, weights, True, 3)
            rows = len(got[0])
            assert got[1].stride() == (1, -(-rows // 4) * 4)
            combined, _ = rank.combine(got[0].bfloat16(), handle)
            rank.check_sums(combined, True)
        got, _, weights, handle, _ = rank.dispatch(topk_weights=None)
        assert weights is None and got[1].is_contiguous()
        rank.buffer.destroy()

    run(case, device, work)


def test_bad_calls(device: str) -> None:
    def work(rank: Rank) -> None:
        _, _, _, handle, _ = rank.dispatch()
        bad: list[tuple[dict[str, Any], str]] = [
            ({"topk_idx": None}, "topk_idx and num_experts"),
            ({"num_experts": None}, "topk_idx and num_experts"),
            ({"num_max_tokens_per_rank": 2}, "num_max_tokens_per_rank, now 2"),
            ({"previous_event": rank.buffer.capture()}, "allocate_on_comm_stream"),
            ({"handle": handle}, "takes no topk_idx"),
            ({"handle": handle, "topk_idx": None, "topk_weights": None, "do_cpu_sync": True}, "do_cpu_sync"),
            ({"handle": handle, "topk_idx": None, "expert_alignment": 2}, "expert_alignment=1; got 2"),
            ({"handle": handle, "topk_idx": None, "do_expand": True}, "without do_expand"),
            ({"handle": (1, 2), "topk_idx": None}, "EPHandle"),
        ]
        for options, says in bad:
            with pytest.raises(errors.InputError, match=says):
                rank.dispatch(**options)
        with pytest.raises(errors.HandleError, match="EPHandle"):
            rank.buffer.combine(rank.x, None)  # type: ignore[arg-type]
        rank.buffer.barrier()
        rank.buffer.destroy()

    run(CASES[0], device, work)
