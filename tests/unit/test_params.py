# SPDX-License-Identifier: Apache-2.0
"""Parameter structs: what a kernel leaves out of its own, and what becomes of values that callers give for that."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any, cast

import pytest

from moegen.codegen.params import Param, ParamStruct, read_if
from moegen.runtime.bound import BoundKernel
from moegen.runtime.kernel import LoadedKernel

PARAMS = ParamStruct(
    (
        Param("uint8_t*", "peers", "", 2),
        Param("const uint8_t*", "x", "", when=False),
        Param("uint64_t", "begins", "", 3, when=False),
        Param("uint8_t*", "out", ""),
        Param("uint64_t", "offset", "", when=False),
        Param("Blocks", "senders", ""),
        Param("uint32_t", "rows", "", 2),
        Param("uint32_t", "tokens", ""),
    )
)
MEMBERS = ["peers", "out", "senders", "rows", "tokens"]
FIXED = {"peers": (1, 2), "senders": (3, 4), "offset": 5}
VARYING = ("x", "begins", "out", "rows", "tokens")


def test_what_is_not_read_is_left_out() -> None:
    assert [member.name for member in PARAMS.members] == MEMBERS
    assert PARAMS.left_out == {"x", "begins", "offset"}
    assert PARAMS.size == 48
    assert [declaration.split() for declaration, _ in PARAMS.declarations] == [
        ["uint8_t*", "peers[2];"],
        ["uint8_t*", "out;"],
        ["Blocks", "senders;"],
        ["uint32_t", "rows[2];"],
        ["uint32_t", "tokens;"],
    ]


def test_conditions_are_joined() -> None:
    always, never = Param("uint32_t", "a", ""), Param("uint32_t", "b", "", when=False)
    assert [param.when for param in read_if(True, always, never)] == [True, False]
    assert [param.when for param in read_if(False, always, never)] == [False, False]


def test_order_holds_for_what_is_left_out_too() -> None:
    with pytest.raises(ValueError, match="8-byte parameters come before"):
        ParamStruct((Param("uint32_t", "a", ""), Param("uint64_t", "b", "", when=False)))


class Recorder:
    """A kernel whose starts only note their parameters."""

    def __init__(self) -> None:
        self.starts: list[tuple[int, ...]] = []

    def launcher(self, params: ctypes.Array[ctypes.c_char], blocks: int) -> Callable[[], None]:
        return lambda: self.starts.append(struct.unpack("=3Q5I4x", params.raw))


def bound(kernel: Recorder, fixed: dict[str, Any] = FIXED, varying: tuple[str, ...] = VARYING) -> BoundKernel:
    return BoundKernel(cast(LoadedKernel, kernel), PARAMS, 1, fixed, varying)


def test_values_of_what_is_left_out_are_dropped() -> None:
    kernel = Recorder()
    call = bound(kernel)
    call(90, 91, 92, 93, 6, 7, 8, 9)
    call(90, 91, 92, 93, 16, 17, 18, 19)
    assert kernel.starts == [(1, 2, 6, 3, 4, 7, 8, 9), (1, 2, 16, 3, 4, 17, 18, 19)]


def test_what_is_left_out_needs_no_value() -> None:
    kernel = Recorder()
    bound(kernel, {"peers": (1, 2), "senders": (3, 4)}, ("tokens", "out", "rows"))(9, 6, 7, 8)
    assert kernel.starts == [(1, 2, 6, 3, 4, 7, 8, 9)]


@pytest.mark.parametrize("values", [(90, 91, 92, 93, 6, 7, 8), (90, 91, 92, 93, 6, 7, 8, 9, 10)])
def test_every_call_gives_all_values(values: tuple[int, ...]) -> None:
    with pytest.raises(TypeError, match="expected 8"):
        bound(Recorder())(*values)


@pytest.mark.parametrize(
    ("fixed", "varying", "named"),
    [
        ({**FIXED, "offsets": 5}, VARYING, "offsets"),
        (FIXED, (*VARYING, "y"), "y"),
        (FIXED, VARYING[:-1], "tokens"),
        ({**FIXED, "x": 1}, VARYING, "x"),
        ({**FIXED, "tokens": 1}, VARYING, "tokens"),
    ],
)
def test_other_names_are_an_error(fixed: dict[str, Any], varying: tuple[str, ...], named: str) -> None:
    with pytest.raises(AssertionError, match=f"not bound exactly once: {{'{named}'}}"):
        bound(Recorder(), fixed, varying)
