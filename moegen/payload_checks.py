# SPDX-License-Identifier: Apache-2.0
"""What the arguments of `OneSided` must be, beyond `moegen.checks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moegen import admission, checks
from moegen.errors import CapacityError, HandleError, InputError, MissingKernelError
from moegen.kernels.a2a import MAX_PAYLOADS, MAX_STATS, ROW_DTYPES
from moegen.kernels.a2a_results import OUT_DTYPES
from moegen.kernels.ll import MAX_TOKENS_PER_RANK
from moegen.kernels.problem import Problem
from moegen.kernels.spec import MAX_ROW_BYTES, MAX_TOPK, Spec
from moegen.payloads import PayloadsHandle
from moegen.runtime.lifecycle import Lifecycle

if TYPE_CHECKING:
    from moegen.one_sided import OneSided

WORDS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "e4m3"}
"""dtypes of combine's rows, as kernels name them."""

_ROWS = tuple(dtype for dtype, word in WORDS.items() if word in ROW_DTYPES)
_OUTS = tuple(dtype for dtype, word in WORDS.items() if word in OUT_DTYPES)


def problem(
    num_ranks: int,
    *,
    num_experts: int,
    num_topk: int,
    hidden: int,
    max_tokens_per_rank: int,
    payload_bytes: int,
    dtype: torch.dtype,
    warp_groups: str | None,
    copy: str,
    path: str,
    on_host: bool,
) -> Problem:
    """The arguments that decide the kernels; what only the Spec can judge is judged there."""
    checks.one_of("dtype", dtype, _ROWS)
    num_topk = checks.in_range("num_topk", num_topk, 1, MAX_TOPK)
    max_tokens_per_rank = checks.in_range("max_tokens_per_rank", max_tokens_per_rank, 1, MAX_TOKENS_PER_RANK)
    checks.in_range("payload_bytes", payload_bytes, 1, MAX_PAYLOADS * MAX_ROW_BYTES)
    shape = (num_ranks, num_experts, num_topk, hidden, max_tokens_per_rank)
    return Problem(*shape, WORDS[dtype], "rank", path, on_host=on_host, copy=copy, warp_groups=warp_groups)


def copy(owner: OneSided, given: str) -> str:
    """Bulk copies are an instruction of newer GPUs; a CPU imitates them."""
    checks.one_of("copy", given, ("auto", "vec", "bulk"))
    if given == "bulk" and owner.device.type == "cuda":
        capability = torch.cuda.get_device_capability(owner.device)
        if capability < (9, 0):
            have = ".".join(map(str, capability))
            raise InputError(f'copy="bulk" needs compute capability 9.0, and {owner.device} has {have}; use "vec"')
    return given


def usual_out(dtype: torch.dtype) -> torch.dtype:
    """What combine makes of rows of that dtype, if nobody says."""
    return torch.bfloat16 if dtype == torch.float8_e4m3fn else dtype


def foreseen(given: Sequence[tuple[int, torch.dtype]]) -> tuple[int, ...]:
    """Bytes per token of payloads that are described as (columns, dtype)."""
    return tuple(checks.integer("the columns of payloads", columns) * dtype.itemsize for columns, dtype in given)


def slots(owner: OneSided, max_tokens: int | None) -> int:
    """Rows per source of a call."""
    most = owner.problem.max_tokens
    return most if max_tokens is None else checks.in_range("max_tokens", max_tokens, 1, most)


def room(owner: OneSided, widths: Sequence[int]) -> None:
    """`widths`: bytes per token of each payload."""
    if sum(widths) > owner.payload_bytes:
        raise CapacityError(
            f"these payloads have {sum(widths)} bytes per token, and this object was made for {owner.payload_bytes}; "
            f"make it with payload_bytes={sum(widths)}"
        )


def payloads(owner: OneSided, given: Sequence[torch.Tensor], slots: int) -> list[torch.Tensor]:
    """As the kernel reads them: contiguous, and at multiples of 16 bytes, copied if they are not."""
    if not isinstance(given, (list, tuple)) or not 1 <= len(given) <= MAX_PAYLOADS:
        raise InputError(f"payloads is a list of 1 to {MAX_PAYLOADS} tensors [tokens, columns]")
    moved = []
    for index, part in enumerate(given):
        name = f"payloads[{index}]"
        part = checks.require_tensor(owner, name, part, (part.dtype,) if isinstance(part, torch.Tensor) else ())
        moved.append(part)
        if part.dim() != 2 or part.shape[0] != given[0].shape[0] or part.shape[1] == 0:
            tokens = given[0].shape[0] if given[0].dim() else "a number of"
            raise InputError(f"{name} is [{tokens} tokens, 1 or more columns]; got {list(part.shape)}")
    tokens = given[0].shape[0]
    if tokens > slots:
        raise CapacityError(
            f"{tokens} tokens are more than max_tokens={slots}; give a larger one on all ranks (up to "
            f"max_tokens_per_rank={owner.problem.max_tokens}) or dispatch in parts"
        )
    room(owner, [part.shape[1] * part.element_size() for part in given])
    return [checks.readable(part) for part in moved]


def lie_elsewhere(
    shown: range,
    moved: Sequence[torch.Tensor],
    ids: torch.Tensor,
    num_tokens: torch.Tensor | None,
    stats: torch.Tensor | None,
) -> None:
    """Inputs of a dispatch, which others may write over as soon as it begins where they lie in its own results."""
    for index, part in enumerate(moved):
        if part.data_ptr() in shown:
            admission.refuse_received(f"payloads[{index}]")
    for name, tensor in (("topk_idx", ids), ("num_tokens", num_tokens), ("stats", stats)):
        if tensor is not None and tensor.data_ptr() in shown:
            admission.refuse_received(name)


def unused_ids(given: tuple[int, int] | None, moved: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    if given is None:
        return None
    if not isinstance(given, tuple) or len(given) != 2:
        raise InputError(f"unused_ids is (index of a payload, value); got {given!r}")
    index = checks.in_range("the index of unused_ids", given[0], 0, len(moved) - 1)
    value = checks.in_range("the value of unused_ids", given[1], -(2**31), 2**31 - 1)
    if moved[index].dtype != torch.int32:
        raise InputError(f"unused_ids is about a payload of int32 ids; payloads[{index}] is {moved[index].dtype}")
    return index, value


def stats(owner: OneSided, given: torch.Tensor | None) -> torch.Tensor | None:
    if given is None:
        return None
    given = checks.require_tensor(owner, "stats", given, (torch.int32,))
    if given.dim() != 1 or not 1 <= given.numel() <= MAX_STATS or not given.is_contiguous():
        raise InputError(f"stats is a contiguous [1..{MAX_STATS}]; got {list(given.shape)}")
    return given


def active(owner: OneSided, given: int | None) -> int:
    """A bit for every rank that takes part."""
    everyone = owner.problem.every_rank
    if given is None:
        return everyone
    given = checks.in_range("active_ranks", given, 1, everyone)
    if not given >> owner.rank & 1:
        raise InputError(f"active_ranks={given:#x} leaves out rank {owner.rank}, which makes this call")
    if owner.problem.path == "collective" and given != everyone:
        raise InputError("on path collective all ranks take part in every call; leave active_ranks out")
    return given


def exact(owner: OneSided, wanted: bool) -> bool:
    """Whether a dispatch exchanges counts first, if the object wants that: not while a stream captures."""
    if not wanted or owner.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return wanted
    if owner.exchange == "exact":
        raise InputError(
            'exchange="exact" waits for the host and cannot be captured; make the object with "padded" or "auto"'
        )
    return False


def everyone_loads(owner: OneSided, spec: Spec, active: int) -> None:
    """A kernel is loaded by all ranks together, and those that are left out make no calls."""
    if active != owner.problem.every_rank:
        raise MissingKernelError(
            f"{spec.stem} is not loaded, and active_ranks leaves out ranks that would have to load it, too: make "
            "such a call once with all ranks before"
        )


def handle(owner: OneSided, given: PayloadsHandle) -> None:
    if not isinstance(given, PayloadsHandle):
        raise HandleError(
            f"combine takes the handle of a dispatch (DispatchedPayloads.handle); got {type(given).__name__}"
        )
    if given.owner is not owner:
        gone = isinstance(given.owner, Lifecycle) and given.owner.destroyed
        raise HandleError(
            "the OneSided that made this handle was destroyed; dispatch again"
            if gone
            else "this handle comes from another OneSided; give it to that one's combine"
        )
    admission.require_kept(checks.HANDLE_MEMORY, given.memory)


def outputs(owner: OneSided, y: torch.Tensor, slots: int) -> torch.Tensor:
    y = checks.require_tensor(owner, "y", y, _ROWS)
    checks.require_shape("y", y, (owner.num_ranks, slots, owner.problem.hidden))
    if y.shape[2] * y.element_size() > owner.combine_bytes:
        raise CapacityError(
            f"rows of {y.dtype} have {y.shape[2] * y.element_size()} bytes, and this object was made for "
            f"{owner.combine_bytes}; make it with dtype={y.dtype}"
        )
    return checks.readable(y)


def combined_apart(
    outputs: Sequence[admission.Named],
    buffer: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor | None,
    given: PayloadsHandle,
) -> None:
    """What a combine was given to write into."""
    if outputs:
        inputs = (("y", y), ("output_scale", scale), (checks.HANDLE_MEMORY, given.memory))
        admission.apart(outputs, inputs, taken=(admission.span(admission.RECEIVE_BUFFER, buffer),))


def expert_rows(owner: OneSided, has_them: bool, dtype: torch.dtype | None) -> None:
    if not has_them:
        raise InputError("this object has no room for experts' rows; make it with expert_rows=True")
    if dtype is not None:
        checks.one_of("dtype", dtype, _ROWS)
        if owner.problem.hidden * dtype.itemsize > owner.combine_bytes:
            raise InputError(
                f"rows of {dtype} are longer than those of {owner.dtype}; make the object with dtype={dtype}"
            )


def out_dtype(
    owner: OneSided,
    rows: torch.dtype,
    given: torch.dtype | None,
    out: torch.Tensor | None,
    shape: tuple[int, int],
) -> torch.dtype:
    """What combine's result is made of: said, that of the given tensor, or the usual."""
    if out is not None:
        checks.require_output(owner, "out", out, _OUTS if given is None else (given,))
        checks.require_shape("out", out, shape)
        checks.require_writable("out", out)
        return out.dtype
    if given is None:
        return usual_out(rows)
    checks.one_of("out_dtype", given, _OUTS)
    return given
