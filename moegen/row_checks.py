# SPDX-License-Identifier: Apache-2.0
"""What the arguments of `HighThroughput` must be, beyond `moegen.checks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moegen import admission, checks
from moegen.errors import CapacityError, HandleError, InputError
from moegen.kernels.ht import FORMATS, LAYOUTS
from moegen.kernels.ll import MAX_TOKENS_PER_RANK, QUANTIZED
from moegen.kernels.problem import Problem
from moegen.rows import Given, RowsHandle

if TYPE_CHECKING:
    from moegen.row_calls import RowCalls

_GIVEN_SCALES = {torch.float32: "e4m3", torch.int32: "e4m3ue8m0"}
"""Dtype of the scales of given FP8 tokens -> how they travel."""

MAX_BIASES = 2
MAX_ROWS = 2**31 - 1
MODES = ("capacity", "exact")


def problem(
    num_ranks: int,
    *,
    num_experts: int,
    num_topk: int,
    hidden: int,
    max_tokens_per_rank: int,
    layout: str,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    quantize: str | None,
    borrow: bool,
    on_host: bool,
    path: str = "ipc",
) -> Problem:
    """The arguments that decide the kernels; what only the Spec can judge is judged there."""
    checks.one_of("layout", layout, LAYOUTS)
    checks.one_of("dtype", dtype, (torch.bfloat16, torch.float8_e4m3fn))
    checks.one_of("quantize", quantize, (None, *QUANTIZED))
    checks.one_of("scale_dtype", scale_dtype, tuple(_GIVEN_SCALES))
    max_tokens_per_rank = checks.in_range("max_tokens_per_rank", max_tokens_per_rank, 1, MAX_TOKENS_PER_RANK)
    word = "bf16" if quantize is None else QUANTIZED[quantize]
    if dtype == torch.float8_e4m3fn:
        if quantize is not None:
            raise InputError("tokens of dtype float8_e4m3fn are quantised already; leave quantize out")
        word = _GIVEN_SCALES[scale_dtype]
    if borrow and layout != "token":
        raise InputError("rows of layout packed lie nowhere but where they go; borrow is for layout token")
    if borrow and path == "collective":
        raise InputError("on path collective rows come in chunks and lie nowhere by themselves; leave borrow out")
    shape = (num_ranks, num_experts, num_topk, hidden, max_tokens_per_rank)
    return Problem(*shape, word, layout, path, on_host=on_host, borrowed=borrow)


def mode(owner: RowCalls, of_call: str | None) -> str:
    """The call's, or the object's."""
    if of_call is None:
        return owner.mode
    checks.one_of("mode", of_call, MODES)
    return of_call


def borrowed(owner: RowCalls, exact: bool, *made: object) -> None:
    """What a dispatch that returns views of the receive buffer cannot have."""
    if owner.problem.borrowed and (exact or any(value is not None and value is not False for value in made)):
        raise InputError(
            'this object was made with borrow=True: its rows are where they came, so that mode "exact", max_rows, out, '
            "zero_unused and scales_by_column have no meaning"
        )


def launch(num_sms: int | None, timeout: float | None) -> int | None:
    """How a call is launched and waits; most say nothing of it. Thread blocks, as Python's own integer."""
    checks.seconds_of_call(timeout)
    return checks.num_sms(num_sms)


def fitting(
    owner: RowCalls, x: torch.Tensor | Given, ids: torch.Tensor | None, weights: torch.Tensor | None
) -> tuple[int, torch.Tensor | Given, torch.Tensor | None, torch.Tensor | None]:
    """In mode "exact" a rank with too many tokens sends none and says how many it has, so that no rank waits in vain:
    that number (0 if they fit), and what is sent.
    """
    number = len(x[0] if isinstance(x, tuple) else x)
    if number <= owner.problem.max_tokens:
        return 0, x, ids, weights
    nothing = (x[0][:0], x[1][:0]) if isinstance(x, tuple) else x[:0]
    return number, nothing, None if ids is None else ids[:0], None if weights is None else weights[:0]


def all_fit(owner: RowCalls, tokens: Sequence[int]) -> None:
    """The tokens of every rank, as every rank was told."""
    most = max(tokens)
    if most > owner.problem.max_tokens:
        error = CapacityError(
            f"rank {tokens.index(most)} has {most} tokens, more than these objects were made for; make them with "
            f"max_tokens_per_rank={most} (now {owner.problem.max_tokens}) or dispatch in parts"
        )
        error.tokens_needed = most
        raise error


def given_tokens(owner: RowCalls, x: torch.Tensor | Given) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens and, if the caller quantised them, their scales."""
    form = FORMATS[owner.problem.dtype]
    if not form.given:
        if isinstance(x, tuple):
            raise InputError(
                "this object takes bfloat16 tokens; make it with dtype=torch.float8_e4m3fn for (x, scales)"
            )
        return checks.tokens(owner, x), None
    if not isinstance(x, tuple) or len(x) != 2:
        raise InputError("this object was made for FP8 tokens: x is (tokens, scales)")
    data, scales = x
    data = checks.tokens(owner, data)
    words = owner.selection.dispatch.scale_words
    scales = checks.require_tensor(owner, "scales", scales, (owner.scale_dtype,))
    checks.require_shape("scales", scales, (data.shape[0], words))
    return data, scales.contiguous()


def same_routing(
    owner: RowCalls,
    given: RowsHandle,
    num_tokens: int,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    counted: torch.Tensor | None,
    totals: torch.Tensor | None,
    max_rows: int | None,
) -> None:
    """A dispatch by a handle takes nothing that the handle says already."""
    handle(owner, given)
    others = {"topk_idx": topk_idx, "topk_weights": topk_weights, "num_tokens": counted, "total_counts": totals}
    for name, value in (others | {"max_rows": max_rows}).items():
        if value is not None:
            raise InputError(f"dispatch takes a handle or {name}, not both: the handle has its routing")
    if num_tokens != given.num_tokens:
        raise InputError(f"the handle is of {given.num_tokens} tokens; got {num_tokens}")


def handle(owner: RowCalls, given: RowsHandle) -> None:
    if not isinstance(given, RowsHandle):
        raise HandleError(f"this object takes the handle of its dispatch; got {type(given).__name__}")
    if given.owner is not owner:
        raise HandleError("this handle comes from another object; give it to that one")
    admission.require_kept(checks.HANDLE_MEMORY, given.memory)


def handle_memory(owner: RowCalls, memory: torch.Tensor, words: int) -> torch.Tensor:
    """As kernels read it: where it lies, or a copy."""
    if memory.dtype != torch.int32 or memory.device != owner.device or memory.shape != (words,):
        raise HandleError(
            f"a handle of this object has {words} words int32 on {owner.device}; this is another's memory: "
            f"{memory.dtype} {list(memory.shape)} on {memory.device}"
        )
    return checks.readable(admission.read(checks.HANDLE_MEMORY, memory))


def exact(owner: RowCalls, max_rows: int | None, *outs: torch.Tensor | None) -> None:
    """In mode "exact" nobody knows beforehand how many rows come."""
    if max_rows is not None or any(out is not None for out in outs):
        raise InputError('mode "exact" makes its own results; max_rows and out are for mode "capacity"')
    if owner.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InputError('mode "exact" waits for the host and cannot be captured; make the object with mode="capacity"')


def room(owner: RowCalls, max_rows: int | None, capacity: int, out: torch.Tensor | None) -> int:
    """Rows of the result."""
    if max_rows is not None:
        max_rows = checks.in_range("max_rows", max_rows, 0, MAX_ROWS)
        if out is not None and out.shape[0] != max_rows:
            raise InputError(f"out has {out.shape[0]} rows and max_rows is {max_rows}; give one of them")
        return max_rows
    return capacity if out is None else out.shape[0]


def rows_out(owner: RowCalls, out: torch.Tensor | None, scales: torch.Tensor | None, rows: int) -> None:
    memory = owner.row_memory
    if out is not None:
        checks.require_output(owner, "out", out, (memory.dtype,))
        checks.require_shape("out", out, (rows, owner.problem.hidden))
        checks.require_writable("out", out)
    if scales is not None:
        words = owner.selection.dispatch.scale_words
        if words == 0:
            raise InputError("this object sends tokens as they are: there are no scales")
        checks.require_output(owner, "out_scales", scales, (memory.scales_dtype,))
        checks.require_shape("out_scales", scales, (rows, words))
        admission.require_apart_within("out_scales", scales)


def lie_elsewhere(owner: RowCalls, buffer: torch.Tensor, data: torch.Tensor, scales: torch.Tensor | None) -> None:
    """Tokens of a dispatch that returns views of its receive buffer, where others write during the next one."""
    first, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    for name, tensor in (("x", data), ("scales", scales)):
        if tensor is not None and first <= tensor.data_ptr() < end:
            admission.refuse_received(name)


def outputs(owner: RowCalls, y: torch.Tensor, rows: int) -> torch.Tensor:
    y = checks.require_tensor(owner, "y", y, (torch.bfloat16,))
    checks.require_shape("y", y, (rows, owner.problem.hidden))
    return checks.readable(y)


def weights(owner: RowCalls, given: torch.Tensor | None, handle: RowsHandle) -> torch.Tensor | None:
    """One for each row that came and each of its selections."""
    if given is None:
        return None
    given = checks.require_tensor(owner, "topk_weights", given, (torch.float32,))
    if owner.problem.layout == "token":
        checks.require_shape("topk_weights", given, (handle.rows, owner.problem.num_topk))
        return given.contiguous()
    checks.require_shape("topk_weights", given, (handle.rows,))
    slots = handle.numbers.part("row_slots").view(-1, owner.problem.num_topk)
    if handle.rows == 0:
        return torch.zeros(slots.shape, dtype=torch.float32, device=owner.device)
    at = slots.clamp(0, handle.rows - 1)  # rows that nothing came for have no slots: what stands there is not read
    return given[at].masked_fill_(slots < 0, 0)


def biases(owner: RowCalls, given: torch.Tensor | Sequence[torch.Tensor], shape: tuple[int, ...]) -> list[torch.Tensor]:
    several = [given] if isinstance(given, torch.Tensor) else list(given)
    if len(several) > MAX_BIASES:
        raise InputError(f"at most {MAX_BIASES} biases; got {len(several)}")
    several = [checks.require_tensor(owner, "bias", bias, (torch.bfloat16,)) for bias in several]
    for bias in several:
        checks.require_shape("bias", bias, shape)
    return [checks.readable(bias) for bias in several]


def combined_out(owner: RowCalls, out: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if out is not None:
        checks.require_output(owner, "out", out, (torch.bfloat16,))
        checks.require_shape("out", out, shape)
        checks.require_writable("out", out)


def combined_apart(
    out: torch.Tensor,
    buffer: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor | None,
    biases: Sequence[torch.Tensor],
    given: RowsHandle,
) -> None:
    """What a combine writes. Element for element over a bias it may: each is read just before it is written."""
    others = [("bias", bias) for bias in biases if not admission.is_same(bias, out)]
    inputs = [("y", y), ("topk_weights", weights), *others, (checks.HANDLE_MEMORY, given.memory)]
    admission.apart([("out", out)], inputs, taken=[admission.span(admission.RECEIVE_BUFFER, buffer)])
