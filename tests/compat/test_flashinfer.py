# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's one-sided calls on this device; and what they refuse, and how objects share a workspace."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.flashinfer_cases import *  # noqa: F403
from support.flashinfer_cases import MAX_TOKENS, TWO, Case, Rank, given, mapping, run, slots_of, sums
from support.flashinfer_functional_cases import *  # noqa: F403

import moegen
from moegen.compat import flashinfer
from moegen.compat.flashinfer import CallError, Mapping, MnnvlConfig, MnnvlMemory, MoeAlltoAll
from moegen.compat.flashinfer import workspace as workspaces
from moegen.runtime.worlds import RankWorld

ALONE = Case(1, 4, 2)
SIZE = flashinfer.moe_a2a_get_workspace_size_per_rank(2, MAX_TOKENS, TWO.bytes_per_token, 2 * TWO.hidden)


def without_a_call(**options: Any) -> MoeAlltoAll:
    """Rank 1 of 2, none of whose calls gets as far as to wait for the other."""
    world = moegen.LocalWorld(2).ranks[1]
    arguments: dict[str, Any] = {"workspace_size_per_rank": SIZE, "mnnvl_config": MnnvlConfig(world)} | options
    return MoeAlltoAll(mapping(world), MAX_TOKENS, TWO.topk, TWO.experts, **arguments)


Changes = Callable[[dict[str, Any]], object]


def tokens(arguments: dict[str, Any], number: int) -> None:
    ids = torch.zeros(number, TWO.topk, dtype=torch.int32)
    arguments.update(token_selected_experts=ids, input_payloads=[torch.zeros(number, 8)])


DISPATCHES: dict[str, tuple[str, Changes]] = {
    "slots": ("exceeds max_num_tokens: 25 > 24", lambda a: a.update(runtime_max_tokens_per_rank=25)),
    "no slots": ("integer, 1 or more; got 0", lambda a: a.update(runtime_max_tokens_per_rank=0)),
    "tokens": ("has 4 tokens and runtime_max_tokens_per_rank=3", lambda a: tokens(a, 4)),
    "top_k": (r"is \[tokens, 3\]; got \[2, 2\]", lambda a: a.update(token_selected_experts=torch.zeros(2, 2).int())),
    "ids": ("is int32", lambda a: a.update(token_selected_experts=torch.zeros(2, 3))),
    "no payload": ("are 1..16 tensors; got 0", lambda a: a.update(input_payloads=[])),
    "payloads": ("are 1..16 tensors; got 17", lambda a: a.update(input_payloads=[torch.zeros(2, 1)] * 17)),
    "vector": (r"payload 0 is \[2, elements\].*v\[:, None\]", lambda a: a.update(input_payloads=[torch.zeros(2)])),
    "rows": (r"payload 1 is \[2, elements\].*got \[3, 1\]", lambda a: a["input_payloads"].append(torch.zeros(3, 1))),
    "room": ("for payloads of 65536 bytes per token", lambda a: a.update(input_payloads=[torch.zeros(2, 16384)])),
    "which ids": ("expert_id_payload_index required", lambda a: a.update(invalid_token_expert_id=-1)),
    "index": ("is 0..0", lambda a: a.update(invalid_token_expert_id=-1, expert_id_payload_index=1)),
    "dtype of ids": ("holds expert ids", lambda a: a.update(invalid_token_expert_id=-1, expert_id_payload_index=0)),
    "statistics": ("made with 0", lambda a: a.update(eplb_local_stats=torch.zeros(6).int())),
    "mask": (
        "requires enable_rank_mask=True",
        lambda a: a.update(active_rank_mask=flashinfer.moe_a2a_active_rank_mask([1], 2)),
    ),
}


@pytest.mark.parametrize(("says", "change"), DISPATCHES.values(), ids=DISPATCHES)
def test_dispatch_refuses_before_anything_is_made(says: str, change: Changes) -> None:
    a2a = without_a_call()
    arguments: dict[str, Any] = {"runtime_max_tokens_per_rank": 3}
    tokens(arguments, 2)
    change(arguments)
    with pytest.raises(CallError, match=says) as raised:
        a2a.dispatch(**arguments)
    assert isinstance(raised.value, (ValueError, RuntimeError, AssertionError))
    assert a2a._phase == "idle" and not a2a._behind.layers.all()
    a2a.destroy()


def test_masks_and_statistics_that_do_not_fit() -> None:
    a2a = without_a_call(enable_rank_mask=True, eplb_stats_num_experts=6, workspace_size_per_rank=2 * SIZE)
    arguments: dict[str, Any] = {"runtime_max_tokens_per_rank": 3}
    tokens(arguments, 2)
    for says, change in (
        ("leaves out rank 1", {"active_rank_mask": flashinfer.moe_a2a_active_rank_mask([0], 2)}),
        (r"is uint64 \[1\] on the CPU", {"active_rank_mask": torch.ones(1, dtype=torch.int64)}),
        (r"is int32 \[6\]; got torch.int32 \[5\]", {"eplb_local_stats": torch.zeros(5, dtype=torch.int32)}),
    ):
        with pytest.raises(CallError, match=says):
            a2a.dispatch(**arguments, **change)
    a2a.destroy()
    with pytest.raises(CallError, match=r"are 0..1; got 2"):
        flashinfer.moe_a2a_active_rank_mask([0, 2], 2)
    assert flashinfer.moe_a2a_active_rank_mask(torch.tensor([0, 63]), 64).tolist() == [2**63 + 1]


def test_one_call_after_the_other() -> None:
    def work(rank: Rank) -> None:
        a2a, slots = rank.a2a, slots_of(ALONE, 0)
        y = torch.zeros(1, slots, ALONE.hidden, dtype=torch.bfloat16)
        for call in (
            lambda: a2a.combine(y, slots),
            lambda: a2a.get_combine_payload_tensor_in_workspace(slots, ALONE.hidden, torch.bfloat16),
        ):
            with pytest.raises(RuntimeError, match="before successful dispatch"):
                call()
        received = rank.dispatch()
        with pytest.raises(AssertionError, match="called twice without combine"):
            rank.dispatch()
        with pytest.raises(ValueError, match=f"had runtime_max_tokens_per_rank={slots}; got {slots + 1}"):
            a2a.combine(y, slots + 1)
        with pytest.raises(ValueError, match="exceeds max_num_tokens"):
            a2a.combine(y, MAX_TOKENS + 1)
        rank.combine(rank.experts(received))
        with pytest.raises(RuntimeError, match="before successful dispatch"):
            a2a.combine(y, slots)
        a2a._reset_workspace()
        with pytest.raises(RuntimeError, match="was destroyed"):
            rank.dispatch()
        for call in (a2a.checkpoint_prepare, lambda: a2a.checkpoint_restore(None)):
            with pytest.raises(NotImplementedError, match="checkpoint_"):
                call()

    run(ALONE, "cpu", work)


def test_combine_refuses_and_may_then_be_called_rightly() -> None:
    def work(rank: Rank) -> None:
        slots = slots_of(ALONE, 0)
        y = rank.experts(rank.dispatch())
        mine = len(given(ALONE, 0).ids)
        wide = torch.empty(mine, 2 * ALONE.hidden, dtype=torch.bfloat16)
        for says, payload, options in (
            (rf"is \[1, {slots}, hidden\]", y[0], {}),
            ("torch.float8_e4m3fn; got torch.float64", y.double(), {}),
            ("output must be contiguous", y, {"output": wide[:, ::2]}),
            (rf"output is torch.bfloat16 \[{mine}, {ALONE.hidden}\]", y, {"output": wide}),
            ("output is torch.float16", y, {"output": wide[:, : ALONE.hidden].clone(), "output_dtype": torch.float16}),
            ("pointer mismatch: take the payload from", y, {"payload_in_workspace": True}),
        ):
            with pytest.raises(CallError, match=says):
                rank.a2a.combine(payload, slots, **options)
        for option in ({"output_dtype": torch.float8_e4m3fn}, {"output_scales": torch.zeros(8, dtype=torch.uint8)}):
            with pytest.raises(NotImplementedError, match=next(iter(option))):
                rank.a2a.combine(y, slots, **option)
        with pytest.raises(CallError, match="insufficient for the rows of combine"):
            rank.a2a.get_combine_payload_tensor_in_workspace(slots, 1 << 20, torch.bfloat16)
        assert torch.equal(rank.combine(y), sums(ALONE, 0, 0))

    run(ALONE, "cpu", work)


def test_constructor_refuses() -> None:
    world = moegen.LocalWorld(2).ranks[1]
    config = MnnvlConfig(comm_backend=world)
    of_three = Mapping(3, 1, tp_size=3, moe_ep_size=3)
    for says, change in (
        ("hidden_size must be provided", {}),
        ("backend is 'trtllm' or 'cake'", {"hidden_size": 64, "backend": "nccl"}),
        ("top_k is an integer", {"hidden_size": 64, "top_k": 0}),
        ("num_experts is an integer", {"hidden_size": 64, "num_experts": -1}),
        ("insufficient for its counters", {"workspace_size_per_rank": 100}),
        ("rank 1 of 3, and the communicator says rank 1 of 2", {"hidden_size": 64, "mapping": of_three}),
    ):
        arguments = {"mapping": mapping(world), "max_num_tokens": 8, "top_k": 2, "num_experts": 4} | change
        with pytest.raises(CallError, match=says):
            MoeAlltoAll(**arguments, mnnvl_config=config)  # type: ignore[arg-type]


def test_functional_calls_refuse() -> None:
    rows = torch.zeros(1, 1 << 16, dtype=torch.uint8)
    ids = torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(CallError, match="not initialized"):
        flashinfer.moe_a2a_dispatch(ids, [ids], rows, torch.zeros(10), 3, 0, 1, 2, 4)
    with pytest.raises(CallError, match=r"is uint8 \[2, bytes\]"):
        flashinfer.moe_a2a_initialize(rows, 0, 2, 8)
    with pytest.raises(CallError, match="rank 1 of 2, and the communicator says rank 0 of 1"):
        flashinfer.moe_a2a_initialize(rows.view(2, -1), 1, 2, 8)
    metainfo = flashinfer.moe_a2a_initialize(rows, 0, 1, 8)
    with pytest.raises(CallError, match="is for ep_size=1; got 2"):
        flashinfer.moe_a2a_dispatch(ids, [ids], rows, metainfo, 3, 0, 2, 2, 4)
    with pytest.raises(CallError, match="before successful dispatch"):
        flashinfer.moe_a2a_sanitize_expert_ids(ids[None], rows, metainfo, 0, -1)
    (received,), offset, _ = flashinfer.moe_a2a_dispatch(ids, [ids], rows, metainfo, 3, 0, 1, 2, 4)
    with pytest.raises(CallError, match=r"expert_ids is int32 \[1, 3, top_k\]"):
        flashinfer.moe_a2a_sanitize_expert_ids(received[0], rows, metainfo, 0, -1)
    y = torch.zeros(1, 3, 8, dtype=torch.bfloat16)
    for name, wrong in (("local_num_tokens", 2), ("runtime_max_tokens_per_rank", 4), ("top_k", 3)):
        said = {"local_num_tokens": 3, "runtime_max_tokens_per_rank": 3, "top_k": 2} | {name: wrong}
        with pytest.raises(CallError, match=f"{name} of its dispatch"):
            flashinfer.moe_a2a_combine(
                y, workspace=rows, metainfo=metainfo, ep_rank=0, ep_size=1, combine_payload_offset=offset, **said
            )
    for start, end in ((0, (1 << 16) + 1), (1 << 16, (1 << 16) + 16), (-16, 0)):
        with pytest.raises(CallError, match="belong to a single rank"):
            flashinfer.moe_a2a_wrap_payload_tensor_in_workspace(rows, [1], start, end, torch.int32)
    assert flashinfer.moe_a2a_wrap_payload_tensor_in_workspace(rows[0], [2, 4], 16, 80, torch.int32).shape == (2, 4, 2)


def test_layers_share_a_workspace() -> None:
    """Of one routing they share all; calls of one may come between those of another."""

    def work(rank: Rank) -> None:
        world, case = rank.world, rank.case
        same, other = (
            MoeAlltoAll(mapping(world), MAX_TOKENS, topk, case.experts, SIZE, mnnvl_config=world)
            for topk in (case.topk, case.topk + 1)
        )
        assert same._behind is other._behind is rank.a2a._behind
        mine, slots = given(case, world.rank), slots_of(case, 0)
        received = rank.dispatch()
        y = rank.experts(received)
        wider = torch.cat([mine.ids, torch.full_like(mine.ids[:, :1], -1)], dim=1)
        other.dispatch(wider, mine.payloads, slots)
        same.dispatch(mine.ids, [*mine.payloads, mine.ids, mine.ids], slots)
        assert len(rank.a2a._behind.layers.all()) == 3  # one has grown
        for a2a in (other, rank.a2a, same):
            assert torch.equal(a2a.combine(y, slots), sums(case, world.rank, 0))
        same.dispatch(mine.ids, mine.payloads, slots)
        assert torch.equal(same.combine(y, slots), sums(case, world.rank, 0))
        assert len(rank.a2a._behind.layers.all()) == 3

    run(TWO, "cpu", work, workspace_size_per_rank=SIZE)


def test_a_workspace_may_be_initialized_again_for_more_tokens() -> None:
    """And then rows of a length that only an object for fewer had come before."""
    rows = torch.zeros(1, 1 << 18, dtype=torch.uint8)
    for most, hiddens in ((4, (64, 128)), (20, (64, 128, 64)), (9, (256,))):
        metainfo = flashinfer.moe_a2a_initialize(rows, 0, 1, most)
        x = torch.randn(most, 64).bfloat16()
        ids = torch.zeros(most, 2, dtype=torch.int32)
        for hidden in hiddens:
            (received,), offset, _ = flashinfer.moe_a2a_dispatch(ids, [x], rows, metainfo, most, 0, 1, 2, 4)
            y = received.repeat(1, 1, hidden // 64)
            combined = flashinfer.moe_a2a_combine(y, most, rows, metainfo, most, 0, 1, 2, offset)
            assert torch.equal(combined, x.repeat(1, hidden // 64))


def test_a_workspace_that_was_destroyed_by_another_layer() -> None:
    def work(rank: Rank) -> None:
        same = MoeAlltoAll(mapping(rank.world), MAX_TOKENS, ALONE.topk, ALONE.experts, SIZE, mnnvl_config=rank.world)
        y = rank.experts(rank.dispatch())
        same.destroy()
        with pytest.raises(moegen.errors.DestroyedError, match="dispatch again"):
            rank.combine(y)

    run(ALONE, "cpu", work, workspace_size_per_rank=SIZE)


def test_a_workspace_that_nobody_holds_is_not_kept() -> None:
    def work(world: RankWorld) -> None:
        before = len(workspaces._by_address)
        MnnvlMemory.set_comm_from_config(mapping(world), MnnvlConfig(world))
        for _ in range(3):
            memory = MnnvlMemory(mapping(world), 1 << 16)
            tensor = memory.as_torch_strided_tensor(torch.uint8)
            metainfo = flashinfer.moe_a2a_initialize(tensor, 0, 1, 8)
            ids = torch.zeros(3, 2, dtype=torch.int32)
            flashinfer.moe_a2a_dispatch(ids, [ids], tensor, metainfo, 3, 0, 1, 2, 4)
            del memory, tensor, metainfo
            gc.collect()
        assert len(workspaces._by_address) <= before + 1

    moegen.LocalWorld(1).run(work)


def test_a_rank_alone_needs_no_communicator() -> None:
    a2a = MoeAlltoAll(Mapping(rank=0, world_size=1), MAX_TOKENS, ALONE.topk, ALONE.experts, hidden_size=ALONE.hidden)
    mine = given(ALONE, 0)
    received = a2a.dispatch(mine.ids, mine.payloads[:1], 20)
    place = a2a.get_combine_payload_tensor_in_workspace(20, ALONE.hidden, torch.bfloat16)
    place.copy_(received[0])
    went = (mine.ids >= 0).any(dim=1, keepdim=True)
    assert torch.equal(a2a.combine(place, 20, payload_in_workspace=True), mine.payloads[0] * went)
    a2a.destroy()
