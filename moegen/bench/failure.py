# SPDX-License-Identifier: Apache-2.0
"""What a benchmark raises when its figures would be worth nothing."""

from __future__ import annotations

from moegen.errors import MoegenError


class BenchError(MoegenError, RuntimeError):
    """The benchmark could not run, or what it timed was wrong. It never skips and never prints a figure instead."""
