# SPDX-License-Identifier: Apache-2.0
"""Whether another process of this machine is still there."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class ProcessName(NamedTuple):
    """Names a process for ever: numbers alone are given again.

    Attributes:
        machine: this boot of it, and what numbers of processes refer to (PID namespace).
        pid: its number there.
        started: in clock ticks since the boot.
    """

    machine: tuple[str, str]
    pid: int
    started: int

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, as far as can be seen from here: False for processes of other machines."""
        if self.machine != _machine():
            return False
        try:
            state, started = _stat(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except (OSError, ValueError, IndexError):
            return False
        return state in "ZX" or started != self.started


def this_process() -> ProcessName:
    started = 0
    with suppress(OSError, ValueError, IndexError):
        _, started = _stat(os.getpid())
    return ProcessName(_machine(), os.getpid(), started)


def gone(names: Sequence[ProcessName | None]) -> tuple[int, ...]:
    """Which of them have ended, by number; None: not known."""
    return tuple(number for number, name in enumerate(names) if name is not None and name.is_gone)


def _stat(pid: int) -> tuple[str, int]:
    """State and start time: fields 3 and 22 of proc(5)'s stat, counted from behind the name, which may hold blanks."""
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


@functools.cache
def _machine() -> tuple[str, str]:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip(), os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return "", str(os.getpid())  # nothing is known of any other
