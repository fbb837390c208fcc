# SPDX-License-Identifier: Apache-2.0
"""Where templates and headers are: beside the package in a checkout, inside it in a wheel. Committed kernels are in a
checkout alone.
"""

from __future__ import annotations

import functools
from pathlib import Path


def find(folder: str) -> Path:
    """The folder `templates`, in the installed package or in the checkout around it."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / folder, package.parent / folder):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"moegen's folder {folder!r} is missing beside {package}; reinstall moegen")


def checkout() -> Path | None:
    """The folder of the checkout that this package is part of; None if it was installed from a wheel.

    A wheel holds its templates in the package; what lies beside an installed package is not moegen's.
    """
    around = find("templates").parent
    return None if around == Path(__file__).resolve().parent.parent else around


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
