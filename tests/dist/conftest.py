# SPDX-License-Identifier: Apache-2.0
"""Processes that modules share: starting them takes longer than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.processes import Processes


class KeptProcesses:
    """The last that were asked for."""

    def __init__(self) -> None:
        self._processes: Processes | None = None

    def __call__(self, size: int, device: str) -> Processes:
        kept = self._processes
        if kept is None or (kept.size, kept.device) != (size, device) or kept.lost:
            self.stop()
            kept = self._processes = Processes(size, device)
        return kept

    def stop(self) -> None:
        if self._processes is not None:
            self._processes.stop()


@pytest.fixture(scope="session")
def processes() -> Iterator[KeptProcesses]:
    kept = KeptProcesses()
    yield kept
    kept.stop()
