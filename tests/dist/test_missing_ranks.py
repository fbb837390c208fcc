# SPDX-License-Identifier: Apache-2.0
"""What ranks that are processes do together between their hosts, when one comes late, fails, or is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.collective_cases import inputs, make
from support.layer import Shape
from support.processes import Processes, make_layer, round_trips

from moegen.errors import CapacityError, MissingKernelError, MissingRanksError, WorldError
from moegen.runtime import agreement, memory, worlds

SIZE = 4
SHAPE = Shape(SIZE, 16, 4, 128, 64)
LATE = 1


@pytest.fixture(scope="module")
def group(processes: Any) -> Processes:
    kept: Processes = processes(SIZE, "cpu")
    return kept


def new_group() -> Any:
    """What fails in it leaves the default one alone."""
    return torch.distributed.new_group()


def nothing_is_left() -> bool:
    return not [name for name in os.listdir("/dev/shm") if name.startswith("moegen-")]


# ---- late, or failed --------------------------------------------------------------------------------


def come_late(rank: int, device: str) -> tuple[Any, ...]:
    least, worlds.LEAST_SECONDS = worlds.LEAST_SECONDS, 1.0
    group = new_group()
    torch.distributed.barrier()
    if rank == LATE:
        time.sleep(2.0)
    answers: list[Any] = []
    for _ in range(2):
        begin = time.monotonic()
        try:
            make_layer(SHAPE, device, group=group, timeout=1.0)
        except WorldError as error:
            missing = error.missing if isinstance(error, MissingRanksError) else ()
            answers.append((missing, "waited 1 s for rank 1 to" in str(error), time.monotonic() - begin < 10))
    worlds.LEAST_SECONDS = least
    with make_layer(SHAPE, device, group=new_group()) as layer:
        answers.append(round_trips(layer, SHAPE, 1))
    return tuple(answers)


def test_a_late_rank_is_named_on_every_rank(group: Processes) -> None:
    """Also by itself, and in every later attempt; a new group works."""
    for rank, (first, again, then) in enumerate(group.call(come_late)):
        assert first == again == ((LATE,), True, True), rank
        assert then == "ok"


def fail_alone(rank: int, device: str, replace: Callable[[int], None]) -> str:
    before = (memory.make_shared_file, agreement.load, memory.open_shared_file)
    replace(rank)
    try:
        with make_layer(SHAPE, device, path="ipc") as layer:
            return round_trips(layer, SHAPE, 2)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        memory.make_shared_file, agreement.load, memory.open_shared_file = before


def denied_memory(rank: int) -> None:
    def denied(size: int) -> memory.SharedFile:
        raise PermissionError(13, "Permission denied")

    if rank == LATE:
        memory.make_shared_file = denied


def missing_kernel(rank: int) -> None:
    def missing(*_: object) -> Any:
        raise MissingKernelError("none, and it must not be compiled")

    if rank == LATE:
        agreement.load = missing


def unseen_processes(rank: int) -> None:
    """As between containers that share nothing but /dev/shm."""
    by_any_path = memory.open_shared_file

    def by_name_only(path: str, *about: Any) -> memory.SharedFile:
        if path.startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return by_any_path(path, *about)

    memory.open_shared_file = by_name_only


def test_memory_that_one_rank_is_denied_is_every_ranks_error(group: Processes) -> None:
    answers = group.call(fail_alone, denied_memory)
    assert answers == [f"{CapacityError.__name__}: rank 1: PermissionError: [Errno 13] Permission denied"] * SIZE


def test_a_kernel_that_one_rank_lacks_is_every_ranks_error(group: Processes) -> None:
    answers = group.call(fail_alone, missing_kernel)
    assert answers.pop(LATE) == "MissingKernelError: none, and it must not be compiled"
    assert set(answers) == {
        "WorldError: rank 1 could not load its kernels: MissingKernelError: none, and it must not be compiled"
    }


def test_ranks_that_do_not_see_each_other_map_memory_by_name(group: Processes) -> None:
    assert group.call(fail_alone, unseen_processes) == ["ok"] * SIZE
    assert nothing_is_left()


def hold_memory(rank: int, device: str) -> str:
    """Of a rank that is killed now nothing would be left: memory has no name, from its making on."""
    made = memory.make_shared_file(4096)
    named = [path for path in os.listdir("/dev/shm") if path.startswith("moegen-")]
    made.close()
    return "".join(named)


def test_memory_has_no_name(group: Processes) -> None:
    assert group.call(hold_memory) == [""] * SIZE


# ---- killed -----------------------------------------------------------------------------------------


def die(_: object = None) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def die_twice(rank: int, device: str) -> list[Any]:
    """Rank 3 while an object is made, and rank 2 in a call of path collective that the others have begun."""
    if rank == 3:
        memory.make_shared_file = die
    answers: list[Any] = []
    try:
        make_layer(SHAPE, device, path="ipc")
    except MissingRanksError as error:
        answers.append((error.missing, nothing_is_left()))
    survivors = torch.distributed.new_group([0, 1, 2], use_local_synchronization=True)
    layer = make(survivors, device, "collective", timeout=20.0)
    ids, payloads = inputs(rank, 3, 1, device)
    layer.dispatch(ids, payloads)
    if rank == 2:
        time.sleep(0.3)
        die()
    begin = time.monotonic()
    for _ in range(2):
        try:
            layer.dispatch(ids, payloads)
        except MissingRanksError as error:
            answers.append((error.missing, time.monotonic() - begin < 5))
    return answers


def test_killed_ranks_are_named() -> None:
    processes = Processes(SIZE, "cpu")
    first, second, *_ = processes.call(die_twice, dead=[2, 3])
    assert first == second == [((3,), True), ((2,), True), ((2,), True)]
    assert nothing_is_left()
    processes.stop()
