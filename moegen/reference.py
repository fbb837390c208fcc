# SPDX-License-Identifier: Apache-2.0
"""The definition of right for all families: dispatch and combine in plain torch, over all ranks at once."""

from __future__ import annotations

from moegen.base.reference import BF16_ROUNDING, FP32_ROUNDING, Combined, expert_ranges
from moegen.high_throughput.reference import ExpectedRows, combine_rows, dispatch_rows, sum_weights
from moegen.low_latency.reference import Expected, combine, dispatch, quantise
from moegen.one_sided.reference import (
    CombinedPayloads,
    ExpectedPayloads,
    combine_payloads,
    dispatch_payloads,
    out_dtype_of,
)
from moegen.one_sided.reference_quantize import (
    dequantise_mxfp8,
    dequantise_nvfp4,
    in_tiles,
    quantise_mxfp8,
    quantise_nvfp4,
)

__all__ = [
    "BF16_ROUNDING",
    "FP32_ROUNDING",
    "Combined",
    "CombinedPayloads",
    "Expected",
    "ExpectedPayloads",
    "ExpectedRows",
    "combine",
    "combine_payloads",
    "combine_rows",
    "dequantise_mxfp8",
    "dequantise_nvfp4",
    "dispatch",
    "dispatch_payloads",
    "dispatch_rows",
    "expert_ranges",
    "in_tiles",
    "out_dtype_of",
    "quantise",
    "quantise_mxfp8",
    "quantise_nvfp4",
    "sum_weights",
]
