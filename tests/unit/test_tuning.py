# SPDX-License-Identifier: Apache-2.0
"""The table of what is fastest: the committed file, what `select` makes of it, and how figures become rules."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from moegen import tuning
from moegen.bench.choose import TIE, rules, tables, updated
from moegen.bench.config import HOST_LINK
from moegen.bench.tune import TuneConfig
from moegen.errors import InputError
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec, WarpGroups
from moegen.select import Selection, fitted, select
from moegen.tuning import Choice, Entry, Measured, Rule, Run, Table

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


def entry(op: str, dtype: str, row_bytes: int, *rules: Rule) -> Entry:
    measured = (Measured(op, 8, {"inline 1x4": 7.5}),)
    return Entry(op, "ipc", dtype, row_bytes, rules, RUN, measured)


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


def damaged(change: Any) -> str:
    data = json.loads(tuning.text_of(TABLE))
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
        lambda data: data["entries"][3].update(dtype="fp8"),
        lambda data: data["entries"][0].update(row_bytes=0),
        lambda data: data["entries"][0].update(path="carrier pigeon"),
        lambda data: data["entries"][1]["rules"].pop(),
        lambda data: data["entries"][1]["rules"].reverse(),
        lambda data: data["entries"][1]["rules"].insert(0, data["entries"][1]["rules"][0]),
        lambda data: data["entries"][1]["rules"][0].update(choices=[]),
        lambda data: data["entries"][1]["rules"][1]["choices"][0].update(wire="inline"),
        lambda data: data["entries"][1]["rules"][0]["choices"][0].update(wire="string"),
        lambda data: data["entries"][1]["rules"][0]["choices"][0].update(warp_groups="16"),
        lambda data: data["entries"][1]["rules"][0]["choices"][0].update(warp_groups="4x16"),
        lambda data: data["entries"][1]["rules"][0]["choices"][0].update(num_sms=0),
        lambda data: data["entries"][0]["measured"][0].update(us={}),
    ],
)
def test_a_damaged_table_is_refused(change: Any) -> None:
    with pytest.raises(InputError, match="no tuning table"):
        tuning.parse(damaged(change))


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(InputError, match="no tuning table"):
        tuning.parse("rules:")


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
    assert str(select(Problem(1, 1024, 32, 256, 8), several).dispatch.warp_groups) == "1x1"


def teams(dtype: str) -> tuple[Entry, ...]:
    return (entry("dispatch", dtype, 8192, Rule(None, (Choice("row", "32x1"),))),)


I8, I16, R8, R16 = (Choice(wire, groups) for wire in ("inline", "row") for groups in ("1x8", "1x16"))


def first_choices(times: dict[int, dict[Choice, float]]) -> list[tuple[int | None, Choice]]:
    return [(rule.up_to, rule.choices[0]) for rule in rules(times)]


def test_the_fastest_is_chosen_and_every_wire_ranked() -> None:
    (rule,) = rules({8: {I8: 9.0, I16: 8.0, R8: 11.0, R16: 12.0}})
    assert rule == Rule(None, (I16, R8))


def test_a_time_below_that_of_the_barrier_is_the_fastest() -> None:
    (rule,) = rules({8: {I8: -9.0, I16: 8.0}})
    assert rule == Rule(None, (I8,))


def test_a_rule_ends_at_the_last_capacity_that_was_measured_for_it() -> None:
    times = {1: {I8: 8.0, R8: 9.0}, 32: {I8: 9.0, R8: 10.0}, 64: {I8: 12.0, R8: 11.0}, 128: {I8: 20.0, R8: 15.0}}
    assert first_choices(times) == [(32, I8), (None, R8)]


def test_in_a_tie_the_neighbour_stays_and_else_the_fewest_warps_win() -> None:
    near, far = 10.0 * (1 + TIE) - 0.01, 10.0 * (1 + TIE) + 0.01
    assert first_choices({1: {I16: 10.0, I8: near}}) == [(None, I8)]
    assert first_choices({1: {I16: 10.0, I8: far}}) == [(None, I16)]
    assert first_choices({1: {I16: 8.0, I8: 9.0}, 8: {I16: near, I8: 10.0}}) == [(None, I16)]
    assert first_choices({1: {I16: 8.0, I8: 9.0}, 8: {I16: far, I8: 10.0}}) == [(1, I16), (None, I8)]
    assert first_choices({1: {I8: 8.0, R8: 9.0}, 8: {I8: near, R8: 10.0}}) == [(None, I8)]
    fewer = dataclasses.replace(R8, num_sms=32)
    assert first_choices({1: {R8: 10.0, fewer: near}}) == [(None, fewer)]


def tuned(arch: str = "sm90", hidden: int = 7168) -> dict[str, Any]:
    def row(op: str, dtype: str, tokens: int, choice: Choice, us: float) -> dict[str, Any]:
        return {"op": op, "dtype": dtype, "tokens": tokens, "us": us, "choice": dataclasses.asdict(choice)}

    return {
        "arch": arch,
        "hidden": hidden,
        "date": "2026-11-27T10:00:00+00:00",
        "command": "moegen bench tune",
        "machine": {"name": "NVIDIA H200", "gpus": 2, "driver": "580"},
        "versions": {"moegen": "0"},
        "world": {"ranks": 2, "notes": ["a note"]},
        "link": {"what": "link", "gbps": {"push": 369.72}},
        "rows": [
            row("dispatch", "bf16", tokens, choice, us)
            for tokens, us in ((1, 8.0), (128, 20.0))
            for choice, us in ((I8, us), (R8, 16.0))
        ],
    }


def test_figures_replace_what_was_measured_before_and_nothing_else() -> None:
    before = TABLE
    after = updated(before, tuned(hidden=4096))
    assert tuning.parse(tuning.text_of(after)) == after
    old, new = ({entry.key: entry for entry in table.entries} for table in (before, after))
    assert old.keys() == new.keys()
    changed = [key for key in old if old[key] != new[key]]
    assert changed == [("dispatch", "ipc", "bf16", 8192)]
    entry = new[changed[0]]
    assert [(rule.up_to, rule.choices[0]) for rule in entry.rules] == [(1, I8), (None, R8)]
    assert entry.measured[1].us == {"inline 1x8": 20.0, "row 1x8": 16.0}
    assert entry.run.note == "limit in the same run, push: 369.7 GB/s (link); a note"
    assert "H200" in entry.run.machine and entry.run.versions["driver"] == "580"
    assert len(updated(before, tuned(hidden=7168)).entries) == len(before.entries) + 1
    assert updated(before, tuned("sm100")).arch == "sm100"


def test_the_printed_table_marks_the_choice() -> None:
    (printed,) = tables(tuned())
    rows = list(zip(*(column.cells for column in printed.columns), strict=True))
    assert [tuple(map(str.strip, row)) for row in rows] == [("1", "8.00 *", "16.00"), ("128", "20.00", "16.00 *")]


def tune_config(**changes: Any) -> TuneConfig:
    given: dict[str, Any] = {
        "ranks": 2,
        "device": "cpu",
        "processes": False,
        "preset": "",
        "hidden": 7168,
        "num_experts": 256,
        "num_topk": 8,
        "tokens": (1, 8),
        "max_tokens": 0,
        "routings": ("uniform",),
        "ops": 1,
        "replays": 1,
        "calls": 1,
        "link": HOST_LINK,
    }
    return TuneConfig(**{**given, **changes})


def test_candidates_are_every_wire_of_the_spec_with_warps_that_fit_the_row() -> None:
    candidates = tune_config(num_sms=(0, 24)).candidates("bf16")
    assert {choice.wire for choice in candidates} == set(tuning.WIRES)
    assert {choice.num_sms for choice in candidates} == {None, 24}
    short = tune_config(hidden=1024, num_experts=8).candidates("bf16")  # 128 vectors: 4 warps
    assert {choice.warp_groups for choice in short} == {"1x4"} and len(short) == len(tuning.WIRES)


def test_stems_are_those_that_a_run_loads() -> None:
    config = tune_config(wires=("row",), warp_groups=("1x8",))
    specs = [Spec.parse(stem) for stem in config.stems if not stem.startswith(("bench_push", "bench_pull"))]
    assert len(config.stems) == len(specs) + 2
    assert [(spec.op, getattr(spec, "dtype", "")) for spec in specs] == [
        ("barrier", ""),
        ("dispatch", "bf16"),
        ("combine", "bf16"),
        ("combine", "bf16"),
        ("dispatch", "fp8"),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtypes": ("fp4",)},
        {"wires": ("string",)},
        {"warp_groups": ()},
        {"num_sms": (-1,)},
        {"routings": ("uniform", "hot")},
    ],
)
def test_a_run_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        tune_config(**wrong)
