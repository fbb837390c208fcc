# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's functional one-sided calls against the oracle of the class's, on every device."""

from __future__ import annotations

import torch

import moegen
from moegen.compat import flashinfer
from moegen.compat.flashinfer import MnnvlConfig, MnnvlMemory
from moegen.runtime.worlds import RankWorld
from support.flashinfer_cases import (
    IDS,
    INVALID,
    MAX_TOKENS,
    TWO,
    Case,
    check_received,
    experts_of,
    given,
    in_step,
    mapping,
    slots_of,
    sums,
)


def test_functional_calls(device: str) -> None:
    """On a workspace of MnnvlMemory, with ids sanitized afterwards and rows that the user places in the workspace."""
    case = Case(4, 12, 4)

    def work(world: RankWorld) -> None:
        me = world.rank
        size = flashinfer.moe_a2a_get_workspace_size_per_rank(4, MAX_TOKENS, case.bytes_per_token, 2 * case.hidden, 3)
        MnnvlMemory.initialize()
        MnnvlMemory.set_comm_from_config(mapping(world), MnnvlConfig(comm_backend=world))
        memory = MnnvlMemory(mapping(world), size)
        workspace = memory.as_torch_strided_tensor(torch.uint8)
        assert workspace.shape == (4, size) and memory.ptr == workspace.data_ptr()
        metainfo = flashinfer.moe_a2a_initialize(workspace, me, 4, MAX_TOKENS, 3)
        stats = torch.full((3,), me, dtype=torch.int32, device=world.device)
        for turn in range(3):
            mine, slots = given(case, me, turn, world.device), slots_of(case, turn)
            in_step(world)
            received, offset, gathered = flashinfer.moe_a2a_dispatch(
                mine.ids, mine.payloads, workspace, metainfo, slots, me, 4, case.topk, case.experts, None, stats
            )
            in_step(world)
            assert gathered is not None and gathered[:, 0].tolist() == [0, 1, 2, 3]
            flashinfer.moe_a2a_sanitize_expert_ids(received[IDS], workspace, metainfo, me, INVALID)
            check_received(case, me, turn, received, sanitized=True)
            end = offset + 4 * slots * 2 * case.hidden
            place = flashinfer.moe_a2a_wrap_payload_tensor_in_workspace(
                workspace[me, :], [4, slots], offset, end, torch.bfloat16
            )
            place.copy_(experts_of(case, me, received))
            for in_workspace, payload in ((True, place), (False, place.clone())):
                in_step(world)
                combined = flashinfer.moe_a2a_combine(
                    payload, len(mine.ids), workspace, metainfo, slots, me, 4, case.topk, offset, in_workspace
                )
                in_step(world)
                assert torch.equal(combined.cpu(), sums(case, me, turn))
        memory.destroy()

    moegen.LocalWorld(4, device).run(work)


def test_a_tensor_of_the_user_becomes_a_workspace(device: str) -> None:
    """All ranks' rows in one, as FlashInfer's tests have it; and again for other ranks, while the first still live."""
    case = TWO
    size = flashinfer.moe_a2a_get_workspace_size_per_rank(2, MAX_TOKENS, case.bytes_per_token, 2 * case.hidden)
    rows = torch.full((2, size), 9, dtype=torch.uint8, device=device)
    kept: list[torch.Tensor] = []

    def work(world: RankWorld) -> None:
        me = world.rank
        metainfo = flashinfer.moe_a2a_initialize(rows, me, 2, MAX_TOKENS, comm_backend=world)
        assert not rows[me].any()
        kept.append(metainfo)
        mine, slots = given(case, me, 0, world.device), slots_of(case, 0)
        shape = (me, 2, case.topk, case.experts)
        received, offset, nothing = flashinfer.moe_a2a_dispatch(mine.ids, mine.payloads, rows, metainfo, slots, *shape)
        assert nothing is None
        in_step(world)
        y = experts_of(case, me, received)
        at = me * size + offset  # from the beginning of all rows
        place = flashinfer.moe_a2a_wrap_payload_tensor_in_workspace(rows, [2, slots], at, at + 2 * y.numel(), y.dtype)
        place.copy_(y)
        in_step(world)
        combined = flashinfer.moe_a2a_combine(
            place, len(mine.ids), rows, metainfo, slots, me, 2, case.topk, offset, payload_in_workspace=True
        )
        in_step(world)
        assert torch.equal(combined.cpu(), sums(case, me, 0))

    for _ in range(2):
        moegen.LocalWorld(2, device).run(work)
