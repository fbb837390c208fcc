# SPDX-License-Identifier: Apache-2.0
"""Captures of virtual ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_one_at_a_time = threading.Lock()


@contextmanager
def captured(graph: torch.cuda.CUDAGraph) -> Iterator[None]:
    """Captures the current stream. Entering a capture synchronizes the device, which fails while another captures."""
    stream = torch.cuda.current_stream()
    with _one_at_a_time, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        yield
