# SPDX-License-Identifier: Apache-2.0
"""How long each stage of a call takes on path collective, on request."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

_NOT_NOTED = nullcontext()


class Stages:
    """Notes when stages begin and end: by events of the current stream on a GPU, else by the clock. Costs nothing until
    it is switched on; a call that is being captured is not noted.
    """

    def __init__(self, device: torch.device) -> None:
        self.on = False
        self._gpu = device.type == "cuda"
        self._noted: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """What is enqueued (on a CPU: done) inside is the stage `name`."""
        if not self.on or (self._gpu and torch.cuda.is_current_stream_capturing()):
            return _NOT_NOTED
        return self._noting(name)

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        begin = self._now()
        yield
        self._noted[name].append((begin, self._now()))

    def seconds(self) -> dict[str, list[float]]:
        """Of every stage noted since the last time this was asked, in the order of the calls. Waits for the last noted
        event of each, not for the device.
        """
        noted, self._noted = self._noted, defaultdict(list)
        return {name: [self._between(*ends) for ends in of_stage] for name, of_stage in noted.items()}

    def _now(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        if not self._gpu:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
