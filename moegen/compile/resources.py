# SPDX-License-Identifier: Apache-2.0
"""What a GPU kernel uses, as ptxas reports it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Resources:
    """Registers of a thread; bytes of static shared memory of a block; bytes of spills, stack and constants.

    `spill_bytes` counts stores and loads. `constant_bytes` is 0 where ptxas does not report it (sm90 and later).
    """

    registers: int
    shared_bytes: int
    spill_bytes: int
    stack_bytes: int
    constant_bytes: int

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, int] | None) -> Resources | None:
        return Resources(**fields) if fields else None


def parse(log: str) -> Resources | None:
    """The resources in the log of `--ptxas-options=-v`; None if the log has none.

    With several functions in one text the largest of each counts.
    """
    registers = _numbers(r"Used (\d+) registers", log)
    if not registers:
        return None
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = "\n".join(line for line in log.splitlines() if "Used " in line)
    return Resources(
        registers=max(registers),
        shared_bytes=max(_numbers(r"(\d+)(?:\+\d+)? bytes smem", used), default=0),
        spill_bytes=max((int(stores) + int(loads) for stores, loads in spills), default=0),
        stack_bytes=max(_numbers(r"(\d+) bytes (?:cumulative )?stack", log), default=0),
        constant_bytes=sum(_numbers(r"(\d+) bytes cmem\[\d+\]", used)),
    )


def has_warning(log: str) -> bool:
    """Whether the log of a successful compile holds a warning, of the front end or of ptxas. A spill is none."""
    return re.search(r"(: warning [#:]|^ptxas warning\s*:|; warning\s*:)", log, re.MULTILINE) is not None


def _numbers(pattern: str, text: str) -> list[int]:
    return [int(found) for found in re.findall(pattern, text)]
