# SPDX-License-Identifier: Apache-2.0
"""Where things lie in every rank's symmetric memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from moegen.limits import REGION_ALIGNMENT, ceil_div


def offsets(sizes: Iterable[int], start: int = 0) -> tuple[int, ...]:
    """Byte offsets of regions of these sizes, one behind the other and aligned; then the end of the last."""
    return tuple(accumulate((ceil_div(size, REGION_ALIGNMENT) * REGION_ALIGNMENT for size in sizes), initial=start))
