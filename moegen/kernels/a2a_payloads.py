# SPDX-License-Identifier: Apache-2.0
"""Payloads of family `a2a`: their widths in a stem, and the units in which kernels move them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from moegen.errors import SpecError
from moegen.kernels.integers import as_int
from moegen.kernels.spec import PARSED


@dataclass(frozen=True)
class RowBytes:
    """The widths of a token's payloads, in order."""

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        widths = tuple(map(as_int, self.widths))
        if None in widths:
            raise SpecError(f"bytes per token must be integers; got {self.widths}")
        object.__setattr__(self, "widths", widths)

    def __str__(self) -> str:
        return "x".join(map(str, self.widths))

    @staticmethod
    def parse(text: str) -> RowBytes:
        if re.fullmatch(r"\d+(x\d+)*", text) is None:
            raise SpecError(f"payloads are written as their bytes per token, e.g. 14336x64x32; got {text!r}")
        return RowBytes(tuple(map(int, text.split("x"))))


PARSED["RowBytes"] = RowBytes.parse


class Payload(NamedTuple):
    """One payload as the kernel moves it: `units` of what C++ knows as `unit`."""

    number: int
    unit: str
    units: int


class BulkRow(NamedTuple):
    """One payload that a bulk copy moves: `bytes` from byte `offset` of a stage on."""

    number: int
    units: int
    bytes: int
    offset: int


UNITS = {16: "uint4", 8: "uint2", 4: "uint32_t", 2: "uint16_t", 1: "uint8_t"}
