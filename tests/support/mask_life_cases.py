# SPDX-License-Identifier: Apache-2.0
"""Signs of life: a rank that waits is not taken for dead, and survivors agree on who is; on every device."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field

import torch

import moegen
from moegen import errors
from moegen.runtime.worlds import RankWorld
from support.mask_layer import SHAPE, make

SHORT = 0.3
"""Seconds: the timeout of these objects; a silent rank is left out after twice that."""
LATE = 1
SURVIVORS = (0, 2)
EXPERT_OF = (0, 4, 7)
"""An expert of each rank."""


@dataclass
class Seen:
    """By one rank: the sum of each call over the token, its mask after each call, and what it was told."""

    factors: list[float] = field(default_factory=list)
    masks: list[list[int]] = field(default_factory=list)
    left_out: int = 0


def pair(rank: moegen.ExpertParallel, to: int, seen: Seen, pause: float | None = 0.0) -> bool:
    """A token goes to rank `to`, whose expert returns it as it is. `pause`: seconds between dispatch and combine; None:
    this rank never makes its combine.
    """
    x = torch.ones(1, SHAPE.hidden, dtype=torch.bfloat16, device=rank.device)
    ids = torch.full((1, SHAPE.topk), -1, dtype=torch.int64, device=rank.device)
    ids[0, 0] = EXPERT_OF[to]

    def persistently(call: object, *arguments: object) -> object:
        try:
            return call(*arguments)  # type: ignore[operator]
        except errors.LeftOutError:
            seen.left_out += 1
            return call(*arguments)  # type: ignore[operator]

    received = persistently(rank.dispatch, x, ids)
    assert isinstance(received, moegen.Dispatched)
    if pause is None:
        return False
    if pause:
        rank.synchronize()
        time.sleep(pause)
    combined = persistently(rank.combine, received.tokens * 1, received.handle)
    persistently(rank.synchronize)
    assert isinstance(combined, torch.Tensor)
    seen.factors.append(float(combined.float().mean()))
    seen.masks.append(rank.active_ranks.tolist())
    return True


def late_in_the_first_call(device: str, pause: float | None, calls: int) -> list[Seen]:
    """Rank 0 needs the late rank's part of the first combine; rank 2 does not, and runs ahead. From then on ranks 0 and
    2 need each other's.
    """
    layer = make(device, timeout=SHORT)

    def work(world: RankWorld) -> Seen:
        rank, seen = layer.ranks[world.rank], Seen()
        first, then = {0: (LATE, 2), LATE: (LATE, 0), 2: (2, 0)}[world.rank]
        for call in range(calls):
            late = call == 0 and world.rank == LATE
            if not pair(rank, first if call == 0 else then, seen, pause if late else 0.0):
                break
        return seen

    seen = layer.world.run(work)
    layer.destroy()
    return seen


def test_survivors_of_a_dead_rank_agree(device: str) -> None:
    """The rank that waits for the dead one is late for the other, which does not wait for the dead one."""
    seen = late_in_the_first_call(device, None, 4)
    assert [seen[rank].masks[-1] for rank in SURVIVORS] == [[1, 0, 1]] * 2
    assert seen[0].factors == [0, 1, 1, 1]
    assert seen[2].factors == [1, 1, 1, 1]


def test_a_rank_that_is_not_silent_for_long_stays(device: str) -> None:
    seen = late_in_the_first_call(device, 1.6 * SHORT, 4)
    assert [each.masks for each in seen] == [[[1, 1, 1]] * 4] * 3
    assert [each.factors for each in seen] == [[1] * 4] * 3
    assert [each.left_out for each in seen] == [0] * 3


def test_a_rank_that_is_too_late_is_out_for_all_and_learns_it(device: str) -> None:
    seen = late_in_the_first_call(device, 4 * SHORT, 4)
    assert [seen[rank].masks[2:] for rank in SURVIVORS] == [[[1, 0, 1]] * 2] * 2
    assert [each.left_out for each in seen] == [0, 1, 0]
    assert seen[LATE].masks[-1] == [0, 0, 0]
    assert seen[0].factors == [0, 1, 1, 1]
    assert seen[2].factors == [1, 1, 1, 1]


def test_waiting_in_a_call_of_another_object_is_a_sign_of_life(device: str) -> None:
    """Rank 0 waits for a dead rank in a call of one object, longer than rank 2 waits for a silent one in another's."""
    layer = make(device, timeout=2 * SHORT)

    def another(world: RankWorld) -> moegen.ExpertParallel:
        like = layer.ranks[world.rank].problem
        return moegen.ExpertParallel(
            world,
            num_experts=like.num_experts,
            num_topk=like.num_topk,
            hidden=like.hidden,
            max_tokens_per_rank=like.max_tokens,
            timeout=SHORT,
            active_ranks=True,
        )

    second = layer.world.run(another)

    def work(world: RankWorld) -> tuple[Seen, Seen]:
        one, other = Seen(), Seen()
        if pair(layer.ranks[world.rank], LATE if world.rank == 0 else 2, one, None if world.rank == LATE else 0.0):
            for _ in range(2):
                pair(second[world.rank], 2 if world.rank == 0 else 0, other)
        return one, other

    results = layer.world.run(work)
    for rank in SURVIVORS:
        assert results[rank][1].masks[-1] == [1, 0, 1]
        assert results[rank][1].factors == [1, 1]
    for each in second:
        each.destroy()
    layer.destroy()


def test_ranks_that_make_different_calls_do_not_wait_for_ever(device: str) -> None:
    """Each shows that it is alive, but neither makes the call that the other waits for."""
    layer = make(device, timeout=SHORT)

    def work(world: RankWorld) -> float:
        rank = layer.ranks[world.rank]
        x = torch.ones(1, SHAPE.hidden, dtype=torch.bfloat16, device=rank.device)
        ids = torch.full((1, SHAPE.topk), -1, dtype=torch.int64, device=rank.device)
        ids[0, :3] = torch.tensor(EXPERT_OF, device=rank.device)
        received = rank.dispatch(x, ids)
        rank.synchronize()
        start = time.monotonic()
        if world.rank == 0:
            rank.dispatch(x, ids)
        else:
            rank.combine(received.tokens * 1, received.handle)
        with contextlib.suppress(errors.LeftOutError):
            rank.synchronize()
        return time.monotonic() - start

    seconds = layer.world.run(work)
    assert max(seconds) < 30 * SHORT
    layer.destroy()
