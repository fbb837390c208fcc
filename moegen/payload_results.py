# SPDX-License-Identifier: Apache-2.0
"""What combine of `OneSided` makes of its sums: what the arguments that say so must be, and memory for the results."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from moegen import checks, payload_checks
from moegen.errors import InputError
from moegen.kernels.a2a_results import QUANTISED, RESULTS, SCALE_LAYOUTS, Result, in_whole_tiles
from moegen.payloads import Quantised

if TYPE_CHECKING:
    from moegen.one_sided import OneSided


class _Format(NamedTuple):
    data: torch.dtype
    per_number: int  # elements in one of `data`
    scales: tuple[torch.dtype, ...]  # the first is what is allocated


_FORMATS = {
    "mxfp8": _Format(torch.float8_e4m3fn, 1, (torch.uint8, torch.float8_e8m0fnu)),
    "nvfp4": _Format(torch.uint8, 2, (torch.float8_e4m3fn, torch.uint8)),
}


class Destination(NamedTuple):
    """Where results go.

    Attributes:
        word: what they are, in `moegen.kernels.a2a_results`.
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
    owner: OneSided,
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
        dtype = payload_checks.out_dtype(owner, rows, out_dtype, out, shape)
        made = torch.empty(shape, dtype=dtype, device=owner.device) if out is None else out
        given = () if out is None else (("out", out),)
        return Destination(payload_checks.WORDS[dtype], made, (made.data_ptr(),), given=given)
    checks.one_of("quantize", quantize, (None, *QUANTISED))
    checks.one_of("scale_layout", scale_layout, tuple(SCALE_LAYOUTS))
    if quantize is None:
        raise InputError("output_scale, scale_layout and an `out` with scales are for quantize=, which is not given")
    if out_dtype is not None:
        raise InputError(f"out_dtype is for results that are not quantised; got {out_dtype} and {quantize!r}")
    return _quantised(owner, tokens, quantize, output_scale, scale_layout, out)


def _quantised(
    owner: OneSided,
    tokens: int,
    kind: str,
    output_scale: torch.Tensor | None,
    scale_layout: str,
    out: torch.Tensor | Quantised | None,
) -> Destination:
    word = kind + SCALE_LAYOUTS[scale_layout]
    result, form, hidden = RESULTS[word], _FORMATS[kind], owner.problem.hidden
    if hidden % result.group != 0:
        raise InputError(f"{kind} has a scale for every {result.group} elements; hidden={hidden} is no multiple of it")
    output_scale = _output_scale(owner, result, kind, output_scale)
    shape = (tokens, hidden // form.per_number)
    scales = (tokens, hidden // result.group)
    if result.tiled:
        scales = in_whole_tiles(*scales)
    if out is None:
        made = Quantised(
            torch.empty(shape, dtype=form.data, device=owner.device),
            torch.empty(scales, dtype=form.scales[0], device=owner.device),
        )
    else:
        made = _given(owner, out, form, shape, scales)
    addresses: tuple[int, ...] = (made.data.data_ptr(), made.scales.data_ptr())
    if result.scaled_by_user:
        addresses += (0 if output_scale is None else output_scale.data_ptr(),)
    users = () if out is None else (("out.data", made.data), ("out.scales", made.scales))
    return Destination(word, made, addresses, output_scale, users)


def _output_scale(owner: OneSided, result: Result, kind: str, given: torch.Tensor | None) -> torch.Tensor | None:
    if given is None:
        return None
    if not result.scaled_by_user:
        raise InputError(f"{kind} has no output_scale; leave it out")
    given = checks.require_tensor(owner, "output_scale", given, (torch.float32,))
    if given.numel() != 1:
        raise InputError(f"output_scale is one float32 on the device; got {list(given.shape)}")
    return given


def _given(
    owner: OneSided,
    out: torch.Tensor | Quantised,
    form: _Format,
    shape: tuple[int, int],
    scales: tuple[int, int],
) -> Quantised:
    if not isinstance(out, Quantised):
        raise InputError(f"out of quantised results is moegen.Quantised(data, scales); got {type(out).__name__}")
    checks.require_output(owner, "out.data", out.data, (form.data,))
    checks.require_shape("out.data", out.data, shape)
    checks.require_writable("out.data", out.data)
    checks.require_output(owner, "out.scales", out.scales, form.scales)
    checks.require_shape("out.scales", out.scales, scales)
    if not out.scales.is_contiguous():
        raise InputError(f"out.scales is contiguous; got strides {out.scales.stride()}")
    return out
