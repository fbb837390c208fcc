# SPDX-License-Identifier: Apache-2.0
"""Where templates, headers and committed kernels are: beside the package in the source tree, inside it in a wheel."""

from __future__ import annotations

import functools
from pathlib import Path


def find(folder: str) -> Path:
    """The folder `templates` or `generated`, in the installed package or in the source tree around it."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / folder, package.parent / folder):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"moegen's folder {folder!r} is missing beside {package}; reinstall moegen")


@functools.cache
def device_headers() -> dict[str, bytes]:
    """The headers that kernels include, by the name in `#include <...>`, as the GPU targets see them."""
    return _headers("device", "*.cuh")


@functools.cache
def host_headers() -> dict[str, bytes]:
    """The same names as the host target sees them (host twins win), and the host's own headers."""
    return device_headers() | _headers("host", "*.cuh") | _headers("host", "*.hpp")


def host_files(pattern: str) -> dict[str, bytes]:
    """Other files of the host target (its runtime's sources, its compiler flags), by file name."""
    return {path.name: path.read_bytes() for path in sorted((find("templates") / "host").glob(pattern))}


def _headers(folder: str, pattern: str) -> dict[str, bytes]:
    paths = sorted((find("templates") / folder).glob(pattern))
    return {f"moegen/{path.name}": path.read_bytes() for path in paths}
