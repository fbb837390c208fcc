# SPDX-License-Identifier: Apache-2.0
"""What a call's arguments must be: each check says what was given, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np
import torch

from moegen import admission
from moegen.errors import CapacityError, HandleError, InputError
from moegen.handle import Dispatched, GivenNumbers, Handle, NumbersLayout
from moegen.kernels.integers import as_int
from moegen.kernels.ll import MAX_TOKENS_PER_RANK, QUANTIZED, LowLatencyDispatch
from moegen.kernels.problem import Problem

if TYPE_CHECKING:
    from typing import Protocol, TypeAlias

    from moegen.expert_parallel import ExpertParallel
    from moegen.row_calls import RowCalls

    Owner: TypeAlias = ExpertParallel | RowCalls

    class Placed(Protocol):
        """Of an Owner, what a tensor needs: shapes, and where it is."""

        problem: Problem
        device: torch.device


MAX_SMS = 1024
"""Thread blocks per launch that a caller may ask for."""

HANDLE_MEMORY = "the memory of the handle"
_ROW_ALIGNMENT = 16
_DTYPES = {torch.bfloat16: "bf16"}
MAX_SLOTS = 16


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


def problem(
    num_ranks: int,
    *,
    num_experts: int,
    num_topk: int,
    hidden: int,
    max_tokens_per_rank: int,
    dtype: torch.dtype,
    layout: str,
    quantize: str | None,
    slots: int,
    wire: str,
    warp_groups: str | None,
    on_host: bool,
    masked: bool,
    path: str = "ipc",
) -> Problem:
    """The arguments of `ExpertParallel` that decide its kernels; what only the Spec can judge is judged there."""
    one_of("layout", layout, ("expert",))
    one_of("wire", wire, ("auto", *LowLatencyDispatch.words("wire")))
    one_of("dtype", dtype, tuple(_DTYPES))
    one_of("quantize", quantize, (None, *QUANTIZED))
    if path == "collective" and (masked or wire != "auto" or warp_groups is not None):
        raise InputError(
            "path collective has no active_ranks, wire and warp_groups: leave them out, or give path='ipc' where the "
            "ranks can map each other's memory"
        )
    max_tokens = in_range("max_tokens_per_rank", max_tokens_per_rank, 1, MAX_TOKENS_PER_RANK)
    return Problem(
        num_ranks=num_ranks,
        num_experts=num_experts,
        num_topk=num_topk,
        hidden=hidden,
        max_tokens=max_tokens,
        dtype=_DTYPES[dtype] if quantize is None else QUANTIZED[quantize],
        layout=layout,
        path=path,
        on_host=on_host,
        hooks=slots > 1,
        masked=masked,
        wire=wire,
        warp_groups=warp_groups,
    )


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
    rows_fit = (
        x.stride(1) == 1 and x.stride(0) >= problem.hidden and x.stride(0) * x.element_size() % _ROW_ALIGNMENT == 0
    )
    if x.shape[0] <= 1 or not rows_fit:
        x = x.contiguous()
    return x if x.data_ptr() % _ROW_ALIGNMENT == 0 else x.clone()


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


def expert_outputs(owner: ExpertParallel, y: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    y = require_tensor(owner, "y", y, (owner.dtype,))
    require_shape("y", y, shape)
    return readable(y)


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """What a kernel reads by 16 bytes: the tensor itself, or a copy of it."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ROW_ALIGNMENT == 0 else tensor.clone()


def out(owner: ExpertParallel, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor is None:
        return
    require_output(owner, "out", tensor, (dtype,))
    require_shape("out", tensor, shape)
    require_writable("out", tensor)


def require_writable(name: str, tensor: torch.Tensor) -> None:
    """What a kernel writes by 16 bytes."""
    if not tensor.is_contiguous() or tensor.data_ptr() % _ROW_ALIGNMENT != 0:
        raise InputError(f"{name} is contiguous and {_ROW_ALIGNMENT}-byte aligned; got strides {tensor.stride()}")


def reused(owner: ExpertParallel, given: Dispatched) -> None:
    if given.handle.owner is not owner:
        raise HandleError("out is the result of another ExpertParallel; give one of this object's, or its allocate()'s")
    for name, tensor in zip(_RESULTS, given.allocations, strict=True):
        # What they are was looked at when they were made or given; what may have become of them is looked at again.
        if tensor is not None and (
            tensor.requires_grad or tensor.storage_offset() or tensor.untyped_storage().nbytes() < tensor.nbytes
        ):
            admission.written(name, tensor)


def outputs(
    owner: ExpertParallel,
    out: torch.Tensor | Dispatched | None,
    totals: torch.Tensor | None,
    waited: torch.Tensor | None,
    inputs: Sequence[admission.Named],
) -> Sequence[torch.Tensor]:
    """What a call was given to write into, which shares no memory with what it reads, nor with what calls need whose
    hooks are open.
    """
    if out is None and totals is None and waited is None:
        return ()
    held = owner._alive().held
    others = (("total_counts", totals), ("waited_ns", waited))
    inputs = (*inputs, ("active_ranks", owner._active))
    if not isinstance(out, Dispatched):
        admission.apart((("out", out), *others), inputs, taken=held)
        return [tensor for tensor in (out, totals, waited) if tensor is not None]
    if not out.spans:
        out.spans.extend(admission.apart(zip(_RESULTS, out.allocations, strict=True), ()))
    if held:
        admission.apart(zip(_RESULTS, out.allocations, strict=True), (), taken=held)
    admission.apart(others, inputs, out.spans, held)
    return [tensor for tensor in (*out.allocations, totals, waited) if tensor is not None]


_RESULTS = ("out.tokens", "out.scales", "the memory of out", "out.counts", "out.ranges", "out.row_tokens")
"""Of `Dispatched.allocations`."""


def given_numbers(
    owner: ExpertParallel,
    layout: NumbersLayout,
    counts: torch.Tensor | None,
    ranges: torch.Tensor | None,
    row_tokens: torch.Tensor | None,
) -> GivenNumbers:
    experts = layout.local_experts
    shapes = {"counts": (experts,), "ranges": (experts, layout.ranks, 2), "row_tokens": (experts, layout.rows)}
    for (name, shape), tensor in zip(shapes.items(), (counts, ranges, row_tokens), strict=True):
        if tensor is not None:
            _numbers(owner, name, tensor, shape)
    return GivenNumbers(counts, ranges, row_tokens)


def scales(
    owner: ExpertParallel, tensor: torch.Tensor | None, storage: tuple[int, int, int] | None, dtype: torch.dtype
) -> None:
    """`storage`: their shape as they lie in memory, with the last two dimensions exchanged; None if there are none."""
    if tensor is None:
        return
    if storage is None:
        raise InputError("this object sends tokens as they are: there are no scales; make it with quantize='fp8'")
    require_output(owner, "scales", tensor, (dtype,))
    require_shape("scales", tensor, (storage[0], storage[2], storage[1]))
    if not tensor.transpose(1, 2).is_contiguous():
        raise InputError(f"the rows of scales lie side by side (stride 1); got strides {tensor.stride()}")


def total_counts(owner: Owner, totals: torch.Tensor | None) -> None:
    if totals is not None:
        _numbers(owner, "total_counts", totals, (len(owner.local_experts),))


def active_ranks(owner: ExpertParallel, given: bool | torch.Tensor) -> torch.Tensor | None:
    """The mask to use: a new one in which all ranks are active, the given one, or none."""
    if given is False:
        return None
    if given is True:
        return torch.ones(owner.num_ranks, dtype=torch.int32, device=owner.device)
    _numbers(owner, "active_ranks", given, (owner.num_ranks,))
    return given


def waiting(
    owner: ExpertParallel, timeout: float | None, waited_ns: torch.Tensor | None, renormalize: bool = False
) -> None:
    """How a call waits; most say nothing of it."""
    if owner._active is not None:
        admission.require_kept("active_ranks", owner._active)
    seconds_of_call(timeout)
    if (waited_ns is not None or renormalize) and not owner.problem.masked:
        name = "renormalize" if waited_ns is None else "waited_ns"
        raise InputError(f"this object's kernels have no {name}; make it with active_ranks=True")
    if waited_ns is not None:
        _numbers(owner, "waited_ns", waited_ns, (owner.num_ranks,), torch.int64)


def handle(owner: ExpertParallel, given: Handle) -> None:
    if not isinstance(given, Handle):
        raise HandleError(f"combine takes the handle of a dispatch (Dispatched.handle); got {type(given).__name__}")
    if given.owner is not owner:
        raise HandleError("this handle comes from another ExpertParallel; give it to that one's combine")
    if given.num_tokens < 0:
        raise HandleError("nothing was dispatched into this memory; take the handle of what dispatch returned")
    if given.replaced:
        raise HandleError(
            "a later dispatch wrote its results over those of this handle, which were given to it as out; take the "
            "handle of what that dispatch returned, or give each dispatch results of its own"
        )
    admission.require_kept(HANDLE_MEMORY, given.memory)


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


def _numbers(
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
