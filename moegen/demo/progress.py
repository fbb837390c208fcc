# SPDX-License-Identifier: Apache-2.0
"""Says how far a long part of the demo is; quick parts say nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

EVERY_SECONDS = 2.0


def reported(items: Sequence[T], what: str, *, silent: bool = False) -> Iterator[T]:
    """The items. Whoever reads stderr sees every two seconds how many are done.

    Args:
        what: the items, e.g. "experts made".
        silent: for all ranks but the first.
    """
    last = time.monotonic()
    for done, item in enumerate(items):
        if not silent and time.monotonic() - last >= EVERY_SECONDS:
            last = time.monotonic()
            sys.stderr.write(f"{what}: {done} of {len(items)}\n")
            sys.stderr.flush()
        yield item
