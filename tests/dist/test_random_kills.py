# SPDX-License-Identifier: Apache-2.0
"""Ranks that are killed, or stopped and continued, at random moments: the others' results stay right, or they are told.

Each rank of a group is a process. The parent picks a victim and a moment in a run of round trips.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked import context, take_environment
from support.layer import Shape, random_routing

import moegen
from moegen.leftovers import hold

SHAPE = Shape(4, 16, 4, 128, 32)
TOKENS = 12
TIMEOUT = 0.75
"""Of the objects, in seconds; a rank may be silent for twice that."""
LONGEST = 60
"""Seconds that a run may take, on a busy machine."""
STEPS, STEPS_AFTER = 24, 2
"""Round trips in which a rank is killed, and further ones, after which all survivors have the same mask."""
PAUSE = 0.02
"""Seconds between round trips, at most."""


def outputs_of(layer: moegen.ExpertParallel, received: moegen.Dispatched) -> torch.Tensor:
    """Expert e multiplies by 1 + e."""
    first = layer.local_experts.start
    factors = torch.arange(first, first + len(received.tokens), dtype=torch.float32) + 1
    return (received.tokens * factors[:, None, None]).bfloat16()


def parts_of(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[ranks, tokens, hidden] float64: what each rank's experts add to each token's sum."""
    per_rank = SHAPE.experts // SHAPE.ranks
    parts = torch.zeros(SHAPE.ranks, *x.shape, dtype=torch.float64)
    for token, k in (ids >= 0).nonzero().tolist():
        expert = int(ids[token, k])
        output = (x[token].float() * (expert + 1)).bfloat16().double()
        parts[expert // per_rank, token] += float(weights[token, k]) * output
    return parts


def is_right(combined: torch.Tensor, parts: torch.Tensor, doubtful: Collection[int]) -> bool:
    """Whether each token's sum is that of all ranks, with or without each whole part of those that are doubtful."""
    sure = sum(part for rank, part in enumerate(parts) if rank not in doubtful)
    fits = torch.zeros(combined.shape[0], dtype=torch.bool)
    scale = parts.abs().sum(0)
    for chosen in range(2 ** len(doubtful)):
        with_some = sure + sum(parts[rank] for at, rank in enumerate(doubtful) if chosen >> at & 1)
        fits |= ((combined.double() - with_some).abs() <= 0.02 * scale + 1e-6).all(1)
    return bool(fits.all())


def round_trips(layer: moegen.ExpertParallel, steps: range, pause: random.Random) -> list[int]:
    """Makes them, and compares each sum; returns the ranks that are left out in the end."""
    missing: list[int] = []
    for step in steps:
        routing = random_routing(SHAPE, [TOKENS] * SHAPE.ranks, step, kind="free")
        x, ids, weights = (part[layer.rank] for part in (routing.x, routing.ids, routing.weights))
        received = layer.dispatch(x, ids, weights)
        combined = layer.combine(outputs_of(layer, received), received.handle)
        layer.check()
        if layer.problem.masked:
            missing = (layer.active_ranks == 0).nonzero().flatten().tolist()
        assert is_right(combined, parts_of(x, ids, weights), missing), f"wrong sums in step {step} without {missing}"
        time.sleep(pause.uniform(0, PAUSE))
    return missing


def serve(pipe: Connection, rank: int, store: str, masked: bool, environment: dict[str, str]) -> None:
    """Says what it has seen: the ranks that it has left out, or the error by which it was told."""
    take_environment(environment)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=SHAPE.ranks)
    layer = moegen.ExpertParallel(
        num_experts=SHAPE.experts, num_topk=SHAPE.topk, hidden=SHAPE.hidden, max_tokens_per_rank=SHAPE.max_tokens,
        timeout=TIMEOUT, active_ranks=masked, device="cpu",
    )  # fmt: skip
    pause = random.Random(rank)
    pipe.send("ready")
    try:
        round_trips(layer, range(STEPS), pause)
        pipe.send("go on?")
        pipe.recv()
        pipe.send(round_trips(layer, range(STEPS, STEPS + STEPS_AFTER), pause))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    os._exit(0)


class Run:
    """A group of processes of which one is killed, or stopped for some time."""

    def __init__(self, folder: Path, masked: bool) -> None:
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(SHAPE.ranks):
            ours, theirs = context.Pipe()
            given = (theirs, rank, str(folder / "store"), masked, dict(os.environ))
            process = context.Process(target=serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        assert [self.answer(rank) for rank in range(SHAPE.ranks)] == ["ready"] * SHAPE.ranks

    def answer(self, rank: int) -> Any:
        """None: the process is dead."""
        assert self.pipes[rank].poll(LONGEST), f"rank {rank} was not told within {LONGEST} s"
        try:
            return self.pipes[rank].recv()
        except EOFError:
            return None

    def signal(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def finish(self) -> list[Any]:
        """What each rank has seen in the end."""
        answers = [self.answer(rank) for rank in range(SHAPE.ranks)]
        for rank, answer in enumerate(answers):
            if answer == "go on?":
                with suppress(BrokenPipeError):  # killed since
                    self.pipes[rank].send(None)
        answers = [self.answer(rank) if answer == "go on?" else answer for rank, answer in enumerate(answers)]
        for process in self.processes:
            process.join(LONGEST)
            process.kill()
        return answers


def one_run(folder: Path, seed: int, *, masked: bool, stop: bool) -> None:
    chance = random.Random(seed)
    victim, moment = chance.randrange(SHAPE.ranks), chance.uniform(0, STEPS * PAUSE)
    run = Run(folder, masked)
    time.sleep(moment)
    run.signal(victim, signal.SIGSTOP if stop else signal.SIGKILL)
    if stop:
        time.sleep(chance.uniform(0.2, 4) * TIMEOUT)
        run.signal(victim, signal.SIGCONT)
    answers = run.finish()
    others = [answer for rank, answer in enumerate(answers) if rank != victim]
    said = f"seed {seed}, victim {victim} after {moment:.3f} s: {answers}"
    if masked:
        assert all(answer == others[0] for answer in others), said
        assert others[0] == [victim] or (stop and others[0] == []), said
        if stop:
            assert answers[victim] == [] if others[0] == [] else "LeftOutError" in str(answers[victim]), said
    else:
        assert all("PeerTimeoutError" in str(answer) or (stop and answer == []) for answer in others), said
        assert stop or answers[victim] is None, said


def leftovers() -> set[str]:
    """What nobody holds: tests that run beside this one have folders, too."""
    folders = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return {str(path) for folder in folders for path in folder.glob("moegen*") if not is_held(path)}


def is_held(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True  # until just now
    try:
        hold(fd)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


@pytest.mark.parametrize("stop", [False, True], ids=["killed", "stopped"])
@pytest.mark.parametrize("masked", [False, True], ids=["required", "active_ranks"])
@pytest.mark.parametrize(
    "rounds", [pytest.param(range(5), id="some"), pytest.param(range(5, 55), id="many", marks=pytest.mark.slow)]
)
def test_the_others_are_right_or_told(tmp_path: Path, rounds: range, masked: bool, stop: bool) -> None:
    before = leftovers()
    for seed in rounds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        one_run(folder, seed, masked=masked, stop=stop)
    assert leftovers() <= before
