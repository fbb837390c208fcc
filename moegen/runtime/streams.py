# SPDX-License-Identifier: Apache-2.0
"""Streams and events: which stream a call goes to, and how later work waits for it. On CPUs a call is over when it
returns, and all of this does nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from moegen.runtime.waiting import until

T = TypeVar("T")

_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""The current stream as a number, without the Stream object around it: torch's own compiler calls it too."""


def current_stream(device: torch.device) -> int:
    """The current CUDA stream as the driver's number; 0 on a CPU."""
    return int(_raw_stream(device.index)) if device.type == "cuda" else 0


def record(device: torch.device, tensors: Sequence[torch.Tensor | None]) -> None:
    """Tells torch's allocator that the current stream uses these tensors, which were made on another."""
    if device.type == "cuda":
        current = torch.cuda.current_stream(device)
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(current)


def wait_for_stream(device: torch.device) -> None:
    """Returns when all is over that the current stream has been given. In the main thread, signals act meanwhile."""
    if device.type != "cuda":
        return
    stream = torch.cuda.current_stream(device)
    if threading.current_thread() is threading.main_thread():
        until(stream.query, spin=True)
    else:
        stream.synchronize()


def read_by_host(numbers: torch.Tensor) -> list[Any]:
    """They, once the current stream has made them."""
    wait_for_stream(numbers.device)
    return numbers.tolist()


class StreamOrder:
    """Queues launches that share something behind each other, whichever streams they go to. Not while a stream
    captures: a graph's order is its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: dict[tuple[str, int], tuple[int, torch.cuda.Stream]] = {}

    def follow(self, *key: Any) -> None:
        """The current stream waits for what was launched with the same key before; costs nothing on the same stream."""
        if self._device.type != "cuda":
            return
        number = current_stream(self._device)
        before = self._last.get(key)
        if (before is not None and before[0] == number) or torch.cuda.is_current_stream_capturing():
            return
        current = torch.cuda.current_stream(self._device)
        if before is not None:
            current.wait_stream(before[1])
        self._last[key] = (number, current)


class Event:
    """The end of an asynchronous call.

    Args:
        comm: where the call runs.
        results: tensors made there: a stream that waits may use them, and the allocator is told so.

    Attributes:
        event: the `torch.cuda.Event`; None on a CPU.
    """

    def __init__(self, comm: CommStream, results: Sequence[torch.Tensor | None]) -> None:
        self.event: Any = None
        self._device = comm.device
        self._results = results
        if comm.stream is not None:
            self.event = torch.cuda.Event()
            self.event.record(comm.stream)

    def wait(self) -> None:
        """Makes the current stream wait; the host goes on."""
        if self.event is not None:
            self.event.wait(torch.cuda.current_stream(self._device))
            record(self._device, self._results)


class CommStream:
    """The stream of asynchronous calls, made when it is first used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """None on a CPU."""
        if self._stream is None and self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device, priority=-1)
        return self._stream

    @contextmanager
    def behind(self, event: Any = None) -> Iterator[CommStream]:
        """Calls go to this stream, behind `event`, which has `wait()`; None: behind what is on the current one."""
        stream = self.stream
        if stream is None:
            yield self
            return
        if event is None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            if event is not None:
                event.wait()
            yield self

    def run(
        self,
        event: Any,
        inputs: Sequence[torch.Tensor | None],
        call: Callable[[], T],
        results: Callable[[T], Sequence[torch.Tensor | None]],
    ) -> tuple[T, Event]:
        """What `call` returns when it is made here behind `event`, and the Event of its end. The allocator is told that
        this stream uses `inputs`; `results` names the tensors that were made here.
        """
        with self.behind(event):
            record(self.device, inputs)
            result = call()
        return result, Event(self, results(result))
