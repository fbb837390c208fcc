# SPDX-License-Identifier: Apache-2.0
"""Compiles what shapes of `OneSided` need."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moegen.codegen.render import render
from moegen.compile.binary import obtain_many
from moegen.compile.target import Target
from moegen.kernels.a2a import OneSidedCombine, OneSidedDispatch
from moegen.payload_checks import WORDS, problem
from moegen.reference_payloads import out_dtype_of
from moegen.select import combine_spec, dispatch_spec
from support.a2a_data import DTYPES, PayloadShape, room_for


def specs_of(shape: PayloadShape, on_host: bool) -> tuple[OneSidedDispatch, OneSidedCombine]:
    wanted = problem(
        shape.ranks,
        num_experts=shape.experts,
        num_topk=shape.topk,
        hidden=shape.hidden,
        max_tokens_per_rank=shape.max_tokens,
        payload_bytes=room_for(shape.columns),
        dtype=DTYPES[shape.dtype],
        warp_groups=None,
        copy="auto",
        path="ipc",
        on_host=on_host,
    )
    dtype = DTYPES[shape.dtype]
    out = shape.out_dtype or out_dtype_of(dtype)
    widths = tuple(width * each.itemsize for width, each in shape.columns)
    pulls = shape.rows == "pulled"
    return dispatch_spec(wanted, widths), combine_spec(wanted, WORDS[dtype], WORDS[out], pulls=pulls)


def build(shapes: Sequence[PayloadShape], device: str) -> None:
    """In parallel, once."""
    on_host = device == "cpu"
    target = Target("host") if on_host else Target.for_capability(*torch.cuda.get_device_capability())
    specs = {spec for shape in shapes for spec in specs_of(shape, on_host)}
    obtain_many([render(spec) for spec in sorted(specs, key=lambda spec: spec.stem)], target)
