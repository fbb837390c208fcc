# SPDX-License-Identifier: Apache-2.0
"""What combine of `OneSided` makes of its sums: what the arguments that say so must be, and memory for the results."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moegen.base import arguments
from moegen.errors import InputError
from moegen.formats import RESULTS, SCALE_LAYOUTS, Format
from moegen.one_sided import checks
from moegen.one_sided.results import Quantised

_QUANTIZED = {(form.quantize, form.scales.layout): form for form in RESULTS.values() if form.quantized_here}
_WORDS = tuple(dict.fromkeys(quantize for quantize, _ in _QUANTIZED))
"""Users' words."""


class Destination(NamedTuple):
    """Where results go.

    Attributes:
        word: what they are, in `moegen.formats.RESULTS`.
        made: what combine returns.
        addresses: of the kernel's `out` and of `Result.params`, in order; 0 for null.
        output_scale: as the kernel reads it.
        given: what of `made` is the caller's.
    """

    word: str
    made: torch.Tensor | Quantised
    addresses: tuple[int, ...]
    output_scale: torch.Tensor | None = None
    given: tuple[tuple[str, torch.Tensor], ...] = ()


def destination(
    owner: checks.PayloadOwner,
    rows: torch.dtype,
    tokens: int,
    *,
    out_dtype: torch.dtype | None,
    out: torch.Tensor | Quantised | None,
    quantize: str | None,
    output_scale: torch.Tensor | None,
    scale_layout: str,
) -> Destination:
    """The given memory, or new one, for so many tokens' sums of rows of that dtype."""
    if quantize is None and output_scale is None and scale_layout == "linear" and not isinstance(out, Quantised):
        shape = (tokens, owner.problem.hidden)
        dtype = checks.out_dtype(owner, rows, out_dtype, out, shape)
        made = torch.empty(shape, dtype=dtype, device=owner.device) if out is None else out
        given = () if out is None else (("out", out),)
        return Destination(checks.WORDS[dtype], made, (made.data_ptr(),), given=given)
    arguments.one_of("quantize", quantize, (None, *_WORDS))
    arguments.one_of("scale_layout", scale_layout, tuple(SCALE_LAYOUTS))
    if quantize is None:
        raise InputError("output_scale, scale_layout and an `out` with scales are for quantize=, which is not given")
    if out_dtype is not None:
        raise InputError(f"out_dtype is for results that are not quantised; got {out_dtype} and {quantize!r}")
    return _quantised(owner, tokens, quantize, output_scale, scale_layout, out)


def _quantised(
    owner: checks.PayloadOwner,
    tokens: int,
    kind: str,
    output_scale: torch.Tensor | None,
    scale_layout: str,
    out: torch.Tensor | Quantised | None,
) -> Destination:
    result, hidden = _QUANTIZED[kind, scale_layout], owner.problem.hidden
    if hidden % result.group != 0:
        raise InputError(f"{kind} has a scale for every {result.group} elements; hidden={hidden} is no multiple of it")
    output_scale = _output_scale(owner, result, output_scale)
    shape = (tokens, result.row_bytes(hidden))  # of numbers of a byte
    scales = result.scales_shape(tokens, hidden)
    if out is None:
        made = Quantised(
            torch.empty(shape, dtype=result.dtype, device=owner.device),
            torch.empty(scales, dtype=result.scale_dtypes[0], device=owner.device),
        )
    else:
        made = _given(owner, out, result, shape, scales)
    addresses: tuple[int, ...] = (made.data.data_ptr(), made.scales.data_ptr())
    if result.scaled_by_user:
        addresses += (0 if output_scale is None else output_scale.data_ptr(),)
    users = () if out is None else (("out.data", made.data), ("out.scales", made.scales))
    return Destination(result.word, made, addresses, output_scale, users)


def _output_scale(owner: checks.PayloadOwner, result: Format, given: torch.Tensor | None) -> torch.Tensor | None:
    if given is None:
        return None
    if not result.scaled_by_user:
        raise InputError(f"{result.quantize} has no output_scale; leave it out")
    given = arguments.require_tensor(owner, "output_scale", given, (torch.float32,))
    if given.numel() != 1:
        raise InputError(f"output_scale is one float32 on the device; got {list(given.shape)}")
    return given


def _given(
    owner: checks.PayloadOwner,
    out: torch.Tensor | Quantised,
    result: Format,
    shape: tuple[int, int],
    scales: tuple[int, int],
) -> Quantised:
    if not isinstance(out, Quantised):
        raise InputError(f"out of quantised results is moegen.Quantised(data, scales); got {type(out).__name__}")
    arguments.require_output(owner, "out.data", out.data, (result.dtype,))
    arguments.require_shape("out.data", out.data, shape)
    arguments.require_writable("out.data", out.data)
    arguments.require_output(owner, "out.scales", out.scales, result.scale_dtypes)
    arguments.require_shape("out.scales", out.scales, scales)
    if not out.scales.is_contiguous():
        raise InputError(f"out.scales is contiguous; got strides {out.scales.stride()}")
    return out
