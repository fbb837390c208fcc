# SPDX-License-Identifier: Apache-2.0
"""Calls of which only the first half was made: what their hooks need, and which slots they hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moegen.admission import Span
from moegen.errors import SlotError

Hook = Callable[[], None]


@dataclass(eq=False)
class OpenHalf:
    """An op of which only the first half was launched. Keeps alive what the second reads and writes."""

    op: str
    slot: int
    arguments: tuple[int, ...]
    kept: tuple[object, ...]
    done: bool = False
    holds: tuple[Span, ...] = ()
    """Memory that the second half reads or writes: until then no other call may be given it to write into."""


class OpenHalves:
    """Those of one object. A call takes its op's lowest free slot; if it opens a half, until that is closed."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._busy: dict[str, list[bool]] = {"dispatch": [False] * slots, "combine": [False] * slots}
        self._dispatches: set[tuple[int, ...]] = set()
        self._open: list[OpenHalf] = []

    def free_slot(self, op: str) -> int:
        busy = self._busy[op]
        if all(busy):
            raise SlotError(
                f"all {self._slots} slots hold a {op} whose hook was not called; call one of their hooks first, or "
                f"make this object with slots={self._slots + 1}"
            )
        return busy.index(False)

    def open(self, half: OpenHalf) -> OpenHalf:
        self._busy[half.op][half.slot] = True
        self._open.append(half)
        if half.op == "dispatch":
            self._dispatches.add(half.arguments)
        return half

    def take(self, half: OpenHalf) -> None:
        """The second half begins."""
        if half.done:
            raise SlotError("this hook was called already; a hook is called once")
        half.done = True

    def close(self, half: OpenHalf) -> None:
        """The second half is launched."""
        self._busy[half.op][half.slot] = False
        self._dispatches.discard(half.arguments)
        self._open.remove(half)
        half.kept = half.holds = ()

    @property
    def held(self) -> Sequence[Span]:
        """What the open ones hold."""
        return [span for half in self._open for span in half.holds] if self._open else ()

    def is_unfinished(self, address: int) -> bool:
        """Whether a dispatch that was given this address is open."""
        return any(address in arguments for arguments in self._dispatches)
