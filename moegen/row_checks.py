# SPDX-License-Identifier: Apache-2.0
"""What the arguments of `HighThroughput` must be, beyond `moegen.checks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moegen import checks
from moegen.errors import HandleError, InputError
from moegen.kernels.ht import FORMATS, LAYOUTS
from moegen.kernels.ll import MAX_TOKENS_PER_RANK, QUANTIZED
from moegen.kernels.problem import Problem
from moegen.rows import RowsHandle

if TYPE_CHECKING:
    from moegen.high_throughput import Given, HighThroughput

_GIVEN_SCALES = {torch.float32: "e4m3", torch.int32: "e4m3ue8m0"}
"""Dtype of the scales of given FP8 tokens -> how they travel."""

MAX_BIASES = 2


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
    on_host: bool,
) -> Problem:
    """The arguments that decide the kernels; what only the Spec can judge is judged there."""
    checks.one_of("layout", layout, LAYOUTS)
    checks.one_of("dtype", dtype, (torch.bfloat16, torch.float8_e4m3fn))
    checks.one_of("quantize", quantize, (None, *QUANTIZED))
    checks.one_of("scale_dtype", scale_dtype, tuple(_GIVEN_SCALES))
    checks.in_range("max_tokens_per_rank", max_tokens_per_rank, 1, MAX_TOKENS_PER_RANK)
    word = "bf16" if quantize is None else QUANTIZED[quantize]
    if dtype == torch.float8_e4m3fn:
        if quantize is not None:
            raise InputError("tokens of dtype float8_e4m3fn are quantised already; leave quantize out")
        word = _GIVEN_SCALES[scale_dtype]
    return Problem(num_ranks, num_experts, num_topk, hidden, max_tokens_per_rank, word, layout, on_host=on_host)


def given_tokens(owner: HighThroughput, x: torch.Tensor | Given) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    checks.require_tensor(owner, "scales", scales, (owner.scale_dtype,))
    checks.require_shape("scales", scales, (data.shape[0], words))
    return data, scales.contiguous()


def same_routing(
    owner: HighThroughput,
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


def handle(owner: HighThroughput, given: RowsHandle) -> None:
    if not isinstance(given, RowsHandle):
        raise HandleError(f"this object takes the handle of its dispatch; got {type(given).__name__}")
    if given.owner is not owner:
        raise HandleError("this handle comes from another object; give it to that one")


def handle_memory(owner: HighThroughput, memory: torch.Tensor, words: int) -> None:
    fits = memory.dtype == torch.int32 and memory.device == owner.device and memory.shape == (words,)
    if not fits or not memory.is_contiguous() or memory.data_ptr() % 8 != 0:
        raise HandleError(
            f"a handle of this object has {words} words int32 on {owner.device}; this is another's memory"
        )


def exact(owner: HighThroughput, max_rows: int | None, *outs: torch.Tensor | None) -> None:
    """In mode "exact" nobody knows beforehand how many rows come."""
    if max_rows is not None or any(out is not None for out in outs):
        raise InputError('mode "exact" makes its own results; max_rows and out are for mode "capacity"')
    if owner.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise InputError('mode "exact" waits for the host and cannot be captured; make the object with mode="capacity"')


def room(owner: HighThroughput, max_rows: int | None, capacity: int, out: torch.Tensor | None) -> int:
    """Rows of the result."""
    if max_rows is not None:
        checks.in_range("max_rows", max_rows, 0, 2**31 - 1)
        if out is not None and out.shape[0] != max_rows:
            raise InputError(f"out has {out.shape[0]} rows and max_rows is {max_rows}; give one of them")
        return max_rows
    return capacity if out is None else out.shape[0]


def rows_out(owner: HighThroughput, out: torch.Tensor | None, scales: torch.Tensor | None, rows: int) -> None:
    memory = owner.row_memory
    if out is not None:
        checks.require_tensor(owner, "out", out, (memory.dtype,))
        checks.require_shape("out", out, (rows, owner.problem.hidden))
        checks.require_writable("out", out)
    if scales is not None:
        words = owner.selection.dispatch.scale_words
        if words == 0:
            raise InputError("this object sends tokens as they are: there are no scales")
        checks.require_tensor(owner, "out_scales", scales, (memory.scales_dtype,))
        checks.require_shape("out_scales", scales, (rows, words))


def outputs(owner: HighThroughput, y: torch.Tensor, rows: int) -> torch.Tensor:
    checks.require_tensor(owner, "y", y, (torch.bfloat16,))
    checks.require_shape("y", y, (rows, owner.problem.hidden))
    return checks.readable(y)


def weights(owner: HighThroughput, given: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    if given is None:
        return None
    if owner.problem.layout == "packed":
        rows = owner.problem.num_ranks * owner.problem.max_tokens
    checks.require_tensor(owner, "topk_weights", given, (torch.float32,))
    checks.require_shape("topk_weights", given, (rows, owner.problem.num_topk))
    return given.contiguous()


def biases(
    owner: HighThroughput, given: torch.Tensor | Sequence[torch.Tensor], shape: tuple[int, ...]
) -> list[torch.Tensor]:
    several = [given] if isinstance(given, torch.Tensor) else list(given)
    if len(several) > MAX_BIASES:
        raise InputError(f"at most {MAX_BIASES} biases; got {len(several)}")
    for bias in several:
        checks.require_tensor(owner, "bias", bias, (torch.bfloat16,))
        checks.require_shape("bias", bias, shape)
    return [checks.readable(bias) for bias in several]


def combined_out(owner: HighThroughput, out: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if out is not None:
        checks.require_tensor(owner, "out", out, (torch.bfloat16,))
        checks.require_shape("out", out, shape)
        checks.require_writable("out", out)
