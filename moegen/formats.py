# SPDX-License-Identifier: Apache-2.0
"""Each number format once: elements, the scales that they share, and what kernels, users and torch call them.

torch's dtypes are held by their names, because codegen and tuning read this without torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Element(NamedTuple):
    """A number of a row.

    Attributes:
        bits: of one.
        dtype: of the tensor that holds them; two of four bits lie in a uint8.
    """

    bits: int
    dtype: str


class Scales(NamedTuple):
    """Factors, each of a group of consecutive elements of a row.

    Attributes:
        group: elements that share one; 0: there are none.
        bits: of one.
        dtypes: of tensors that may hold them; the first is what is made where none is given.
        layout: how they lie, a word of SCALE_LAYOUTS.
    """

    group: int
    bits: int
    dtypes: tuple[str, ...]
    layout: str = "linear"


SCALE_LAYOUTS = {"linear": (1, 1), "128x4": (128, 4)}
"""Tokens and scales of a tile, one tile after the other: row by row, or in the 512 bytes that the tensor cores of
Blackwell take. The keys are users' words.
"""

_NO_SCALES = Scales(0, 32, ("float32",))


@dataclass(frozen=True)
class Format:
    """How the elements of a row travel or lie.

    Attributes:
        word: what kernels call it, in stems.
        quantize: users' word for having it made of other numbers; "": nothing makes it.
        scaled_by_user: there is another factor, of the whole tensor, which the user gives.
    """

    word: str
    element: Element
    scales: Scales = _NO_SCALES
    quantize: str = ""
    scaled_by_user: bool = False

    @property
    def quantized_here(self) -> bool:
        return self.quantize != ""

    @property
    def given(self) -> bool:
        """Whether the caller quantized."""
        return self.group > 0 and not self.quantized_here

    @property
    def bits(self) -> int:
        return self.element.bits

    @property
    def element_bytes(self) -> int:
        return self.bits // 8

    @cached_property
    def group(self) -> int:
        return self.scales.group

    @property
    def tiled(self) -> bool:
        return SCALE_LAYOUTS[self.scales.layout] != (1, 1)

    @cached_property
    def word_elements(self) -> int:
        """Elements whose scales fill 32 bits; 0: there are no scales."""
        return self.group * (32 // self.scales.bits)

    def row_bytes(self, hidden: int) -> int:
        """Of a row's elements."""
        return hidden * self.bits // 8

    def scale_words(self, hidden: int) -> int:
        """32-bit words of scales that travel with a row."""
        elements = self.word_elements
        return hidden // elements if elements else 0

    def moved_bytes(self, hidden: int) -> int:
        """Of a row with the scales that travel with it."""
        return self.row_bytes(hidden) + 4 * self.scale_words(hidden)

    def scales_shape(self, tokens: int, hidden: int) -> tuple[int, int]:
        """Of the tensor that holds so many rows' scales, in whole tiles."""
        rows, columns = SCALE_LAYOUTS[self.scales.layout]
        return -(-tokens // rows) * rows, -(-(hidden // self.group) // columns) * columns

    @cached_property
    def dtype(self) -> torch.dtype:
        """torch's, of the tensor that holds the elements."""
        return _dtype(self.element.dtype)

    @cached_property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        """torch's, of tensors that may hold the scales; the first is what is made where none is given."""
        return tuple(map(_dtype, self.scales.dtypes))


def _dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _table(*formats: Format) -> dict[str, Format]:
    return {form.word: form for form in formats}


BF16 = Format("bf16", Element(16, "bfloat16"))
_FP16 = Format("fp16", Element(16, "float16"))
_FP32 = Format("fp32", Element(32, "float32"))
_E4M3, _E2M1 = Element(8, "float8_e4m3fn"), Element(4, "uint8")

_FLOATS = Scales(128, 32, ("float32",))
_EXPONENTS = _FLOATS._replace(bits=8, dtypes=("int32",))
"""UE8M0, four to an int32."""
_MX = Scales(32, 8, ("uint8", "float8_e8m0fnu"))
_NV = Scales(16, 8, ("float8_e4m3fn", "uint8"))

ROWS = _table(
    BF16,
    Format("fp8", _E4M3, _FLOATS, "fp8"),
    Format("fp8pow2", _E4M3, _FLOATS, "fp8_pow2"),
    Format("fp8ue8m0", _E4M3, _EXPONENTS, "fp8_ue8m0"),
    Format("e4m3", _E4M3, _FLOATS),
    Format("e4m3ue8m0", _E4M3, _EXPONENTS),
)
"""How tokens travel in dispatch of `ExpertParallel` and `HighThroughput`."""

QUANTIZED = {form.quantize: form.word for form in ROWS.values() if form.quantized_here}
"""Users' words for the quantized ones, and kernels'."""

SUMMANDS = _table(BF16, _FP16, _FP32, Format("e4m3", _E4M3))
"""What combine of `OneSided` adds up; this e4m3 has no scales. Call words carry their numbers in this order."""

RESULTS = _table(
    BF16,
    _FP16,
    _FP32,
    Format("mxfp8", _E4M3, _MX, "mxfp8"),
    Format("mxfp8tiled", _E4M3, _MX._replace(layout="128x4"), "mxfp8"),
    Format("nvfp4", _E2M1, _NV, "nvfp4", scaled_by_user=True),
    Format("nvfp4tiled", _E2M1, _NV._replace(layout="128x4"), "nvfp4", scaled_by_user=True),
)
"""What it makes of its sums."""
