# SPDX-License-Identifier: Apache-2.0
"""The pure parts of scripts/compare_kernels.py: PTX without where parameters lie, launches compared, tables."""

from __future__ import annotations

from typing import Any

import pytest
from kernel_compare import calls, machine_code, ptx
from kernel_compare.machine_code import DIFFERENT, MOVED, REGROUPED, SAME, Compared, Kernel, moved
from kernel_compare.ptx import Member
from kernel_compare.table import table

OLD = [Member("peers", 0, 16), Member("unread", 16, 8), Member("out", 24, 8), Member("rank", 32, 4)]
OLD += [Member("unread_too", 36, 4), Member("rows", 40, 4), Member("slots", 44, 4)]
NEW = [Member("peers", 0, 16), Member("out", 16, 8), Member("rank", 24, 4), Member("rows", 28, 4)]
NEW += [Member("slots", 32, 4)]

BEFORE = """
.func _Z4helpRK6Params(
	.param .b64 _Z4helpRK6Params_param_0
)
{
	.reg .b64 	%rd<4>;
	ld.param.u64 	%rd1, [_Z4helpRK6Params_param_0];
	ld.u64 	%rd2, [%rd1+24];
	st.u64 	[%rd2], %rd2;
	ret;
}
.visible .entry the_kernel(
	.param .align 8 .b8 the_kernel_param_0[48]
)
{
	.reg .b64 	%rd<20>;
	mov.b64 	%rd7, the_kernel_param_0;
	ld.param.u32 	%r1, [the_kernel_param_0+32];
	add.s64 	%rd9, %rd7, 24;
	ld.param.u64 	%rd4, [%rd9];
	mul.wide.u32 	%rd5, %r1, 8;  // its place
	add.s64 	%rd6, %rd7, %rd5;
	ld.param.u64 	%rd8, [%rd6];
	ld.param.u32 	%r3, [%rd7+40];
	setp.eq.s32 	%p3, %r3, 0;
	@%p3 bra 	$L__BB1_4;
	{
	.param .b64 param0;
	st.param.b64 	[param0+0], %rd7;
	call.uni
	_Z4helpRK6Params,
	(
	param0
	);
	}
	st.global.u32 	[%rd4], %r3;

$L__BB1_4:
	ret;
}
"""

AFTER = (
    BEFORE.replace("%rd1+24", "%rd1+16")
    .replace("[48]", "[40]")
    .replace("param_0+32", "param_0+24")
    .replace("%rd7, 24", "%rd7, 16")
    .replace("%rd7+40", "%rd7+28")
)


def verdict(after: str, members: list[Member] = NEW) -> str:
    return moved((BEFORE, "the_kernel", OLD), (after, "the_kernel", members))[0]


def test_members_are_called_by_name_wherever_they_are_read() -> None:
    lines = ptx.places(BEFORE, "the_kernel", OLD)
    assert "ld.param.u32 %r:1, [*_param_0 <rank>];" in lines
    assert "ld.u64 %rd:2, [%rd:1 <out>];" in lines  # in what the entry gives the struct's address
    assert "add.s64 %rd:2, %rd:1, <out>;" in lines
    assert "ld.param.u64 %rd:6, [%rd:5 <peers>];" in lines
    assert "*_param_0" in lines


def test_parameters_that_are_read_are_put_where_they_are_used() -> None:
    lines = ptx.reads(BEFORE, "the_kernel", OLD)
    assert "st.global.u32 [<out: u64>], <rows: u32>;" in lines
    assert "mul.wide.u32 %rd:1, <rank: u32>, 8;" in lines
    assert "st.param.b64 [param0+0], <at peers>;" in lines
    assert not [line for line in lines if line.startswith("ld.") and "rank" in line]


def test_a_struct_that_has_lost_dead_members_is_the_same_program() -> None:
    assert verdict(AFTER) == MOVED


def test_members_that_are_read_together_are_the_same_program() -> None:
    pair = "ld.param.v2.u32 \t{%r1, %r3}, [the_kernel_param_0+24];"
    together = AFTER.replace("ld.param.u32 \t%r1, [the_kernel_param_0+24];", pair)
    together = together.replace("\tld.param.u32 \t%r3, [%rd7+28];\n", "")
    assert verdict(together) == REGROUPED


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%rd7+28", "%rd7+32"),  # reads another member
        ("%rd1+16", "%rd1+24"),  # the same in what is called
        ("%rd7, 16", "%rd7, 24"),
        ("%r1, 8", "%r1, 16"),
        ("setp.eq", "setp.ne"),
        ("[param0+0], %rd7", "[param0+0], %rd9"),
        ("\tst.global.u32 \t[%rd4], %r3;\n", ""),
        ("[%rd4], %r3", "[%rd8], %r3"),
    ],
)
def test_another_program_is_another(old: str, new: str) -> None:
    assert old in AFTER
    assert verdict(AFTER.replace(old, new)) == DIFFERENT


def test_an_offset_that_stays_while_members_move_is_another_program() -> None:
    assert verdict(BEFORE) == DIFFERENT


def test_registers_and_labels_count_from_where_they_come() -> None:
    renamed = AFTER.replace("%rd4", "%rd14").replace("%p3", "%p1").replace("$L__BB1_4", "$L__BB7_9")
    assert verdict(renamed) == MOVED


def test_an_increment_in_a_loop_is_a_number() -> None:
    loop = "\tadd.s64 \t%rd6, %rd7, %rd5;\n$L_1:\n\tadd.s64 \t%rd6, %rd6, 8;\n"
    before = BEFORE.replace("\tadd.s64 \t%rd6, %rd7, %rd5;\n", loop)
    lines = ptx.places(before, "the_kernel", OLD)
    assert "add.s64 %rd:5, %rd:5, 8;" in lines


def test_kernels_are_compared_part_by_part() -> None:
    one = Kernel("a", {".text.*": "1", ".nv.info.*": "2"}, {"registers": 10}, OLD, "k")
    two = Kernel("b", {".text.*": "1", ".nv.shared.*": "3"}, {"registers": 12}, OLD, "k")
    assert machine_code.differences(one, one) == []
    assert machine_code.differences(one, two) == [".nv.info.*", ".nv.shared.*", "registers"]
    assert machine_code.differences(None, two) == ["only in the new revision"]


def test_other_constants_are_no_other_instructions() -> None:
    assert machine_code.verdict([]) == SAME
    assert machine_code.verdict([".nv.constant4"]) == machine_code.NAMES
    assert machine_code.verdict([".nv.constant4", ".text.*"]) == machine_code.verdict([".nv.constant0.*"]) == DIFFERENT


def test_the_closing_line_counts_kernels() -> None:
    compared = [Compared("a", None, None, SAME), Compared("b", None, None, MOVED), Compared("c", None, None, DIFFERENT)]
    assert machine_code.closing(compared[::2], with_moved=False) == (
        "2 kernels: 1 the same machine code, 0 the same but for which constants the text names, 1 differ"
    )
    assert machine_code.report(compared, with_moved=True)[-1] == (
        "3 kernels: 1 the same machine code, 0 the same but for which constants the text names, "
        "1 the same but for where parameters lie, "
        "0 the same but for where parameters lie and which are read together, 1 differ"
    )


def launch(call: str, **arguments: Any) -> dict[str, Any]:
    return {"call": call, "stem": "ll_dispatch_x", "blocks": 2, "threads": 64, "shared": 0, "arguments": arguments}


def recorded(*launches: dict[str, Any]) -> dict[str, Any]:
    return {"calls": 1, "launches": list(launches)}


def test_arguments_are_compared_by_name_and_dropped_ones_are_told() -> None:
    old = recorded(launch("c", x=["16n+0"], gone=[3], rank=[1]))
    found = calls.compare(old, recorded(launch("c", rank=[1], x=["16n+0"])), {})
    assert calls.report(found) == ["dropped from ll_dispatch: gone", "1 calls, 1 launches: the same arguments"]


def test_other_arguments_sizes_and_launches_are_told() -> None:
    old = recorded(launch("c", x=["16n+0"], rank=[1]), launch("c", x=["null"], rank=[1]))
    new = recorded({**launch("c", x=["null"], rank=[1], more=[2]), "blocks": 3})
    lines = calls.report(calls.compare(old, new, {}))
    told = [line.split() for line in lines[1:-1]]
    assert told == [
        ["ll_dispatch_x", "blocks", "2", "3", "1", "c"],
        ["ll_dispatch_x", "x", "16n+0", "null", "1", "c"],
        ["ll_dispatch_x", "more", "not", "there", "2", "1", "c"],
        ["ll_dispatch_x", "kernel", "ll_dispatch_x", "no", "launch", "1", "c"],
    ]
    assert lines[-1] == "1 calls, 1 launches: other arguments, see above"


def test_stems_may_have_another_name() -> None:
    old = recorded(launch("c", x=[1]))
    new = recorded({**launch("c", x=[1]), "stem": "ll_send_x"})
    assert calls.compare(old, new, {"ll_dispatch_x": "ll_send_x"}).differences == {}
    assert calls.compare(old, new, {}).differences != {}


def test_columns_are_as_wide_as_their_widest_word() -> None:
    assert table(("a", "b"), [("long", "1"), ("x", "22")]) == ["a     b", "long  1", "x     22"]
