# SPDX-License-Identifier: Apache-2.0
"""What a call's arguments must be: each check says what was given, what is allowed and what to do."""

from __future__ import annotations

from numbers import Real
from typing import Protocol

import numpy as np
import torch

from moegen.base import admission
from moegen.codegen.integers import as_int
from moegen.codegen.problem import Problem
from moegen.errors import CapacityError, InputError
from moegen.limits import MAX_SMS, VECTOR_BYTES


class Placed(Protocol):
    """Of an object, what a tensor needs: shapes, and where it is."""

    problem: Problem
    device: torch.device


class Owner(Placed, Protocol):
    """Of an object, what the arguments of its calls need."""

    dtype: torch.dtype

    @property
    def num_ranks(self) -> int: ...

    @property
    def local_experts(self) -> range: ...


HANDLE_MEMORY = "the memory of the handle"


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is one of {', '.join(map(str, allowed))}; got {value!r}")


def in_range(name: str, value: object, low: int, high: int) -> int:
    """The value as Python's own integer."""
    number = as_int(value)
    if number is None or not low <= number <= high:
        raise InputError(f"{name} is an integer in {low}..{high}; got {value!r}")
    return number


def integer(name: str, value: object) -> int:
    """The same, of whatever size."""
    number = as_int(value)
    if number is None:
        raise InputError(f"{name} must be an integer; got {value!r}")
    return number


def flag(name: str, value: object) -> bool:
    """The value as Python's own bool, for a kernel's arguments."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def num_sms(value: object) -> int | None:
    """Thread blocks; None: nothing was said."""
    return None if value is None else in_range("num_sms", value, 1, MAX_SMS)


def seconds(name: str, value: float) -> None:
    """From a microsecond to thirty years: kernels count nanoseconds in 64 bits."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 1e-6 <= value <= 1e9:
        raise InputError(f"{name} is a number of seconds in 1e-6..1e9; got {value!r}")


def seconds_of_call(timeout: float | None) -> None:
    """In place of the object's; most calls say nothing of it."""
    if timeout is not None:
        seconds("timeout", timeout)


def tokens(owner: Owner, x: torch.Tensor) -> torch.Tensor:
    problem = owner.problem
    x = require_tensor(owner, "x", x, (owner.dtype,))
    if x.dim() != 2 or x.shape[1] != problem.hidden:
        raise InputError(f"x is [tokens, {problem.hidden}]; got {list(x.shape)}")
    if x.shape[0] > problem.max_tokens:
        raise CapacityError(
            f"{x.shape[0]} tokens are more than this object was made for; make it with "
            f"max_tokens_per_rank={x.shape[0]} (now {problem.max_tokens}) or dispatch in parts"
        )
    rows_fit = x.stride(1) == 1 and x.stride(0) >= problem.hidden and x.stride(0) * x.element_size() % VECTOR_BYTES == 0
    if x.shape[0] <= 1 or not rows_fit:
        x = x.contiguous()
    return x if x.data_ptr() % VECTOR_BYTES == 0 else x.clone()


def topk_idx(owner: Placed, ids: torch.Tensor, num_tokens: int, used: torch.Tensor | None) -> torch.Tensor:
    problem = owner.problem
    ids = require_tensor(owner, "topk_idx", ids, (torch.int64, torch.int32))
    require_shape("topk_idx", ids, (num_tokens, problem.num_topk))
    seen = ids if used is None or ids.device.type != "cpu" else ids[: max(0, int(used))]
    if seen.device.type == "cpu" and seen.numel():
        low, high = (int(bound) for bound in torch.aminmax(seen))
        if low < -1 or high >= problem.num_experts:
            raise InputError(
                f"expert ids are 0..{problem.num_experts - 1}, or -1 for no selection; topk_idx holds {low}..{high}"
            )
    return ids.contiguous()


def topk_weights(owner: Owner, weights: torch.Tensor | None, num_tokens: int) -> torch.Tensor | None:
    if weights is None:
        return None
    weights = require_tensor(owner, "topk_weights", weights, (torch.float32,))
    require_shape("topk_weights", weights, (num_tokens, owner.problem.num_topk))
    return weights.contiguous()


def num_tokens(owner: Placed, count: torch.Tensor | None) -> torch.Tensor | None:
    if count is not None:
        count = require_tensor(owner, "num_tokens", count, (torch.int32,))
        if count.numel() != 1:
            raise InputError(f"num_tokens is one int32 on the device; got {list(count.shape)}")
    return count


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """What a kernel reads by 16 bytes: the tensor itself, or a copy of it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % VECTOR_BYTES == 0 else tensor.clone()


def require_writable(name: str, tensor: torch.Tensor) -> None:
    """What a kernel writes by 16 bytes."""
    if not tensor.is_contiguous() or tensor.data_ptr() % VECTOR_BYTES != 0:
        raise InputError(f"{name} is contiguous and {VECTOR_BYTES}-byte aligned; got strides {tensor.stride()}")


def total_counts(owner: Owner, totals: torch.Tensor | None) -> None:
    if totals is not None:
        numbers(owner, "total_counts", totals, (len(owner.local_experts),))


def require_tensor(owner: Placed, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> torch.Tensor:
    """What a call reads: the tensor, or a copy whose memory holds its values."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name} is a torch tensor; got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise InputError(f"{name} is {' or '.join(map(str, dtypes))}; got {tensor.dtype}")
    if tensor.device != owner.device:
        raise InputError(f"{name} is on {tensor.device} and this object on {owner.device}")
    return admission.read(name, tensor)


def require_output(owner: Placed, name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """What a call writes."""
    if require_tensor(owner, name, tensor, dtypes) is not tensor:
        admission.refuse_lazy(name)


def numbers(
    owner: Owner, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.int32
) -> None:
    """A tensor of numbers that a kernel writes."""
    require_output(owner, name, tensor, (dtype,))
    require_shape(name, tensor, shape)
    if not tensor.is_contiguous():
        raise InputError(f"{name} is contiguous; got strides {tensor.stride()}")


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} is {list(shape)}; got {list(tensor.shape)}")
