# SPDX-License-Identifier: Apache-2.0
"""States of torch in which the fuzz makes its calls: of a thread around each call, of the process around a case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _WatchingFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _saved_on_meta() -> Any:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


OF_CALL: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no grad": torch.no_grad,
    "meta device": lambda: torch.device("meta"),
    "fake": FakeTensorMode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "watching": _Watching,
    "watching functions": _WatchingFunctions,
    "saved hooks": _saved_on_meta,
}
OF_CASE: dict[str, Callable[[], Any]] = {
    "float64": lambda: _default_dtype(torch.float64),
    "bfloat16": lambda: _default_dtype(torch.bfloat16),
    "deterministic": _deterministic,
    "dual": forward_ad.dual_level,  # of the whole process
}
NAMES = ("none", *OF_CALL, *OF_CASE)


def around_call(name: str) -> Any:
    return OF_CALL.get(name, nullcontext)()


def around_case(name: str) -> Any:
    return OF_CASE.get(name, nullcontext)()
