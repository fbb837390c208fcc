# SPDX-License-Identifier: Apache-2.0
"""Waits of the host: each ends with what is awaited, with its deadline, with a signal, or once it has become pointless.

No wait stays outside of Python for longer than a slice, because signals (Ctrl-C) act there only.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SLICE_SECONDS = 0.1

LEAST_SECONDS = 2.0
"""Of a deadline for ranks to come to an exchange between hosts, however short the object's timeout: the processes of a
busy machine are no more punctual than that."""

SETUP_SECONDS = 300.0
"""What ranks may take longer than that while kernels are compiled, or memory is made and mapped."""

_SPIN_SECONDS = 1e-3
_FIRST_PAUSE, _LONGEST_PAUSE = 5e-5, 1e-2

_of_thread = threading.local()


@contextmanager
def pointless_if(look: Callable[[], None]) -> Iterator[None]:
    """Within, waits of this thread end with what `look` raises."""
    before = getattr(_of_thread, "look", None)

    def both() -> None:
        if before is not None:
            before()
        look()

    _of_thread.look = both
    try:
        yield
    finally:
        _of_thread.look = before


def raise_if_pointless() -> None:
    """Raises what makes it pointless for this thread to wait any longer."""
    look = getattr(_of_thread, "look", None)
    if look is not None:
        look()


def until(ready: Callable[[], bool], seconds: float = math.inf, *, spin: bool = False) -> bool:
    """Asks again and again, after pauses that get longer with the wait; False if it was not so in time.

    Args:
        spin: asking costs next to nothing, and the answer is expected at once.
    """
    begin = time.monotonic()
    while not ready():
        passed = time.monotonic() - begin
        if passed > seconds:
            return False
        if spin and passed < _SPIN_SECONDS:
            time.sleep(0)  # lets other threads run
            continue
        raise_if_pointless()
        time.sleep(min(max(_FIRST_PAUSE, passed / 32), _LONGEST_PAUSE))
    return True
