# SPDX-License-Identifier: Apache-2.0
"""Records what calls on two virtual CPU ranks launch, with the moegen that PYTHONPATH names.

`python -m kernel_compare.workers.record_calls FILE PATTERN`: makes the calls of each case whose name matches, and
writes every launch to FILE: of which call it was, its kernel and size, and its arguments by name. It makes calls by the
public API only, and finds the place of launches wherever a revision has it.
"""

from __future__ import annotations

import ctypes
import functools
import json
import secrets
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

import moegen
from kernel_compare.workers import call_cases
from kernel_compare.workers.homes import home

RANKS = 2
_here = threading.local()


class Record:
    """The calls that one rank makes of one case, and their launches."""

    def __init__(self, case: str, rank: int) -> None:
        self.case = case
        self.rank = rank
        self.calls = 0
        self.draws = 0
        self.launches: list[dict[str, Any]] = []
        self._call = "made"

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Makes a call, and counts it."""
        self.calls += 1
        self._call = f"{self.calls} {getattr(function, '__name__', 'hook')}"
        return function(*arguments, **options)

    def draw(self, bits: int) -> int:
        """In place of a random number."""
        self.draws += 1
        number = 1000 * (self.rank + 1) + self.draws
        return number & ((1 << bits) - 1)

    def add(self, spec: Any, blocks: int, content: bytes) -> None:
        launch = {"stem": spec.stem, "blocks": blocks, "threads": spec.block_threads}
        launch |= {"shared": spec.dynamic_shared_bytes, "arguments": dict(_split(spec.params, content))}
        self.launches.append({"call": f"{self.case}, rank {self.rank}, call {self._call}", **launch})


def _split(params: Any, content: bytes) -> Iterator[tuple[str, list[int | str]]]:
    """(name, values) of each member; of a pointer no more than what is the same in every run."""
    at = 0
    for member in params.members:
        layout = struct.Struct(f"={member.format * (member.length or 1)}")
        values = list(layout.unpack_from(content, at))
        at += layout.size
        if member.ctype.endswith("*"):
            values = [f"16n+{value % 16}" if value else "null" for value in values]
        yield member.name, values


def _record() -> Record:
    """Of the rank whose thread this is."""
    record: Record = _here.record
    return record


def _hook() -> None:
    """Has every start of a kernel recorded by the rank in whose thread it is, and random numbers drawn from it."""
    secrets.randbits = lambda k: _record().draw(k)
    kernel = home(r"^class HostKernel\b").HostKernel
    made = kernel.launcher

    @functools.wraps(made)
    def launcher(self: Any, params: ctypes.Array[ctypes.c_char], blocks: int, *more: Any) -> Callable[[], None]:
        start = made(self, params, blocks, *more)

        def recorded() -> None:
            _record().add(self.spec, blocks, bytes(params))
            start()

        return recorded

    kernel.launcher = launcher


def _run(name: str, case: Callable[..., None]) -> list[Record]:
    def work(world: Any) -> Record:
        record = _here.record = Record(name, world.rank)
        case(record, world, torch.Generator().manual_seed(1000 + world.rank))
        return record

    return moegen.LocalWorld(RANKS, "cpu").run(work)


def main() -> None:
    _hook()
    cases = {name: case for name, case in call_cases.cases() if fnmatch(name, sys.argv[2])}
    records = [record for name, case in cases.items() for record in _run(name, case)]
    made = {
        "calls": sum(record.calls for record in records),
        "launches": [launch for record in records for launch in record.launches],
    }
    Path(sys.argv[1]).write_text(json.dumps(made))


if __name__ == "__main__":
    main()
