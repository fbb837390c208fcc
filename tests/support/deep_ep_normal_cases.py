# SPDX-License-Identifier: Apache-2.0
"""DeepEP's normal mode called as frameworks call it, against an oracle of its own, on every device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import moegen
from moegen import errors, reference
from moegen.compat import deep_ep
from moegen.runtime.worlds import RankWorld

NUM_SMS = 4
CHANNELS = NUM_SMS // 2


@pytest.fixture(autouse=True)
def few_blocks() -> Iterator[None]:
    """On a CPU every block is a thread."""
    before = deep_ep.Buffer.num_sms
    deep_ep.Buffer.set_num_sms(NUM_SMS)
    yield
    deep_ep.Buffer.set_num_sms(before)


@dataclass(frozen=True)
class Case:
    """Shapes of one layer; `kind`: of the tokens, "bf16", "fp8" (float32 scales) or "ue8m0" (packed ones)."""

    ranks: int
    experts: int
    topk: int
    hidden: int
    kind: str = "bf16"

    def __str__(self) -> str:
        return f"r{self.ranks}-e{self.experts}-k{self.topk}-h{self.hidden}-{self.kind}"

    @property
    def share(self) -> int:
        return self.experts // self.ranks


FOUR = Case(4, 8, 4, 512)
"""As many selections as ranks, so that a dispatch without topk_idx has the same kernels."""
CASES = (Case(1, 4, 2, 256), Case(2, 8, 4, 512), Case(3, 9, 3, 512), FOUR)


def tokens_of(rank: int, turn: int = 0) -> int:
    return 0 if (rank + turn) % 5 == 1 else (7 * rank + 11 + 23 * turn) % 61


def inputs(case: Case, rank: int, turn: int = 0) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Every rank can make every other's: tokens (or with scales), ids (some -1), weights."""
    generator = torch.Generator().manual_seed(1000 * turn + 100 * case.hidden + rank)
    tokens = tokens_of(rank, turn)
    x: Any = torch.randn(tokens, case.hidden, generator=generator).bfloat16()
    if case.kind == "fp8":
        x = reference.quantise(x, "fp8")
    elif case.kind == "ue8m0":
        x = reference.quantise(x, "fp8_ue8m0")
    ids = torch.rand(tokens, case.experts, generator=generator).topk(case.topk, dim=1).indices
    ids[torch.rand(ids.shape, generator=generator) < 0.15] = -1
    return x, ids, torch.rand(ids.shape, generator=generator)


def on(device: torch.device, x: Any) -> Any:
    return tuple(part.to(device) for part in x) if isinstance(x, tuple) else x.to(device)


def plain(x: Any) -> torch.Tensor:
    """What stands for tokens in comparisons and sums: bfloat16, on the CPU."""
    return (x[0].cpu().bfloat16() if isinstance(x, tuple) else x).cpu()


def in_ranks(case: Case, ids: torch.Tensor) -> torch.Tensor:
    """[T, ranks] bool."""
    return torch.stack([((ids // case.share == rank) & (ids >= 0)).any(dim=1) for rank in range(case.ranks)], dim=1)


@dataclass
class Want:
    """What one rank is to get: rows as (source, token), and what they select there."""

    rows: list[tuple[int, int]]
    tokens: list[torch.Tensor]
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    counts: list[int]


def wanted(case: Case, rank: int, turn: int = 0) -> Want:
    everything = [inputs(case, source, turn) for source in range(case.ranks)]
    first = rank * case.share
    rows = [(s, int(t)) for s in range(case.ranks) for t in in_ranks(case, everything[s][1])[:, rank].nonzero()]
    parts = len(everything[0][0]) if isinstance(everything[0][0], tuple) else 1

    def part(source: int, number: int) -> torch.Tensor:
        return everything[source][0][number] if parts == 2 else everything[source][0]

    width = [part(0, number).shape[1] for number in range(parts)]
    tokens = [
        torch.stack([part(s, number)[t] for s, t in rows]) if rows else part(0, number).new_empty(0, width[number])
        for number in range(parts)
    ]
    ids = torch.stack([everything[s][1][t] for s, t in rows]) if rows else torch.empty(0, case.topk, dtype=torch.int64)
    weights = torch.stack([everything[s][2][t] for s, t in rows]) if rows else torch.empty(0, case.topk)
    here = (ids >= first) & (ids < first + case.share)
    counts = [int((ids == first + local).any(dim=1).sum()) for local in range(case.share)]
    return Want(rows, tokens, torch.where(here, ids - first, -1), weights * here, counts)


def same(got: Any, want: list[torch.Tensor]) -> bool:
    parts = got if isinstance(got, tuple) else (got,)
    return all(
        torch.equal(part.cpu().view(torch.uint8), to.contiguous().view(torch.uint8))
        for part, to in zip(parts, want, strict=True)
    )


def check_handle(case: Case, rank: int, handle: tuple[Any, ...], want: Want, turn: int = 0) -> None:
    """DeepEP's six tensors, counted one by one."""
    everything = [in_ranks(case, inputs(case, source, turn)[1]) for source in range(case.ranks)]
    mine = everything[rank]
    prefix, channels, received, src_idx, in_rank, head = handle
    assert len(handle) == 6 and isinstance(handle, tuple)
    for part in (prefix, channels, received, src_idx, head):
        assert part.dtype == torch.int32
    sent = torch.stack([part.sum(dim=0) for part in everything])
    assert torch.equal(prefix.cpu(), sent.cumsum(dim=0).int())
    assert torch.equal(in_rank.cpu(), mine)
    assert src_idx[: len(want.rows)].tolist() == [token for _, token in want.rows]

    def channel(source: int, token: int) -> int:
        return token // -(-len(everything[source]) // CHANNELS)

    assert channels.shape == received.shape == (case.ranks, CHANNELS)
    for other in range(case.ranks):
        for number in range(CHANNELS):
            upto = [t for t in range(len(mine)) if mine[t, other] and channel(rank, t) <= number]
            assert int(channels[other, number]) == len(upto)
            below = [t for s, t in want.rows if s == other and channel(other, t) < number]
            assert int(received[other, number]) == len(below)
        for token in range(len(mine)):
            earlier = [t for t in range(token) if mine[t, other] and channel(rank, t) == channel(rank, token)]
            assert int(head[token, other]) == (len(earlier) if mine[token, other] else -1)


class Rank:
    """One rank's buffer, and calls in step: torch's own work must not queue up behind a kernel that waits."""

    def __init__(self, world: RankWorld, case: Case, **options: Any) -> None:
        self.world, self.case = world, case
        self.buffer = deep_ep.Buffer(world, 1 << 20, 0, **options)

    def step(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.world.barrier()

    def dispatch(self, turn: int = 0, *, asynchronous: bool = False, **options: Any) -> tuple[Any, ...]:
        x, ids, weights = inputs(self.case, self.world.rank, turn)
        x, ids, weights = on(self.world.device, x), ids.to(self.world.device), weights.to(self.world.device)
        self.step()
        streams: dict[str, Any] = {}
        if asynchronous:
            streams = {"async_finish": True, "allocate_on_comm_stream": True}
        layout = self.buffer.get_dispatch_layout(
            ids, self.case.experts, previous_event=self.buffer.capture() if asynchronous else None, **streams
        )
        self.step()
        if asynchronous:
            streams["previous_event"] = layout[4]
        per_rank, per_node, per_expert, in_rank, _ = layout
        result = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            **{"topk_idx": ids, "topk_weights": weights} | options,
            **streams,
        )
        if asynchronous:
            result[5].current_stream_wait()
        self.step()
        return result

    def check_sums(self, combined: torch.Tensor, turn: int = 0, plus: torch.Tensor | None = None) -> None:
        x, ids, _ = inputs(self.case, self.world.rank, turn)
        want = plain(x).float() * in_ranks(self.case, ids).sum(dim=1, keepdim=True)
        want = want if plus is None else want + plus.float().cpu()
        assert ((combined.float().cpu() - want).abs() <= want.abs() / 64 + 0.01).all()


def run(case: Case, device: str, work: Any) -> None:
    moegen.LocalWorld(case.ranks, device).run(lambda world: work(Rank(world, case)))


def round_trip(rank: Rank, *, asynchronous: bool = False) -> None:
    """Fresh and cached dispatch, combine with and without weights and biases; capacity that has to grow."""
    case, me, device = rank.case, rank.world.rank, rank.world.device
    for turn in range(2):
        want = wanted(case, me, turn)
        x, ids, weights = inputs(case, me, turn)
        got, topk_idx, topk_weights, counts, handle, event = rank.dispatch(
            turn, asynchronous=asynchronous, expert_alignment=1 + 7 * turn
        )
        assert (event.event is not None) == asynchronous
        assert same(got, want.tokens)
        assert torch.equal(topk_idx.cpu(), want.topk_idx) and topk_idx.dtype == torch.int64
        assert torch.equal(topk_weights.cpu(), want.topk_weights)
        assert counts == ([-(-count // 8) * 8 for count in want.counts] if turn else want.counts)
        check_handle(case, me, handle, want, turn)
        y, bias = plain(got).to(device), plain(x).to(device)
        streams = {"async_finish": True} if asynchronous else {}
        for biases in (None, bias, (bias, bias)):
            rank.step()
            combined, sums, event = rank.buffer.combine(y, handle, topk_weights, bias=biases, **streams)
            if asynchronous:
                event.current_stream_wait()
            rank.step()
            plus = 0 if biases is None else 2 if isinstance(biases, tuple) else 1
            rank.check_sums(combined, turn, plus * bias)
            assert torch.equal(sums.cpu(), weights * (ids >= 0))
        given = on(device, x)
        rank.step()
        again, *nothing, event = rank.buffer.dispatch(given, handle=handle, **streams)
        if asynchronous:
            event.current_stream_wait()
        rank.step()
        assert nothing == [None] * 4
        assert same(again, want.tokens)
        rank.step()
        combined, sums, _ = rank.buffer.combine(y, handle)
        rank.step()
        assert sums is None
        rank.check_sums(combined, turn)
    rank.buffer.destroy()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trip(device: str, case: Case) -> None:
    run(case, device, round_trip)


@pytest.mark.parametrize("kind", ["fp8", "ue8m0"])
def test_fp8(device: str, kind: str) -> None:
    run(Case(2, 8, 4, 512, kind), device, round_trip)


def test_own_stream(device: str) -> None:
    case = CASES[0] if device == "cuda" else CASES[1]  # virtual ranks have one hardware queue each
    run(case, device, lambda rank: round_trip(rank, asynchronous=True))


def test_strided_scales_and_other_tokens_by_a_handle(device: str) -> None:
    """Scales in columns, as GEMMs take them; then bfloat16 rows, and shorter ones, by the handle of FP8 rows."""
    case = Case(2, 8, 4, 512, "fp8")

    def work(rank: Rank) -> None:
        me, device = rank.world.rank, rank.world.device
        want = wanted(case, me)
        (tokens, scales), ids, weights = inputs(case, me)
        by_column = scales.t().contiguous().t().to(device)
        layout = rank.buffer.get_dispatch_layout(ids.to(device), case.experts)
        rank.step()
        got, _, _, _, handle, _ = rank.buffer.dispatch(
            (tokens.to(device), by_column), None, layout[0], layout[1], layout[3], layout[2], ids.to(device),
            weights.to(device),
        )  # fmt: skip
        rank.step()
        assert got[1].is_contiguous() and same(got, want.tokens)
        for hidden in (512, 256):
            x = torch.randn(len(tokens), hidden).bfloat16().to(device)
            rank.step()
            rows, *_ = rank.buffer.dispatch(x, handle=handle)
            rank.step()
            combined, _, _ = rank.buffer.combine(rows, handle)
            rank.step()
            sums = x.float() * in_ranks(case, ids).sum(dim=1, keepdim=True).to(device)
            assert ((combined.float() - sums).abs() <= sums.abs() / 64).all()
        rank.buffer.destroy()

    run(case, device, work)


def test_without_topk(device: str) -> None:
    """Only the layout's tensors: rows, sums and the list of counts are the same."""

    def work(rank: Rank) -> None:
        want = wanted(FOUR, rank.world.rank)
        got, topk_idx, topk_weights, counts, handle, _ = rank.dispatch(topk_idx=None, topk_weights=None)
        assert topk_idx is None and topk_weights is None
        assert same(got, want.tokens)
        assert counts == want.counts
        check_handle(FOUR, rank.world.rank, handle, want)
        combined, _, _ = rank.buffer.combine(got, handle)
        rank.step()
        rank.check_sums(combined)
        rank.buffer.destroy()

    run(FOUR, device, work)


def test_worst_tokens(device: str) -> None:
    """Nothing waits for the host; rows beyond those that came select nothing; too many of them are an error."""

    def work(rank: Rank) -> None:
        me = rank.world.rank
        want = wanted(FOUR, me)
        rows = len(want.rows)
        got, topk_idx, topk_weights, counts, handle, _ = rank.dispatch(num_worst_tokens=200)
        assert got.shape == (200, FOUR.hidden) and counts == []
        assert same(got[:rows], want.tokens)
        assert torch.equal(topk_idx[:rows].cpu(), want.topk_idx) and (topk_idx[rows:] == -1).all()
        assert torch.equal(topk_weights[:rows].cpu(), want.topk_weights)
        check_handle(FOUR, me, handle, want)
        assert (handle[3][rows:] == -1).all()
        rank.step()
        combined, _, _ = rank.buffer.combine(got, handle, topk_weights)
        rank.step()
        rank.check_sums(combined)
        again, *_ = rank.buffer.dispatch(inputs(FOUR, me)[0].to(rank.world.device), handle=handle)
        rank.step()
        assert same(again[:rows], want.tokens)
        rank.buffer.destroy()

    run(FOUR, device, work)


def test_capacity(device: str) -> None:
    """It grows where ranks wait for the host; where they do not, an error names the attribute, which makes room."""
    case = CASES[1]

    def work(rank: Rank) -> None:
        rank.dispatch()
        many = 200 if rank.world.rank == 1 else 3
        x = torch.randn(many, case.hidden).bfloat16().to(rank.world.device)
        ids = torch.zeros(many, case.topk, dtype=torch.int64, device=rank.world.device)
        weights = torch.ones(many, case.topk, device=rank.world.device)
        layout = rank.buffer.get_dispatch_layout(ids, case.experts)
        given = (layout[0], layout[1], layout[3], layout[2], ids, weights)
        if rank.world.rank == 1:
            with pytest.raises(errors.CapacityError, match=r"200 tokens.*room for 128.*max_tokens_per_rank.*200"):
                rank.buffer.dispatch(x, None, *given, num_worst_tokens=400)
        rank.step()
        got, *_ = rank.buffer.dispatch(x, None, *given)
        rank.step()
        assert len(got) == (203 if rank.world.rank == 0 else 0)
        rank.buffer.max_tokens_per_rank = 300
        got, *_ = rank.buffer.dispatch(x, None, *given, num_worst_tokens=400)
        rank.step()
        (rows,) = rank.buffer._row_layers.values()
        assert [layer.problem.max_tokens for layer in rows._all] == [128, 256, 512]
        rank.buffer.destroy()

    run(case, device, work)


def test_bad_calls(device: str) -> None:
    case = CASES[0]

    def work(rank: Rank) -> None:
        buffer, device = rank.buffer, rank.world.device
        x, ids, weights = (part.to(device) for part in inputs(case, 0))
        per_rank, _, per_expert, in_rank, event = buffer.get_dispatch_layout(ids, case.experts)
        assert event.event is None
        layout = {
            "num_tokens_per_rank": per_rank,
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
        }
        got, _, topk_weights, _, handle, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **layout)
        routing = {"topk_idx": ids, "topk_weights": weights}
        bad: list[tuple[dict[str, Any], str]] = [
            ({}, "get_dispatch_layout"),
            ({"handle": handle, **routing}, "the handle has its routing"),
            ({**layout, "topk_idx": ids}, "given together"),
            ({**layout, "num_worst_tokens": 64}, "needs topk_idx"),
            ({**layout, **routing, "async_finish": True, "allocate_on_comm_stream": True}, "previous_event"),
            ({**layout, **routing, "is_token_in_rank": in_rank[:1]}, "is_token_in_rank"),
            ({**layout, **routing, "topk_idx": ids.float()}, "topk_idx"),
            ({"handle": tuple(handle)}, "itself"),
        ]
        for options, says in bad:
            with pytest.raises(errors.InputError, match=says):
                buffer.dispatch(x, **options)
        with pytest.raises(errors.InputError, match="the handle is of 11 tokens; got 10"):
            buffer.dispatch(x[:-1], handle=handle)
        with pytest.raises(errors.InputError, match="y is"):
            buffer.combine(got[:-1], handle)
        with pytest.raises(errors.HandleError, match="itself"):
            buffer.combine(got, tuple(handle))
        with pytest.raises(errors.InputError, match="at most 2"):
            buffer.combine(got, handle, bias=(x, x, x))
        for name in ("internode_dispatch", "internode_combine"):
            with pytest.raises(NotImplementedError, match=name):
                getattr(buffer, name)(x, handle)
        with pytest.raises(TypeError, match="pickled"):
            handle.__reduce__()
        assert handle == handle and handle[-1] is handle[5] and len(handle[1:3]) == 2
        assert topk_weights is not None
        buffer.destroy()

    run(case, device, work)


def test_blocks_follow_set_num_sms(device: str) -> None:
    def work(rank: Rank) -> None:
        rank.dispatch()
        deep_ep.Buffer.set_num_sms(2)
        *_, handle, _ = rank.dispatch()
        assert handle[1].shape == (1, 1)
        *_, handle, _ = rank.dispatch(config=deep_ep.Config(num_sms=6))
        assert handle[1].shape == (1, 3)
        (rows,) = rank.buffer._row_layers.values()
        assert {sms for _, sms in rows._all[0]._ops._bound} == {None, NUM_SMS, 2, 6}
        rank.buffer.destroy()

    run(CASES[0], device, work)
