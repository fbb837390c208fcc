# SPDX-License-Identifier: Apache-2.0
"""Makes tests/support importable, and keeps the GPU's queues apart for virtual ranks."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # one hardware queue per virtual rank
os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")  # loading a kernel late waits for those of the other ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests under tests/gpu need a GPU; without one they are skipped, and say so."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))
