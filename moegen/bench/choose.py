# SPDX-License-Identifier: Apache-2.0
"""From the microseconds of `moegen bench tune` to the rules of a tuning table. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from rich.table import Table as RichTable

from moegen.bench.report import columns, figures, titled
from moegen.select import row_bytes
from moegen.tuning import Choice, Entry, Measured, Rule, Run, Table

Json = dict[str, Any]
Times = Mapping[int, Mapping[Choice, float]]
"""Capacity -> microseconds of each candidate."""

TIE = 0.02
"""Times that differ by less are alike: medians of the same kernel differ by as much from one run to the next."""


def rules(times: Times) -> tuple[Rule, ...]:
    """One rule for every run of capacities with the same choices; it ends at the last of them that was measured.

    Per wire the fastest candidate counts, then wires are ranked. What is within TIE of the fastest is as good: then the
    choice of the next smaller capacity stays, else the fewest warps win, which leave the most room.
    """
    made: list[Rule] = []
    before: tuple[Choice, ...] = ()
    for tokens in sorted(times):
        before = _ranked(times[tokens], before)
        if made and made[-1].choices == before:
            made.pop()
        made.append(Rule(tokens, before))
    return (*made[:-1], replace(made[-1], up_to=None))


def updated(table: Table, result: Json) -> Table:
    """The table with new entries for what was measured. Entries of other ops, dtypes and lengths of a row stay."""
    new = tuple(_entries(result))
    keys = {entry.key for entry in new}
    kept = (entry for entry in table.entries if entry.key not in keys)
    ordered = sorted((*kept, *new), key=lambda entry: (entry.op == "combine", entry.dtype, entry.row_bytes))
    return Table(table.family, result["arch"], tuple(ordered))


def tables(result: Json) -> Iterator[RichTable]:
    """The figures, a table for each op and dtype; the choice is marked."""
    for (op, dtype), times in _times(result).items():
        candidates = list(dict.fromkeys(choice for row in times.values() for choice in row))
        table = titled(f"{op}, {dtype}, hidden {result['hidden']}: us, median of the slowest rank; * is chosen")
        columns(table, ("tokens", *map(str, candidates)), left=0)
        made = rules(times)
        for tokens, row in sorted(times.items()):
            chosen = next(rule.choices[0] for rule in made if rule.up_to is None or tokens <= rule.up_to)
            cells = zip(candidates, figures([row[choice] for choice in candidates], 2), strict=True)
            table.add_row(str(tokens), *(f"{text}{' *' if choice == chosen else '  '}" for choice, text in cells))
        yield table


def _ranked(us: Mapping[Choice, float], before: tuple[Choice, ...]) -> tuple[Choice, ...]:
    best = []
    for wire in dict.fromkeys(choice.wire for choice in us):
        of_wire = {choice: time for choice, time in us.items() if choice.wire == wire}
        best.append(_best(of_wire, next((choice for choice in before if choice.wire == wire), None)))
    first = _best({choice: us[choice] for choice in best}, _like(before[:1], best))
    rest = sorted((choice for choice in best if choice != first), key=lambda choice: us[choice])
    return (first, *rest)


def _like(before: tuple[Choice, ...], choices: list[Choice]) -> Choice | None:
    """Which of the choices has the wire that was chosen before."""
    return next((choice for choice in choices if before and choice.wire == before[0].wire), None)


def _best(us: Mapping[Choice, float], before: Choice | None) -> Choice:
    fastest = min(us.values())
    limit = fastest + TIE * abs(fastest)  # on a busy CPU the barrier may seem to take longer than the op behind it
    near = [choice for choice, time in us.items() if time <= limit]
    if before in near:
        return before
    return min(near, key=lambda choice: (choice.warps, choice.num_sms or float("inf"), us[choice]))


def _times(result: Json) -> dict[tuple[str, str], dict[int, dict[Choice, float]]]:
    found: dict[tuple[str, str], dict[int, dict[Choice, float]]] = {}
    for row in result["rows"]:
        of_op = found.setdefault((row["op"], row["dtype"]), defaultdict(dict))
        of_op[row["tokens"]][Choice(**row["choice"])] = row["us"]
    return found


def _entries(result: Json) -> Iterator[Entry]:
    at, world = result["machine"], result["world"]
    known = result["versions"] | ({"driver": at["driver"]} if "driver" in at else {})
    machine = f"{world['ranks']} ranks on {at['gpus'] or 'no'} GPUs: {at['name']}"
    limit = f"limit in the same run, push: {result['link']['gbps']['push']:.1f} GB/s ({result['link']['what']})"
    note = "; ".join((limit, *world["notes"]))
    run = Run(machine, world["ranks"], result["date"], result["command"], known, note)
    for (op, dtype), times in _times(result).items():
        measured = tuple(
            Measured(op, tokens, {str(choice): round(us, 2) for choice, us in row.items()})
            for tokens, row in sorted(times.items())
        )
        yield Entry(op, "ipc", dtype, row_bytes(result["hidden"], dtype), rules(times), run, measured)
