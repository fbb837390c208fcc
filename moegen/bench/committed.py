# SPDX-License-Identifier: Apache-2.0
"""Results that are committed under bench/results, and single figures of them.

A `Value` reads one number, or computes it of several. While it does, `Results` notes which cases it read, so that a
table can say where its figures are from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moegen.bench import committed_text
from moegen.errors import InputError

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A committed result, or one part of a suite's.

    Attributes:
        file: below bench/results; `.json`, or `.txt` where no JSON was kept.
        part: of a suite; empty: the result is not a suite's.
        section: of a text: the line above its rows; empty: the first rows.
    """

    file: str
    part: str = ""
    section: str = ""


@dataclass
class Results:
    """Reads files once.

    Attributes:
        root: of the repository.
        read: (run, routing) of every case that was read since the list was last cleared, in that order.
    """

    root: Path
    read: list[tuple[Run, str]] = field(default_factory=list)
    _loaded: dict[Run, Json] = field(default_factory=dict)
    _files: dict[str, Json] = field(default_factory=dict)

    def of(self, run: Run) -> Json:
        """`cases`, `link`, `machine`, `world`, `date`, as the benchmark wrote them.

        Raises:
            InputError: no such file or part.
        """
        if run not in self._loaded:
            self._loaded[run] = self._load(run)
        return self._loaded[run]

    def _load(self, run: Run) -> Json:
        path = self.root / "bench" / "results" / run.file
        if not path.is_file():
            raise InputError(f"no committed result {path}; give --root the folder of a clone")
        if path.suffix == ".txt":
            return committed_text.parse(path.read_text(), run.part, run.section)
        if run.file not in self._files:  # a suite's is one file for several runs
            self._files[run.file] = json.loads(path.read_text())
        result = self._files[run.file]
        if not run.part:
            return result
        if run.part not in result["parts"]:
            raise InputError(f"{run.file} must have a part {run.part!r}; it has {', '.join(result['parts'])}")
        part: Json = result["parts"][run.part]["result"]
        return part

    def case(self, run: Run, group: str = "cases", **wanted: Any) -> Json:
        """The one case with these fields.

        Raises:
            InputError: there is none, or more than one.
        """
        found: list[Json] = [
            case for case in self.of(run)[group] if all(case.get(key) == value for key, value in wanted.items())
        ]
        if len(found) != 1:
            raise InputError(f"{run} must have one of {group} with {wanted}; it has {len(found)}")
        self.read.append((run, found[0]["routing"]))
        return found[0]


Value = Callable[[Results], float]


def us(run: Run, op: str, tokens: int, routing: str = "uniform", **more: Any) -> Value:
    """Median over replays of the slowest rank, microseconds. `more`: layout, dtype, num_sms, variant."""
    return lambda results: float(results.case(run, op=op, tokens=tokens, routing=routing, **more)["us"]["p50"])


def speed(run: Run, op: str, tokens: int, routing: str = "uniform", **more: Any) -> Value:
    """GB/s of unique remote rows, of the rank that sends or receives most."""
    return lambda results: float(results.case(run, op=op, tokens=tokens, routing=routing, **more)["gbps"]["busiest"])


def share(run: Run, op: str, tokens: int, routing: str = "uniform", **more: Any) -> Value:
    """`speed` over the link's limit in the same part."""

    def value(results: Results) -> float:
        case = results.case(run, op=op, tokens=tokens, routing=routing, **more)
        if "share" in case:  # of a text
            return float(case["share"])
        return float(case["gbps"]["busiest"] / results.of(run)["link"]["gbps"]["push"])

    return value


def link(run: Run) -> Value:
    """GB/s per rank and direction, every rank pushing to every other at once."""
    return lambda results: float(results.of(run)["link"]["gbps"]["push"])


def eager(run: Run, what: str, tokens: int, op: str = "eager", routing: str = "uniform") -> Value:
    """A figure of calls from Python, average over ranks."""
    return lambda results: float(results.case(run, "eager", op=op, tokens=tokens, routing=routing)[what]["avg"])


def exact(run: Run, what: str, layout: str, dtype: str, tokens: int = 4096, routing: str = "uniform") -> Value:
    """Microseconds of mode exact, average over ranks: `us_over_ranks` or `host_us_over_ranks`."""
    return lambda results: float(
        results.case(run, "exact", layout=layout, dtype=dtype, tokens=tokens, routing=routing)[what]["avg"]
    )


def padding(run: Run, tokens: int) -> Value:
    """Of the bytes that a padded pair sends, the share that holds no row."""

    def value(results: Results) -> float:
        sizes = results.case(run, op="pair", tokens=tokens, routing="uniform")["padding"]
        return float(sizes["wasted"] / sizes["padded"])

    return value


def seconds(run: Run) -> Value:
    """How long a suite took."""
    return lambda results: float(results.of(run)["seconds"])


def least(*values: Value) -> Value:
    return lambda results: min(value(results) for value in values)


def most(*values: Value) -> Value:
    return lambda results: max(value(results) for value in values)


def difference(value: Value, other: Value, factor: float = 1.0) -> Value:
    """`value - factor * other`."""
    return lambda results: value(results) - factor * other(results)


def excess(value: Value, than: Value) -> Value:
    """By which share `value` is larger."""
    return lambda results: value(results) / than(results) - 1
