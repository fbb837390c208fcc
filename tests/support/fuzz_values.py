# SPDX-License-Identifier: Apache-2.0
"""Hostile values: what callers give in place of a well-formed argument, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from support.fuzz_tensors import COUNTS, FLOATS, IDS, TENSORS, NotApplicableError, Scene

Tensor = torch.Tensor

_JUNK: dict[str, Callable[[Scene], Any]] = {
    "None": lambda s: None,
    "text": lambda s: s.random.choice(("", "x", "cpu", "auto")),
    "bytes": lambda s: b"\x00",
    "object": lambda s: object(),
    "empty list": lambda s: [],
    "empty tuple": lambda s: (),
    "dict": lambda s: {},
    "number": lambda s: s.random.choice((0, 1, -1, 8)),
    "float": lambda s: s.random.choice((0.0, 1.5, float("nan"), float("inf"))),
    "True": lambda s: True,
    "False": lambda s: False,
    "huge": lambda s: s.random.choice((2**31, 2**32, 2**63, 2**64, 2**100, -(2**63), -(2**100))),
    "type": lambda s: int,
    "generator": lambda s: (number for number in range(3)),
    "function": lambda s: lambda *_: None,
    "ellipsis": lambda s: ...,
    "slice": lambda s: slice(None),
    "complex": lambda s: 1j,
    "size": lambda s: torch.Size([2, 2]),
    "dtype": lambda s: torch.float64,
    "array": lambda s: np.zeros((2, 2), dtype=np.float32),
    "some tensor": lambda s: torch.zeros(2, 2, dtype=torch.float32, device="cpu"),
    "tensor of one": lambda s: torch.ones(1, dtype=torch.int64, device="cpu"),
}

NUMBERS: dict[str, Callable[[Any, Scene], Any]] = {
    "numpy int64": lambda v, s: np.int64(v),
    "numpy int32": lambda v, s: np.int32(v),
    "numpy uint8": lambda v, s: np.uint8(v),
    "numpy bool": lambda v, s: np.bool_(True),
    "numpy float": lambda v, s: np.float64(v),
    "equal float": lambda v, s: float(v),
    "tensor": lambda v, s: torch.tensor(v, device="cpu"),
    "negative": lambda v, s: -int(v) if v else -1,
    "zero": lambda v, s: 0,
    "one more": lambda v, s: int(v) + 1,
    "one fewer": lambda v, s: int(v) - 1,
    "text of it": lambda v, s: str(v),
}

SECONDS: dict[str, Callable[[Any, Scene], Any]] = {
    "a time": lambda v, s: s.random.choice(
        (0, 0.0, -1, -1.0, float("nan"), float("inf"), float("-inf"), 1e-9, 1e-6, 1e9, 1e10, 1e300, 2**70, "1", 5, 5.0)
    ),
    "numpy time": lambda v, s: np.float32(5),
}

SEQUENCES: dict[str, Callable[[Any, Scene], Any]] = {
    "as tuple": lambda v, s: tuple(v),
    "as list": lambda v, s: list(v),
    "as generator": lambda v, s: (part for part in v),
    "as iterator": lambda v, s: iter(list(v)),
    "with None": lambda v, s: [*v, None],
    "nested": lambda v, s: [list(v)],
    "reversed": lambda v, s: list(reversed(list(v))),
    "twice": lambda v, s: [*v, *v],
    "very many": lambda v, s: list(v) * 20,
    "first only": lambda v, s: list(v)[:1],
    "same part": lambda v, s: [next(iter(v))] * len(v),
}


def _replaced(handle: Any, scene: Scene) -> Any:
    """A named tuple with one other element; for other handles, a copy of the tuple."""
    if hasattr(handle, "_replace"):
        name = scene.random.choice(handle._fields)
        value = getattr(handle, name)
        other = hostile("tensor", value, scene) if isinstance(value, Tensor) else hostile("number", value, scene)
        return handle._replace(**{name: other})
    if isinstance(handle, tuple):
        return tuple(handle)
    raise NotApplicableError


HANDLES: dict[str, Callable[[Any, Scene], Any]] = {
    "another": lambda v, s: s.random.choice(s.handles) if s.handles else None,
    "another too": lambda v, s: s.random.choice(s.handles) if s.handles else None,
    "altered": _replaced,
    "its memory": lambda v, s: getattr(v, "memory", None),
}


def _part_of(value: Any, scene: Scene) -> Any:
    """A sequence with one hostile part."""
    parts = list(value)
    if not parts:
        raise NotApplicableError
    at = scene.random.randrange(len(parts))
    parts[at] = hostile("tensor", parts[at], scene)
    return parts


KINDS: dict[str, tuple[dict[str, Any], ...]] = {
    "tensor": (TENSORS, FLOATS),
    "ids": (TENSORS, IDS, IDS),
    "count": (TENSORS, COUNTS, COUNTS),
    "number": (NUMBERS,),
    "seconds": (SECONDS, NUMBERS),
    "sequence": (SEQUENCES, {f"hostile part {n}": _part_of for n in range(20)}),
    "handle": (HANDLES, HANDLES),
    "flag": (),
    "word": (),
}


def names(kind: str) -> list[str]:
    """Of all variants of a kind of argument."""
    return [*(name for pool in KINDS[kind] for name in pool), *(f"junk: {name}" for name in _JUNK)]


def make(kind: str, name: str, value: Any, scene: Scene) -> Any:
    """The variant of the value.

    Raises:
        NotApplicableError: there is none.
    """
    if name.startswith("junk: "):
        return _JUNK[name.removeprefix("junk: ")](scene)
    variant = next(pool[name] for pool in KINDS[kind] if name in pool)
    try:
        with torch.no_grad() if "autograd" not in name else torch.enable_grad():
            return variant(value, scene)
    except Exception as error:  # torch has no such tensor
        raise NotApplicableError from error


def hostile(kind: str, value: Any, scene: Scene) -> Any:
    """Any variant."""
    return make(kind, scene.random.choice(names(kind)), value, scene)
