# SPDX-License-Identifier: Apache-2.0
"""Where and with what a result was measured. Holds no name of a host or folder."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

import moegen
from moegen.errors import UnsupportedPlatformError

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def machine(device: torch.device) -> dict[str, object]:
    """The device's name and what else bears on its speed."""
    found: dict[str, object] = {"cpu": _cpu_name(), "cores": os.cpu_count() or 0, "system": platform.system()}
    if device.type != "cuda":
        return found | {"name": f"CPU ({platform.machine()})", "gpus": 0}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "name": properties.name,
        "gpus": torch.cuda.device_count(),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
    }


def versions() -> dict[str, str]:
    """Of everything that makes or runs kernels."""
    found = {"moegen": moegen.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("cuda-bindings", "numpy"):
        found[package] = _version(package)
    found["nvrtc"] = _nvrtc()
    if torch.version.cuda:
        found["torch_cuda"] = torch.version.cuda
    return found


def short_name(name: str) -> str:
    """A GPU's name as one word for a file name: "NVIDIA H100 80GB HBM3" is h100, a CPU is cpu."""
    model = re.search(r"\b(?:RTX )?([A-Z]{1,3}\d{2,4})\b", name)
    if name.startswith("CPU"):
        return "cpu"
    return (model[1] if model else re.sub(r"\W+", "-", name).strip("-")).lower()


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is not None:
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    try:
        match = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER_FILE.read_text())
    except OSError:
        return "unknown"
    return match[0] if match else "unknown"


def _cpu_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _nvrtc() -> str:
    from moegen.compile import nvrtc

    try:
        return nvrtc.identity()
    except UnsupportedPlatformError:
        return "none"
