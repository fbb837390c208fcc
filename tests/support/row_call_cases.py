# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput`: layout counts, calls on its own stream, capacity that ranks find too small together; any device."""

from __future__ import annotations

import pytest
import torch

import moegen
from moegen import errors
from moegen.runtime.worlds import RankWorld

RANKS, EXPERTS, TOPK, HIDDEN, MAX_TOKENS = 3, 8, 3, 128, 64


def routed(rank: int, tokens: int = 21) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens + 10 * rank, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(len(x), EXPERTS, generator=generator).topk(TOPK).indices
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    return x, ids, torch.rand(ids.shape, generator=generator)


def make(
    rank: RankWorld, layout: str = "token", mode: str = "exact", max_tokens: int = MAX_TOKENS
) -> moegen.HighThroughput:
    return moegen.HighThroughput(
        rank,
        num_experts=EXPERTS,
        num_topk=TOPK,
        hidden=HIDDEN,
        max_tokens_per_rank=max_tokens,
        layout=layout,
        mode=mode,
    )


def in_ranks(ids: torch.Tensor, owner: moegen.HighThroughput) -> torch.Tensor:
    """[T, ranks] bool, by comparing ids with every rank's experts."""
    shares = [owner.problem.local_experts(rank) for rank in range(owner.num_ranks)]
    return torch.stack([((ids >= of.start) & (ids < of.stop)).any(dim=1) for of in shares], dim=1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_layout(device: str, dtype: torch.dtype) -> None:
    def work(rank: RankWorld) -> None:
        with make(rank) as ht:
            for tokens in (0, 1, 700):  # more than the capacity: nothing is sent
                _, ids, _ = routed(0, tokens)
                got = ht.layout(ids.to(ht.device, dtype))
                ht.synchronize()
                want = in_ranks(ids, ht)
                assert torch.equal(got.token_in_rank.cpu(), want)
                assert got.tokens_per_rank.tolist() == want.sum(dim=0).tolist()
                assert got.tokens_per_expert.tolist() == [int((ids == e).any(dim=1).sum()) for e in range(EXPERTS)]
                assert got.tokens_per_rank.dtype == got.tokens_per_expert.dtype == torch.int32
            rank.barrier()

    moegen.LocalWorld(RANKS, device).run(work)


def test_layout_meets_an_id_that_names_no_expert(device: str) -> None:
    def work(rank: RankWorld) -> None:
        with make(rank) as ht:
            ids = torch.tensor([[0, 1, 2], [EXPERTS, 0, -1]], device=device)
            kind = errors.InputError if device == "cpu" else errors.InvalidRoutingError

            def counted() -> None:
                ht.layout(ids)
                ht.synchronize()

            with pytest.raises(kind, match="no selection"):
                counted()
            raw = ht._ops.layout(ids)  # as a kernel meets it
            with pytest.raises(errors.InvalidRoutingError, match=r"ht_layout_r1.*token 1 "):
                ht.synchronize()
            assert raw.tokens_per_expert.tolist() == [2, 1, 1, *[0] * (EXPERTS - 3)]
            assert ht.layout(ids[:1]).tokens_per_rank.tolist() == [1, 0, 0][: ht.num_ranks]

    moegen.LocalWorld(1, device).run(work)


@pytest.mark.parametrize("layout", ["token", "packed"])
@pytest.mark.parametrize("mode", ["exact", "capacity"])
def test_own_stream(device: str, layout: str, mode: str) -> None:
    """Asynchronous calls behind each other by their events; weights come back; what each source has is known."""
    ranks = 1 if device == "cuda" else RANKS  # virtual ranks have one hardware queue each

    def work(rank: RankWorld) -> None:
        with make(rank, layout, mode) as ht:
            x, ids, weights = (part.to(ht.device) for part in routed(rank.rank))
            received, event = ht.dispatch(x, ids, weights, async_finish=True, num_sms=2, zero_unused=True)
            event.wait()
            (sums, back), event = ht.combine(
                received.tokens, received.handle, received.topk_weights, weighted=False, bias=x, previous_event=event,
                async_finish=True,
            )  # fmt: skip
            event.wait()
            ht.synchronize()
            visits = (in_ranks(ids.cpu(), ht) if layout == "token" else ids.cpu() >= 0).sum(dim=1, keepdim=True)
            want = x.float().cpu() * (visits + 1)
            assert ((sums.float().cpu() - want).abs() <= want.abs() / 64).all()
            assert torch.equal(back.cpu(), (weights * (ids >= 0)).cpu())
            everything = [routed(source)[1] for source in range(ranks)]
            told = [[len(of), *in_ranks(of, ht).sum(dim=0).tolist()] for of in everything]
            assert received.source_counts.tolist() == told
            again = ht.dispatch(x, handle=received.handle, previous_event=event)
            sums, _ = ht.combine(again.tokens, received.handle)
            ht.synchronize()
            if mode == "exact":
                assert torch.equal(again.tokens, received.tokens)
            rank.barrier()

    moegen.LocalWorld(ranks, device).run(work)


def test_one_rank_has_too_many_tokens(device: str) -> None:
    """In mode exact all ranks learn it, and how many; the objects go on."""

    def work(rank: RankWorld) -> None:
        with make(rank) as ht:
            x, ids, _ = (part.to(ht.device) for part in routed(rank.rank, 70 if rank.rank == 1 else 5))
            for _ in range(2):
                with pytest.raises(
                    errors.CapacityError, match=r"rank 1 has 80 tokens.*max_tokens_per_rank=80"
                ) as raised:
                    ht.dispatch(x, ids)
                assert raised.value.tokens_needed == 80
                received = ht.dispatch(x[:MAX_TOKENS], ids[:MAX_TOKENS])
                assert len(received.tokens) == sum(received.source_counts[:, 1 + rank.rank].tolist())
            rank.barrier()

    moegen.LocalWorld(2, device).run(work)


def test_options_of_a_call(device: str) -> None:
    def work(rank: RankWorld) -> None:
        with make(rank, "packed") as ht:
            x, ids, weights = (part.to(ht.device) for part in routed(0))
            for options, says in (
                ({"mode": "both"}, "capacity, exact"),
                ({"num_sms": 0}, "num_sms"),
                ({"timeout": 0.0}, "timeout"),
            ):
                with pytest.raises(errors.InputError, match=says):
                    ht.dispatch(x, ids, **options)  # type: ignore[call-overload]
            with pytest.raises(TypeError, match="no_such"):
                ht.dispatch(x, ids, no_such=1)  # type: ignore[call-overload]
            received = ht.dispatch(x, ids, weights, mode="capacity", zero_unused=True)
            assert received.host_counts is None
            used = int(received.counts.sum())
            assert not received.tokens[used:].any() and not received.topk_weights[used:].any()
            with pytest.raises(errors.InputError, match=r"topk_weights is \[192\]"):
                ht.combine(received.tokens, received.handle, weights)

    moegen.LocalWorld(1, device).run(work)


@pytest.mark.parametrize("layout", ["token", "packed"])
def test_warmup_runs_every_kernel(device: str, layout: str) -> None:
    def work(rank: RankWorld) -> None:
        with make(rank, layout) as ht:
            ht.warmup()
            x, ids, weights = (part.to(ht.device) for part in routed(rank.rank))
            received = ht.dispatch(x, ids, weights)
            assert sum(received.host_counts or []) == int(received.counts.sum())
            rank.barrier()

    moegen.LocalWorld(2, device).run(work)
