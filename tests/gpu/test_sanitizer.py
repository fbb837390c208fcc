# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer finds nothing in the kernels of virtual ranks on one GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
def test_memcheck_is_clean() -> None:
    """API errors are left out: the bindings ask the driver for functions that it does not have."""
    program = Path(__file__).parents[1] / "support" / "sanitized.py"
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    environment = {**os.environ, "CUDA_MODULE_LOADING": "LAZY", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    run = subprocess.run(
        ["compute-sanitizer", *options, sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    print(run.stdout[-3000:])
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in run.stdout
