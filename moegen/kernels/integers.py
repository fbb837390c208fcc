# SPDX-License-Identifier: Apache-2.0
"""What counts as an integer: 8.0 and True equal 8 and 1, and would be found under the same keys in every cache."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral
from typing import Any


def as_int(value: object) -> int | None:
    """The integer as Python's own, also numpy's; None for anything else, floats and bools among it."""
    if type(value) is int:
        return value
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def settle_integers(made: Any, error: type[Exception], prefix: str = "") -> None:
    """Makes the integer fields of a frozen dataclass Python's own.

    Raises:
        error: one holds something else.
    """
    for each in fields(made):
        if each.type in ("int", int):
            given = getattr(made, each.name)
            number = as_int(given)
            if number is None:
                raise error(f"{prefix}{each.name} must be an integer; got {given!r}")
            if number is not given:
                object.__setattr__(made, each.name, number)
