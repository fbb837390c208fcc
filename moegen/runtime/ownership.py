# SPDX-License-Identifier: Apache-2.0
"""Rules of every object that users hold: it stays in its process, one thread at a time uses it, and its tensors may be
written in any mode of torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar, NoReturn, TypeVar, cast

import torch

from moegen.errors import BusyError

Method = TypeVar("Method", bound=Callable[..., Any])


class ProcessBound:
    """Mixin: copies, deep copies and pickles raise TypeError. A copy would share memory that the original frees."""

    __slots__ = ()
    _noun: ClassVar[str | None] = None
    """What the error calls it; None: the name of its class."""
    _belongs_to: ClassVar[str] = "its process and its ranks"

    def __reduce__(self) -> NoReturn:
        noun = type(self).__name__ if self._noun is None else self._noun
        raise TypeError(f"a moegen {noun} belongs to {self._belongs_to}; it cannot be pickled or copied")


class Exclusive(ProcessBound):
    """Mixin: methods decorated with `exclusive` run in one thread at a time."""

    _lock: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        made._lock = threading.RLock()  # reentrant: calls make other calls
        return made


def exclusive(call: Method) -> Method:
    """The method raises BusyError at once while another thread is inside an exclusive method of the same object."""

    @wraps(call)
    def alone(self: Exclusive, /, *args: Any, **kwargs: Any) -> Any:
        lock = self._lock
        if not lock.acquire(False):
            raise BusyError(
                f"this {type(self).__name__} is being used by another thread, so that {call.__name__}() did nothing; "
                "objects take one call at a time: wait for the other thread's call to return, or make an object for "
                "each thread"
            )
        try:
            return call(self, *args, **kwargs)
        finally:
            lock.release()

    return cast(Method, alone)


def lasting() -> torch.inference_mode:
    """Context or decorator: tensors made inside belong to an object. In `torch.inference_mode()` they would be
    inference tensors, which cannot be written outside of it; so would `view(dtype)` of ordinary ones.
    """
    return torch.inference_mode(False)


def write_anyway(to: torch.Tensor, numbers: torch.Tensor) -> None:
    """Copies into the user's tensor, which may be an inference tensor: those are written in inference mode only."""
    with torch.inference_mode():
        to.copy_(numbers)
