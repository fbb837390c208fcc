# SPDX-License-Identifier: Apache-2.0
"""Where a call with DeepEP's stream arguments runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from moegen.compat.deep_ep.utils import CallEvent, Earlier, EventOverlap
from moegen.runtime.streams import CommStream

T = TypeVar("T")
Tensors = Sequence[torch.Tensor | None]


class Streams:
    """An asynchronous call goes to the communication stream, behind the earlier events or, without any, behind what is
    on the current stream; its results are made there. Any other goes to the current stream, behind all of these.

    Args:
        earlier: EventOverlaps or EventHandles; None among them is nothing.
    """

    def __init__(self, asynchronous: bool, *earlier: Any) -> None:
        self._asynchronous = asynchronous
        self._earlier = [event for event in map(Earlier.of, earlier) if event is not None]

    def wait(self) -> None:
        for event in self._earlier:
            event.wait()

    def call(
        self, comm: CommStream, inputs: Tensors, call: Callable[[], T], results: Callable[[T], Tensors]
    ) -> tuple[T, EventOverlap]:
        """What it returns, and its event: one without a GPU event if it is ordered already."""
        if self._asynchronous:
            result, event = comm.run(self if self._earlier else None, inputs, call, results)
            return result, EventOverlap(CallEvent(event))
        self.wait()
        return call(), EventOverlap()
