# SPDX-License-Identifier: Apache-2.0
"""DeepEP's events: `EventHandle` and `EventOverlap`, also importable as `deep_ep.utils`."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch

topk_idx_t = torch.int64
"""Of expert ids; int32 is taken too."""


class EventHandle:
    """An event on the stream that is current when it is made. On a machine without a GPU it waits for nothing."""

    def __init__(self) -> None:
        self._event: Any = None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream())

    def current_stream_wait(self) -> None:
        """Makes the current stream wait for it."""
        if self._event is not None:
            self._event.wait(torch.cuda.current_stream())


class CallEvent:
    """moegen's event, with DeepEP's name for waiting too."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.wait()

    current_stream_wait = wait


class Earlier:
    """DeepEP's event under moegen's name for waiting."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.current_stream_wait()

    @staticmethod
    def of(previous: Any) -> Earlier | None:
        """Of a `previous_event`: an EventOverlap or an EventHandle; None: there is nothing to wait for."""
        event = previous.event if isinstance(previous, EventOverlap) else previous
        return None if event is None else Earlier(event)


class EventOverlap:
    """An event, and the tensors that must live until it was waited for; also a context manager that waits at its end.

    Args:
        event: an EventHandle, or None for work that is already ordered.
        extra_tensors: kept until then.
    """

    def __init__(self, event: Any = None, extra_tensors: Sequence[torch.Tensor] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Makes the current stream wait; `release_handle`: and forgets the event and the tensors.

        Raises:
            ValueError: there is no event: nothing asynchronous was asked for.
        """
        if self.event is None:
            raise ValueError("this EventOverlap has no event; ask for one with async_finish=True")
        self.event.current_stream_wait()
        if release_handle:
            self.event = self.extra_tensors = None

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.event is not None:
            self.event.current_stream_wait()
