# SPDX-License-Identifier: Apache-2.0
"""Streams and events: which stream a call goes to, and how later work waits for it. On CPUs a call is over when it
returns, and all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
"""The current stream as a number, without the Stream object around it: torch's own compiler calls it too."""


def current_stream(device: torch.device) -> int:
    """The current CUDA stream as the driver's number; 0 on a CPU."""
    return int(_raw_stream(device.index)) if device.type == "cuda" else 0


class Event:
    """The end of an asynchronous call. Keeps the call's tensors until somebody has waited.

    Args:
        stream: where the call runs; None on a CPU.
        results: tensors made on that stream: a stream that waits may use them, and the allocator is told so.
        kept: what else the call needs.

    Attributes:
        event: the `torch.cuda.Event`; None on a CPU.
    """

    def __init__(
        self, stream: torch.cuda.Stream | None, results: Sequence[torch.Tensor | None] = (), kept: object = None
    ) -> None:
        self.event: Any = None
        self._results = results
        self._kept = kept
        if stream is not None:
            self.event = torch.cuda.Event()
            self.event.record(stream)

    def wait(self) -> None:
        """Makes the current stream wait; the host goes on."""
        if self.event is not None:
            current = torch.cuda.current_stream()
            self.event.wait(current)
            for tensor in self._results:
                if tensor is not None:
                    tensor.record_stream(current)
        self._kept = None


class CommStream:
    """The stream of asynchronous calls, made when it is first used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """None on a CPU."""
        if self._stream is None and self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        return self._stream

    def __enter__(self) -> CommStream:
        """Calls go to this stream, behind what is on the current one now."""
        stream = self.stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            self._context: Any = torch.cuda.stream(stream)
            self._context.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        if self._stream is not None:
            self._context.__exit__(*failure)
