# SPDX-License-Identifier: Apache-2.0
"""Call words: the arguments of a call that must be equal on all ranks, packed into a word that ranks compare.

This is the one place that defines their fields. Kernels compare and report whole words; the host packs them, and names
the arguments in which two words differ.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from moegen.kernels.params import Param
from moegen.kernels.spec import MAX_RANKS

ON_PATH_COLLECTIVE = {
    "coll_place": "ht_dispatch",
    "coll_reduce": "ht_combine",
    "coll_open": "a2a_dispatch",
}
"""Kernels that compare headers, and the ops whose call words these carry."""


def _whether(value: int) -> str:
    return "given" if value else "left out"


def _yes(value: int) -> str:
    return str(bool(value))


def _words(value: int) -> str:
    return f"of {value} words" if value else "left out"


def _one_of(*words: str) -> Callable[[int], str]:
    return lambda value: words[value] if value < len(words) else str(value)


@dataclass(frozen=True)
class Field:
    """An argument in a call word: its bits, and what prints its value; None: the bits are a hash."""

    argument: str
    bits: int
    text: Callable[[int], str] | None


ROW_DTYPES = ("bf16", "fp16", "fp32", "e4m3")

FIELDS: dict[str, tuple[Field, ...]] = {
    "ll_combine": (Field("topk_weights", 1, _whether),),
    "ht_dispatch": (Field("mode or handle", 2, _one_of('mode "capacity"', 'mode "exact"', "a handle")),),
    "ht_combine": (Field("weighted", 1, _yes), Field("topk_weights", 1, _whether)),
    "a2a_dispatch": (
        Field("", 9, None),  # zeros; the number of sending blocks travels there
        Field("active_ranks", 7, None),
        Field("payloads (how many, in which order, of which widths and dtypes)", 16, None),
        Field("max_tokens", 20, lambda value: str(value + 1)),
        Field("stats", 11, _words),
    ),
    "a2a_combine": (
        Field("dtype of y", 2, _one_of(*ROW_DTYPES)),
        Field("expert_rows() as y", 1, _yes),
        Field("active_ranks", 7, None),
        Field("max_tokens of the handle", 20, lambda value: str(value + 1)),
    ),
}
"""By op, from the lowest bit up."""


def pack(op: str, *values: int) -> int:
    """Packs an op's fields, given in their order."""
    word = shift = 0
    for field, value in zip(FIELDS[op], values, strict=True):
        if value >> field.bits:
            raise AssertionError(f"{op}: {field.argument} has {field.bits} bits, and {value} does not fit")
        word |= value << shift
        shift += field.bits
    return word


def differences(op: str, here: int, there: int, rank: int, peer: int) -> list[str]:
    """Names the arguments in which two call words differ, with both values."""
    found = []
    for field in FIELDS[ON_PATH_COLLECTIVE.get(op, op)]:
        mask = (1 << field.bits) - 1
        if here & mask != there & mask:
            found.append(field.argument)
            if field.text is not None:
                mine, theirs = field.text(here & mask), field.text(there & mask)
                found[-1] += f" ({mine} on rank {rank}, {theirs} on rank {peer})"
        here, there = here >> field.bits, there >> field.bits
    return found


PLACE = Param("uint64_t", "calls_offset", "where published call words lie in every rank's symmetric memory")
"""Parameter of the kernels that publish call words."""

REGION_BYTES = 2 * MAX_RANKS * 8
"""Of these words, whatever the number of ranks is."""


@lru_cache(1024)
def of_ranks(active: int) -> int:
    """Hash of a mask of up to 64 ranks in 7 bits; it differs for any two masks that differ in one or two ranks."""
    code = 0
    for rank in range(active.bit_length()):
        code ^= (rank + 1) * (active >> rank & 1)
    return code


def of_payloads(widths: tuple[int, ...], dtypes: tuple[object, ...]) -> int:
    """Hash of a set of payloads in 16 bits."""
    return zlib.crc32(repr((widths, dtypes)).encode()) & 0xFFFF
