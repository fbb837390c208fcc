# SPDX-License-Identifier: Apache-2.0
"""What calls on CPU ranks launch in two revisions: kernels, sizes, and arguments by name."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kernel_compare.revisions import Revision, finish
from kernel_compare.table import table

Launch = Mapping[str, Any]
_SIZES = ("blocks", "threads", "shared")


@dataclass(frozen=True)
class Difference:
    """In one argument, or another property, of launches of a kernel."""

    stem: str
    what: str
    old: str
    new: str


@dataclass
class Found:
    """What the comparison has found."""

    calls: int
    launches: int
    differences: Counter[Difference] = field(default_factory=Counter)
    first: dict[Difference, str] = field(default_factory=dict)
    """The first call of each."""
    dropped: dict[str, set[str]] = field(default_factory=dict)
    """Members that parameter structs have no more, by family and op."""

    def add(self, call: str, difference: Difference) -> None:
        self.differences[difference] += 1
        self.first.setdefault(difference, call)

    def to_json(self) -> dict[str, Any]:
        found = [
            {**vars(difference), "launches": number, "first_call": self.first[difference]}
            for difference, number in self.differences.items()
        ]
        dropped = {kind: sorted(names) for kind, names in self.dropped.items()}
        return {"calls": self.calls, "launches": self.launches, "differences": found, "dropped": dropped}


def record(revision: Revision, pattern: str) -> dict[str, Any]:
    """The calls and launches of the cases whose names match."""
    with tempfile.TemporaryDirectory(prefix="compare_kernels_") as folder:
        made = Path(folder) / "calls.json"
        finish([(revision.start("record_calls", made, pattern), "")])
        recorded: dict[str, Any] = json.loads(made.read_text())
        return recorded


def compare(old: Mapping[str, Any], new: Mapping[str, Any], names: Mapping[str, str]) -> Found:
    """Of two records. `names`: an old stem's new name, where it is another."""
    found = Found(new["calls"], len(new["launches"]))
    if old["calls"] != new["calls"]:
        found.add("", Difference("", "calls", str(old["calls"]), str(new["calls"])))
    before, after = _by_call(old["launches"], names), _by_call(new["launches"], {})
    for call in dict.fromkeys([*before, *after]):
        for one, two in zip_longest(before.get(call, []), after.get(call, [])):
            _compare_launch(found, call, one, two)
    return found


def _by_call(launches: Sequence[Launch], names: Mapping[str, str]) -> dict[str, list[Launch]]:
    found: dict[str, list[Launch]] = {}
    for launch in launches:
        renamed = {**launch, "stem": names.get(launch["stem"], launch["stem"])}
        found.setdefault(launch["call"], []).append(renamed)
    return found


def _compare_launch(found: Found, call: str, old: Launch | None, new: Launch | None) -> None:
    stems = [launch["stem"] if launch else "no launch" for launch in (old, new)]
    if old is None or new is None or stems[0] != stems[1]:
        found.add(call, Difference(stems[0], "kernel", *stems))
        return
    for name in _SIZES:
        if old[name] != new[name]:
            found.add(call, Difference(stems[0], name, str(old[name]), str(new[name])))
    for name, one, two in _arguments(old["arguments"], new["arguments"]):
        if two == "dropped":
            found.dropped.setdefault("_".join(stems[0].split("_")[:2]), set()).add(name)
        elif one != two:
            found.add(call, Difference(stems[0], name, one, two))


def _arguments(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(name, old, new) of each member of either struct."""
    for name in dict.fromkeys([*old, *new]):
        yield name, _said(old[name]) if name in old else "not there", _said(new[name]) if name in new else "dropped"


def _said(values: Sequence[int | str]) -> str:
    return " ".join(map(str, values))


def report(found: Found) -> list[str]:
    """What differs, what was dropped, and the closing line."""
    rows = [
        (difference.stem, difference.what, difference.old, difference.new, str(number), found.first[difference])
        for difference, number in found.differences.items()
    ]
    lines = table(("kernel", "what", "old", "new", "launches", "first call"), rows) if rows else []
    lines += [f"dropped from {kind}: {', '.join(sorted(names))}" for kind, names in sorted(found.dropped.items())]
    outcome = "other arguments, see above" if rows else "the same arguments"
    return [*lines, f"{found.calls} calls, {found.launches} launches: {outcome}"]
