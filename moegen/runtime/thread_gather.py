# SPDX-License-Identifier: Apache-2.0
"""Values that the virtual ranks of one process exchange: what one thread knows of another is known at once."""

from __future__ import annotations

import threading
import time
from typing import Any

from moegen.errors import MissingRanksError, WorldError
from moegen.runtime.waiting import SLICE_SECONDS


class OtherRankFailedError(WorldError):
    """Raised in the ranks that waited for one that failed."""


class ThreadGather:
    """Gathers an object from each of `size` threads, again and again."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()
        self.reset()

    def reset(self) -> None:
        """No rank is in an exchange, and none has ended."""
        self._exchanges: dict[int, dict[int, Any]] = {}
        self._calls = [0] * self._size
        self._ended: set[int] = set()
        self._failure = ""

    def __call__(self, rank: int, value: Any, what: str, seconds: float) -> list[Any]:
        """Every rank's `value`, in rank order.

        Raises:
            MissingRanksError: ranks did not come within so many seconds.
            OtherRankFailedError: a rank has failed, or has returned, and will not come.
        """
        until = time.monotonic() + seconds
        with self._changed:
            self.raise_if_failed()
            number = self._calls[rank]
            self._calls[rank] += 1
            values = self._exchanges.setdefault(number, {})
            values[rank] = value
            if len(values) == self._size:  # who waits holds them too
                del self._exchanges[number]
                self._changed.notify_all()
            while len(values) < self._size:
                self._raise_if_hopeless(rank, values)
                left = until - time.monotonic()
                if left <= 0:
                    raise self._give_up(rank, values, what, seconds)
                self._changed.wait(min(left, SLICE_SECONDS))
        return [values[each] for each in range(self._size)]

    def end(self, rank: int) -> None:
        """The rank will come to no exchange any more."""
        with self._changed:
            self._ended.add(rank)
            self._changed.notify_all()

    def fail(self, why: str) -> None:
        """Ends all waits, now and later."""
        with self._changed:
            self._failure = self._failure or why
            self._changed.notify_all()

    def raise_if_failed(self) -> None:
        if self._failure:
            raise OtherRankFailedError(f"this rank stopped waiting: {self._failure}")

    def _raise_if_hopeless(self, rank: int, values: dict[int, Any]) -> None:
        self.raise_if_failed()
        for other in sorted(self._ended - values.keys()):
            raise OtherRankFailedError(
                f"rank {rank} waits in an exchange for rank {other}, which has returned: all ranks make the same calls"
            )

    def _give_up(self, rank: int, values: dict[int, Any], what: str, seconds: float) -> MissingRanksError:
        error = MissingRanksError(rank, tuple(sorted(set(range(self._size)) - values.keys())), what, seconds)
        self._failure = self._failure or str(error)
        self._changed.notify_all()
        return error
