# SPDX-License-Identifier: Apache-2.0
"""Each number format once: how the elements of a row travel, and the words for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowFormat:
    """How the elements of a row travel.

    Attributes:
        element_bytes: as they travel.
        scales_per_word: that share 32 bits; 0: there are none.
        given: the caller quantised them; else bf16 is what is given.
    """

    element_bytes: int
    scales_per_word: int = 0
    given: bool = False

    @property
    def quantised_here(self) -> bool:
        return self.scales_per_word > 0 and not self.given


FORMATS = {
    "bf16": RowFormat(2),
    "fp8": RowFormat(1, 1),
    "fp8pow2": RowFormat(1, 1),
    "fp8ue8m0": RowFormat(1, 4),
    "e4m3": RowFormat(1, 1, given=True),
    "e4m3ue8m0": RowFormat(1, 4, given=True),
}


DTYPE_BYTES = {"bf16": 2, "fp8": 1, "fp8pow2": 1, "fp8ue8m0": 1}

FP8_GROUP = 128
"""Elements that share a scale."""

SCALES_PER_WORD = {"bf16": 0, "fp8": 1, "fp8pow2": 1, "fp8ue8m0": 4}
"""How a row's elements travel, and how many scales a 32-bit word holds: bf16 as they are; e4m3 with float32 scales,
with scales that are powers of two, or with the exponents of such scales, four to a word (UE8M0)."""

QUANTIZED = {"fp8": "fp8", "fp8_pow2": "fp8pow2", "fp8_ue8m0": "fp8ue8m0"}
"""Users' words for the quantised ones."""
