# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's one-sided calls against an oracle of their own, on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import moegen
from moegen import reference
from moegen.compat import flashinfer
from moegen.compat.flashinfer import MnnvlConfig, MoeAlltoAll
from moegen.runtime.worlds import RankWorld

MAX_TOKENS = 24
INVALID = -7
IDS = 2
"""The payload that holds expert ids."""


@dataclass(frozen=True)
class Case:
    ranks: int
    experts: int
    topk: int
    hidden: int = 256

    def __str__(self) -> str:
        return f"r{self.ranks}-e{self.experts}-k{self.topk}-h{self.hidden}"

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.hidden + 5 + 8 * self.topk + 1

    def local(self, rank: int) -> range:
        return reference.expert_ranges(self.experts, self.ranks)[rank]


CASES = (Case(1, 4, 2), Case(2, 8, 4), Case(3, 10, 3, 72), Case(4, 8, 8), Case(8, 20, 6))
TWO = Case(2, 8, 3)


@dataclass
class Given:
    """One rank's tokens: ids, and payloads of mixed widths with the ids among them."""

    ids: torch.Tensor
    payloads: list[torch.Tensor]


def tokens_of(rank: int, turn: int) -> int:
    """Turn 2: nobody has any."""
    return 0 if turn == 2 or (rank + turn) % 4 == 1 else (7 * rank + 5 + 11 * turn) % (MAX_TOKENS - 3)


def slots_of(case: Case, turn: int) -> int:
    return max(1, *(tokens_of(rank, turn) for rank in range(case.ranks))) + turn % 2


def given(case: Case, rank: int, turn: int = 0, device: Any = "cpu") -> Given:
    """Every rank can make every other's; some ids are -1."""
    generator = torch.Generator().manual_seed(1000 * turn + 10 * case.hidden + rank)
    tokens = tokens_of(rank, turn)
    ids = torch.rand(tokens, case.experts, generator=generator).topk(case.topk, dim=1).indices.int()
    ids[torch.rand(ids.shape, generator=generator) < 0.15] = -1
    payloads = [
        torch.randn(tokens, case.hidden, generator=generator).bfloat16(),
        torch.randint(0, 256, (tokens, 5), generator=generator).to(torch.uint8),
        ids,
        torch.rand(tokens, case.topk, generator=generator),
        torch.rand(tokens, 1, generator=generator) < 0.5,
    ]
    return Given(ids.to(device), [payload.to(device) for payload in payloads])


def comes(case: Case, ids: torch.Tensor, rank: int) -> torch.Tensor:
    """Which tokens select an expert of this rank."""
    experts = case.local(rank)
    return ((ids >= experts.start) & (ids < experts.stop)).any(dim=1)


def experts_of(case: Case, rank: int, received: list[torch.Tensor]) -> torch.Tensor:
    """The sum over this rank's experts of weight * (a number of the expert) * token, rounded: a row of combine."""
    x, _, ids, weights, _ = received
    experts = case.local(rank)
    here = (ids >= experts.start) & (ids < experts.stop)
    # In float64, whose sum is the same in whatever order a device's torch adds.
    factors = torch.where(here, weights.double() * (1 + ids) / case.experts, 0.0).sum(dim=-1, keepdim=True)
    return (x.float() * factors.float()).to(x.dtype)


def sums(case: Case, rank: int, turn: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What combine is to give, to the bit: rows added in fp32 in the order of the ranks, and rounded once."""
    mine = given(case, rank, turn)
    total = torch.zeros(len(mine.ids), case.hidden)
    for holder in range(case.ranks):
        row = experts_of(case, holder, mine.payloads)
        total = torch.where(comes(case, mine.ids, holder)[:, None], total + row.float(), total)
    return total.to(dtype)


def check_received(case: Case, rank: int, turn: int, received: list[torch.Tensor], *, sanitized: bool) -> None:
    slots = slots_of(case, turn)
    for source in range(case.ranks):
        sent = given(case, source, turn)
        rows = comes(case, sent.ids, rank)
        for index, (got, want) in enumerate(zip(received, sent.payloads, strict=True)):
            assert got.shape == (case.ranks, slots, want.shape[1]) and got.dtype == want.dtype
            assert torch.equal(got[source, : int(rows.sum())].cpu(), want[rows])
            if sanitized and index == IDS:
                assert (got[source, int(rows.sum()) :] == INVALID).all()


class Rank:
    """One rank's object, and calls in step: torch's work must not queue up behind a kernel that waits."""

    def __init__(self, world: RankWorld, case: Case, **options: Any) -> None:
        self.world, self.case = world, case
        size = flashinfer.moe_a2a_get_workspace_size_per_rank(
            case.ranks, MAX_TOKENS, case.bytes_per_token, 2 * case.hidden, options.get("eplb_stats_num_experts", 0)
        )
        sizes = {"workspace_size_per_rank": size} | options
        config = MnnvlConfig(comm_backend=world)
        self.a2a = MoeAlltoAll(mapping(world), MAX_TOKENS, case.topk, case.experts, mnnvl_config=config, **sizes)

    def step(self) -> None:
        in_step(self.world)

    def dispatch(self, turn: int = 0, **options: Any) -> list[torch.Tensor]:
        mine = given(self.case, self.world.rank, turn, self.world.device)
        self.step()
        received = self.a2a.dispatch(mine.ids, mine.payloads, slots_of(self.case, turn), **options)
        self.step()
        return received

    def combine(self, payload: torch.Tensor, turn: int = 0, **options: Any) -> torch.Tensor:
        self.step()
        combined = self.a2a.combine(payload, slots_of(self.case, turn), **options)
        self.step()
        return combined

    def experts(self, received: list[torch.Tensor]) -> torch.Tensor:
        return experts_of(self.case, self.world.rank, received)


def in_step(world: RankWorld) -> None:
    if world.device.type == "cuda":
        torch.cuda.current_stream().synchronize()
    world.barrier()


def mapping(world: RankWorld) -> flashinfer.Mapping:
    return flashinfer.Mapping(world.size, world.rank, tp_size=world.size, moe_ep_size=world.size)


def run(case: Case, device: str, work: Callable[[Rank], None], **options: Any) -> None:
    def rank(world: RankWorld) -> None:
        made = Rank(world, case, **options)
        work(made)
        made.step()
        made.a2a.destroy()

    moegen.LocalWorld(case.ranks, device).run(rank)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    left = list(MoeAlltoAll._WORKSPACE_CACHE)
    MoeAlltoAll._WORKSPACE_CACHE.clear()
    assert left == []


@pytest.mark.parametrize("in_workspace", [False, True], ids=["staged", "in-workspace"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_round_trips(case: Case, in_workspace: bool, device: str) -> None:
    """Five times, with other tokens, other slots and other guesses of what the next payloads are."""

    def work(rank: Rank) -> None:
        for turn in range(5):
            options = {"invalid_token_expert_id": INVALID, "expert_id_payload_index": IDS} if turn % 2 == 0 else {}
            received = rank.dispatch(turn, **options)
            check_received(case, rank.world.rank, turn, received, sanitized=bool(options))
            y = rank.experts(received)
            if in_workspace:
                room = rank.a2a.get_combine_payload_tensor_in_workspace(y.shape[1], case.hidden, torch.bfloat16)
                y = room.copy_(y)
            combined = rank.combine(y, turn, payload_in_workspace=in_workspace)
            assert torch.equal(combined.cpu(), sums(case, rank.world.rank, turn))

    run(case, device, work)


def test_results_in_other_dtypes(device: str) -> None:
    def work(rank: Rank) -> None:
        me = rank.world.rank
        for dtype in (torch.float32, torch.float16):
            combined = rank.combine(rank.experts(rank.dispatch()), output_dtype=dtype)
            assert torch.equal(combined.cpu(), sums(TWO, me, 0, dtype))
        y = rank.experts(rank.dispatch())
        out = torch.empty_like(combined, dtype=torch.bfloat16)
        assert rank.combine(y, output=out) is out
        assert torch.equal(out.cpu(), sums(TWO, me, 0))

    run(TWO, device, work)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_rows_in_other_dtypes(dtype: torch.dtype, device: str) -> None:
    """FP32 rows are longer than what the first guess was."""
    size = flashinfer.moe_a2a_get_workspace_size_per_rank(2, MAX_TOKENS, TWO.bytes_per_token, 4 * TWO.hidden)

    def work(rank: Rank) -> None:
        me = rank.world.rank
        mine = given(TWO, me)
        want = torch.zeros(len(mine.ids), TWO.hidden)
        for holder in range(2):
            row = experts_of(TWO, holder, [mine.payloads[0].to(dtype), *mine.payloads[1:]]).float()
            want = torch.where(comes(TWO, mine.ids, holder)[:, None], want + row, want)
        for _ in range(2):
            received = rank.dispatch()
            y = experts_of(TWO, me, [received[0].to(dtype), *received[1:]])
            assert torch.equal(rank.combine(y).cpu(), want.to(dtype))

    run(TWO, device, work, workspace_size_per_rank=size, hidden_size=TWO.hidden)


@pytest.mark.parametrize("most", [MAX_TOKENS, 100], ids=["few", "many"])
def test_rows_of_two_lengths_take_turns(most: int, device: str) -> None:
    """Each has an object of its own; the next dispatch goes by the one that combined last."""
    size = flashinfer.moe_a2a_get_workspace_size_per_rank(3, most, 2 * 64 + 8, 2 * 128)

    def work(world: RankWorld) -> None:
        a2a = MoeAlltoAll(mapping(world), most, 2, 6, size, mnnvl_config=world)
        for turn, hidden in enumerate((128, 64, 64, 128, 64, 128, 128)):
            x = torch.arange(10 + turn, device=world.device)[:, None].expand(-1, 64) + world.rank + turn
            ids = torch.stack([torch.arange(len(x)) % 6, (torch.arange(len(x)) + turn) % 6], dim=1).int()
            in_step(world)
            (received,) = a2a.dispatch(ids.to(world.device), [x.bfloat16()], 20)
            in_step(world)
            combined = a2a.combine(received.repeat(1, 1, hidden // 64), 20)
            visits = torch.stack([(ids // 2 == holder).any(dim=1) for holder in range(3)]).sum(dim=0)
            assert torch.equal(combined.cpu(), (x.cpu() * visits[:, None]).bfloat16().repeat(1, hidden // 64))
        assert len(a2a._behind.layers.all()) == 2
        in_step(world)
        a2a.destroy()

    moegen.LocalWorld(3, device).run(work)


def test_low_precision(device: str) -> None:
    def work(rank: Rank) -> None:
        me = rank.world.rank
        mine = given(TWO, me)
        want = torch.zeros(len(mine.ids), TWO.hidden)
        for holder in range(2):
            row = experts_of(TWO, holder, mine.payloads).to(torch.float8_e4m3fn).float()
            want = torch.where(comes(TWO, mine.ids, holder)[:, None], want + row, want)
        combined = rank.combine(rank.experts(rank.dispatch()), use_low_precision=True)
        assert combined.dtype == torch.bfloat16
        assert torch.equal(combined.cpu(), want.bfloat16())
        narrow = rank.experts(rank.dispatch()).to(torch.float8_e4m3fn)
        assert torch.equal(rank.combine(narrow).cpu(), want.bfloat16())

    run(TWO, device, work)


def test_statistics_are_gathered(device: str) -> None:
    def work(rank: Rank) -> None:
        assert rank.a2a.eplb_gathered_stats is None
        mine = torch.arange(6, dtype=torch.int32, device=rank.world.device) + 10 * rank.world.rank
        received = rank.dispatch(eplb_local_stats=mine)
        gathered = rank.a2a.eplb_gathered_stats
        assert gathered is not None
        assert gathered.tolist() == [[10 * source + i for i in range(6)] for source in range(3)]
        rank.combine(rank.experts(received))
        assert rank.a2a.eplb_gathered_stats is None

    run(Case(3, 6, 2), device, work, eplb_stats_num_experts=6)


def test_masked_ranks_are_left_out(device: str) -> None:
    """Rank 1 makes no calls; the others neither send to it nor wait for it."""
    case = Case(3, 9, 3)

    def work(rank: Rank) -> None:
        me = rank.world.rank
        rank.combine(rank.experts(rank.dispatch()))  # makes the object
        mine = given(case, me, 0, rank.world.device)
        rank.step()
        if me != 1:
            mask = flashinfer.moe_a2a_active_rank_mask([0, 2], 3)
            slots = slots_of(case, 0)
            received = rank.a2a.dispatch(mine.ids, mine.payloads, slots, active_rank_mask=mask)
            for source in (0, 2):
                sent = given(case, source)
                rows = comes(case, sent.ids, me)
                assert torch.equal(received[0][source, : int(rows.sum())].cpu(), sent.payloads[0][rows])
            combined = rank.a2a.combine(rank.experts(received), slots, active_rank_mask=mask)
            want = torch.zeros(len(mine.ids), case.hidden)
            for holder in (0, 2):
                row = experts_of(case, holder, given(case, me).payloads).float()
                want = torch.where(comes(case, mine.ids.cpu(), holder)[:, None], want + row, want)
            assert torch.equal(combined.cpu(), want.bfloat16())

    run(case, device, work, enable_rank_mask=True)


def test_tables_for_those_who_look(device: str) -> None:
    case = Case(3, 10, 4)
    index = MoeAlltoAll._METAINFO_INDEX

    def work(rank: Rank) -> None:
        me, a2a = rank.world.rank, rank.a2a
        mine = given(case, me)
        rank.dispatch()

        def read(name: str, *shape: int) -> torch.Tensor:
            at = int(a2a.metainfo[index[f"{name}_OFFSET_INDEX"]])
            length = 4 * torch.Size(shape).numel()
            return a2a.workspace[me, at : at + length].view(torch.int32).view(shape).cpu()

        goes = torch.stack([comes(case, mine.ids, holder) for holder in range(3)], dim=1)
        assert torch.equal(read("SEND_COUNTERS", 3), goes.sum(dim=0).int())
        received = [int(comes(case, given(case, source).ids, me).sum()) for source in range(3)]
        assert read("RECV_COUNTERS", 3).tolist() == received
        targets, slots = read("TOPK_TARGET_RANKS", len(mine.ids), 4), read("TOPK_SEND_INDICES", len(mine.ids), 4)
        for token, ids in enumerate(mine.ids.tolist()):
            seen: set[int] = set()
            for k, expert in enumerate(ids):
                to = next((holder for holder in range(3) if expert in case.local(holder)), -1)
                fresh = to >= 0 and to not in seen
                assert int(targets[token, k]) == (to if fresh else -1)
                assert int(slots[token, k]) == (int(goes[:token, to].sum()) if fresh else -1)
                seen.add(to)

    run(case, device, work)
