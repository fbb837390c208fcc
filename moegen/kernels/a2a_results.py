# SPDX-License-Identifier: Apache-2.0
"""Family `a2a`: what combine makes of its sums."""

from __future__ import annotations

from typing import NamedTuple

from moegen.kernels.ll import ceil_div
from moegen.kernels.params import Param


class Result(NamedTuple):
    """`bits` of an element; if results are quantised, the elements in a row of a `group` share a scale of 8 bits.

    Attributes:
        tiled: scales lie in tiles, not row by row.
        scaled_by_user: there is another factor, of the whole tensor, which the user gives.
    """

    bits: int
    group: int = 0
    tiled: bool = False
    scaled_by_user: bool = False

    @property
    def params(self) -> tuple[Param, ...]:
        """Those that a kernel of this result has beside its `out`."""
        if not self.group:
            return ()
        scales = Param("uint8_t*", "scales", "one per group of elements" + ", in tiles" * self.tiled)
        factor = Param("const float*", "output_scale", "one number, which results are multiplied by; null: 1")
        return (scales, factor) if self.scaled_by_user else (scales,)


TILE = (128, 4)
"""Tokens and scales of a tile, which has 512 bytes: what the tensor cores of Blackwell take ("128x4")."""

MXFP8_GROUP = 32
NVFP4_GROUP = 16

RESULTS = {
    "bf16": Result(16),
    "fp16": Result(16),
    "fp32": Result(32),
    "mxfp8": Result(8, MXFP8_GROUP),
    "mxfp8tiled": Result(8, MXFP8_GROUP, tiled=True),
    "nvfp4": Result(4, NVFP4_GROUP, scaled_by_user=True),
    "nvfp4tiled": Result(4, NVFP4_GROUP, tiled=True, scaled_by_user=True),
}
OUT_DTYPES = tuple(word for word, result in RESULTS.items() if not result.group)
QUANTISED = ("mxfp8", "nvfp4")

SCALE_LAYOUTS = {"linear": "", "128x4": "tiled"}
"""What is added to the word of a quantised result."""


def in_whole_tiles(rows: int, scales: int) -> tuple[int, int]:
    """The shape of the tensor that holds so many scales of so many rows in tiles."""
    return ceil_div(rows, TILE[0]) * TILE[0], ceil_div(scales, TILE[1]) * TILE[1]
