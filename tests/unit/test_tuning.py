# SPDX-License-Identifier: Apache-2.0
"""The table of what is fastest: the committed file, what `select` makes of it, and how figures become rules."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from moegen import tuning
from moegen.errors import InputError
from moegen.kernels.problem import Problem
from moegen.kernels.spec import WarpGroups
from moegen.select import Selection, fitted, select
from moegen.tuning import Choice, Entry, Rule, Run, Table

RUN = Run("a machine", 2, "2026-11-25", "moegen bench tune", {})
TEXTS = sorted(tuning.path_of("any").parent.glob("*.json"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_committed_tables_are_whole(path: Any) -> None:
    table = tuning.parse(path.read_text())
    assert path == tuning.path_of(table.arch) and path.name.startswith(table.family)
    assert tuning.text_of(table) == path.read_text()
    for entry in table.entries:
        assert entry.measured and entry.run.machine and entry.run.date
        for row in entry.measured:
            assert all(us > 0 for us in row.us.values())


def test_an_architecture_without_a_table_has_that_of_sm90() -> None:
    assert tuning.table("sm120") == tuning.table("sm90") == tuning.table()


def damaged(change: Any) -> str:
    data = json.loads(tuning.text_of(tuning.table()))
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(schema=0),
        lambda data: data.update(more=1),
        lambda data: data.pop("arch"),
        lambda data: data["entries"].pop(),
        lambda data: data["entries"].append(data["entries"][0]),
        lambda data: data["entries"][0].update(op="scatter"),
        lambda data: data["entries"][2].update(dtype="fp8"),
        lambda data: data["entries"][0].update(row_bytes=0),
        lambda data: data["entries"][0].update(path="carrier pigeon"),
        lambda data: data["entries"][0]["rules"].pop(),
        lambda data: data["entries"][0]["rules"].reverse(),
        lambda data: data["entries"][0]["rules"][0].update(up_to=64),
        lambda data: data["entries"][0]["rules"][0].update(choices=[]),
        lambda data: data["entries"][0]["rules"][0]["choices"][0].update(wire="row"),
        lambda data: data["entries"][0]["rules"][0]["choices"][0].update(wire="string"),
        lambda data: data["entries"][0]["rules"][0]["choices"][0].update(warp_groups="16"),
        lambda data: data["entries"][0]["rules"][0]["choices"][0].update(warp_groups="4x16"),
        lambda data: data["entries"][0]["rules"][0]["choices"][0].update(num_sms=0),
        lambda data: data["entries"][0]["measured"][0].update(us={}),
    ],
)
def test_a_damaged_table_is_refused(change: Any) -> None:
    with pytest.raises(InputError, match="no tuning table"):
        tuning.parse(damaged(change))


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(InputError, match="no tuning table"):
        tuning.parse("rules:")


def entry(op: str, dtype: str, row_bytes: int, *rules: Rule) -> Entry:
    return Entry(op, "ipc", dtype, row_bytes, rules, RUN, ())


SHORT, LONG = Choice("inline", "1x4"), Choice("row", "1x16", num_sms=48)
OTHER = Choice("row", "2x8")
TABLE = Table(
    "ll",
    "sm90",
    (
        entry("dispatch", "bf16", 2048, Rule(None, (SHORT, LONG))),
        entry("dispatch", "bf16", 8192, Rule(16, (SHORT,)), Rule(None, (LONG, SHORT))),
        entry("dispatch", "fp8", 4096, Rule(None, (OTHER,))),
        entry("combine", "bf16", 8192, Rule(None, (OTHER, SHORT))),
    ),
)


def chosen(hidden: int = 4096, max_tokens: int = 128, ranks: int = 2, **more: Any) -> Selection:
    return select(Problem(ranks, 64, 4, hidden, max_tokens, **more), TABLE)


def test_capacities_choose_the_rule() -> None:
    assert [chosen(max_tokens=m).dispatch.wire for m in (1, 16, 17, 4096)] == ["inline", "inline", "row", "row"]
    assert str(chosen(max_tokens=17).dispatch.warp_groups) == "1x16"
    assert TABLE.limits == [16]


def test_each_op_has_its_own_wire_and_both_combines_the_same() -> None:
    selection = chosen(max_tokens=16)
    assert (selection.dispatch.wire, selection.combine.wire) == ("inline", "row")
    assert selection.combine_with_weights.wire == "row"


def test_rows_of_other_lengths_take_the_nearest_measured() -> None:
    wires = {hidden: chosen(hidden).dispatch.wire for hidden in (64, 1024, 2040, 2056, 4096, 16384)}
    assert wires == {64: "inline", 1024: "inline", 2040: "inline", 2056: "row", 4096: "row", 16384: "row"}


def test_other_ranks_and_kinds_of_fp8_take_the_same() -> None:
    assert chosen(ranks=8).dispatch.wire == chosen(ranks=2).dispatch.wire
    for dtype in ("fp8", "fp8pow2", "fp8ue8m0"):
        selection = chosen(dtype=dtype)
        assert str(selection.dispatch.warp_groups) == "2x8" and selection.combine.dtype == "bf16"


def test_arguments_win() -> None:
    selection = chosen(wire="inline")
    assert (selection.dispatch.wire, str(selection.dispatch.warp_groups)) == ("inline", "1x4")
    assert (selection.combine.wire, str(selection.combine.warp_groups)) == ("inline", "1x4")
    assert str(chosen(warp_groups="1x2").dispatch.warp_groups) == "1x2"
    assert chosen(max_tokens=16, wire="row").dispatch.wire == "row"  # no choice of the table's has it


def test_multiprocessors_come_from_the_table_but_not_on_a_cpu() -> None:
    assert (chosen().dispatch_sms, chosen().combine_sms) == (48, None)
    assert chosen(on_host=True).dispatch_sms is None
    assert str(chosen(on_host=True).dispatch.warp_groups) == "2x1"


def test_warps_fit_the_row() -> None:
    assert fitted(WarpGroups(1, 16), 14336) == WarpGroups(1, 16)
    assert fitted(WarpGroups(1, 16), 2 * 2880) == WarpGroups(1, 16)  # 360 vectors: 11.25 warps
    assert fitted(WarpGroups(1, 16), 4096) == WarpGroups(1, 8)
    assert fitted(WarpGroups(1, 16), 16) == WarpGroups(1, 1)
    assert fitted(WarpGroups(4, 8), 64 * 1024) == WarpGroups(2, 16)  # 4096 vectors, 8 in a thread at most


def test_one_team_where_several_do_not_fit_into_shared_memory() -> None:
    several = dataclasses.replace(TABLE, entries=(*TABLE.entries[3:], *teams("bf16"), *teams("fp8")))
    assert str(select(Problem(2, 64, 4, 1024, 8), several).dispatch.warp_groups) == "32x1"
    assert str(select(Problem(64, 1024, 32, 256, 8), several).dispatch.warp_groups) == "1x1"


def teams(dtype: str) -> tuple[Entry, ...]:
    return (entry("dispatch", dtype, 8192, Rule(None, (Choice("row", "32x1"),))),)
