# SPDX-License-Identifier: Apache-2.0
"""The one table of number formats, against torch, and against what is written apart from it on purpose."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moegen.formats import QUANTIZED, RESULTS, ROWS, SCALE_LAYOUTS, SUMMANDS, Format
from moegen.low_latency import reference
from moegen.one_sided import reference_quantize

ROOT = Path(__file__).resolve().parents[2]
EVERY = [form for table in (ROWS, SUMMANDS, RESULTS) for form in table.values()]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("form", EVERY, ids=lambda form: f"{form.word}-{form.group}")
def test_torch_has_these_numbers(form: Format) -> None:
    assert form.row_bytes(64) % form.dtype.itemsize == 0
    assert form.bits == 8 * form.dtype.itemsize or (form.bits, form.dtype) == (4, torch.uint8)
    for dtype in form.scale_dtypes:
        assert 8 * dtype.itemsize in (form.scales.bits, 32)


def test_users_say_a_word_and_a_layout_for_each_result_that_has_scales() -> None:
    said = [(form.quantize, form.scales.layout) for form in RESULTS.values() if form.quantized_here]
    assert said == [(word, layout) for word in ("mxfp8", "nvfp4") for layout in SCALE_LAYOUTS]
    assert list(QUANTIZED) == ["fp8", "fp8_pow2", "fp8_ue8m0"]
    assert [form.word for form in EVERY if form.given] == ["e4m3", "e4m3ue8m0"]


def test_sizes() -> None:
    assert ROWS["fp8"].moved_bytes(7168) == 7168 + 4 * 56
    assert ROWS["fp8ue8m0"].moved_bytes(7168) == 7168 + 4 * 14
    assert ROWS["bf16"].moved_bytes(7168) == 2 * 7168
    assert RESULTS["nvfp4"].row_bytes(64) == 32 and RESULTS["nvfp4"].scales_shape(3, 80) == (3, 5)
    assert RESULTS["nvfp4tiled"].scales_shape(3, 80) == (128, 8)


def test_references_and_kernels_which_state_groups_themselves_agree() -> None:
    assert {form.group for form in ROWS.values() if form.group} == {reference.FP8_GROUP}
    assert RESULTS["mxfp8"].group == reference_quantize.MXFP8_GROUP
    assert RESULTS["nvfp4"].group == reference_quantize.NVFP4_GROUP
    kernels = (ROOT / "templates/device/quantize.cuh").read_text()
    assert f"kScaleGroup = {reference.FP8_GROUP};" in kernels


def test_the_table_is_read_without_torch(python: Run) -> None:
    done = python("import sys, moegen.formats, moegen.tuning; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
