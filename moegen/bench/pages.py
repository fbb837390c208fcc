# SPDX-License-Identifier: Apache-2.0
"""Published tables, written from the committed results into the pages that show them.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is between them is this module's. Below each it
says which files the figures are from, on which GPUs, when, and with which routing: a figure cannot have another label
than the one that it was measured with. Sentences that state figures are compared, not written.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moegen.bench.committed import Results, Run, Value
from moegen.errors import InputError

PAGES = ("README.md", "bench/results/README.md", "docs/benchmarks.md", "docs/design.md")
_BLOCK = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_WIDTH = 120

Cell = str | Callable[[Results], str]


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: in the page's marker.
        head: titles of the columns.
        rows: cells, as many as `head`.
        figures: what the figures are, for the line below.
    """

    name: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    figures: str = "medians of the slowest rank"

    def text(self, results: Results) -> str:
        results.read.clear()
        rows = [[cell if isinstance(cell, str) else cell(results) for cell in row] for row in self.rows]
        for row in rows:
            if len(row) != len(self.head):
                raise InputError(
                    f"rows of table {self.name} must have {len(self.head)} cells; {row[0]!r} has {len(row)}"
                )
        lines = [self.head, ["---"] * len(self.head), *rows]
        table = "\n".join(re.sub(r"  +", " ", f"| {' | '.join(line)} |") for line in lines)
        return f"{table}\n\n{_origin(results, self.figures)}\n"


@dataclass(frozen=True)
class Reading:
    """A sentence, or a part of one, that states figures.

    Attributes:
        page: where it stands.
        words: with a replacement field of `str.format` for each value.
        values: in that order.
    """

    page: str
    words: str
    values: tuple[Value, ...]

    def text(self, results: Results) -> str:
        return self.words.format(*(value(results) for value in self.values))


def number(value: Value, digits: int = 1) -> Cell:
    return lambda results: f"{value(results):,.{digits}f}"


def percent(value: Value) -> Cell:
    return lambda results: f"{value(results):.0%}"


def over(value: Value, target: float) -> Cell:
    """How much more than the target, or that it is met: only if the figure itself, not its rounding, is."""

    def text(results: Results) -> str:
        measured = value(results)
        if measured <= target:
            return "met"
        share = f"{measured / target - 1:.0%}"
        return "< 1%" if share == "0%" else share

    return text


def joined(*cells: Cell, by: str = " / ") -> Cell:
    return lambda results: by.join(cell if isinstance(cell, str) else cell(results) for cell in cells)


def with_percent(value: Value, share: Value, digits: int = 0, form: str = "{}, {}") -> Cell:
    return lambda results: form.format(f"{value(results):,.{digits}f}", f"{share(results):.0%}")


def rendered(page: str, tables: Sequence[Table], results: Results) -> str:
    """The page with every table written anew.

    Raises:
        InputError: a marker names no table.
    """
    by_name = {table.name: table for table in tables}

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in by_name:
            raise InputError(f"<!-- table: {name} --> must name one of {', '.join(by_name)}")
        return f"<!-- table: {name} -->\n{by_name[name].text(results)}<!-- end -->"

    return _BLOCK.sub(block, page)


def problems(results: Results, tables: Sequence[Table], readings: Sequence[Reading]) -> list[str]:
    """What pages and results disagree about: a diff of each page, each sentence that is not there, each table that no
    page shows. Empty: nothing.
    """
    shown, found = set[str](), list[str]()
    texts = {page: _read(results.root, page) for page in PAGES}
    for page, text in texts.items():
        shown |= set(_BLOCK.findall(text))
        old, new = (one.splitlines(keepends=True) for one in (text, rendered(text, tables, results)))
        if diff := "".join(difflib.unified_diff(old, new, f"{page}, as it is", f"{page}, by the results", n=0)):
            found.append(diff)
    found += [f"no page shows table {table.name}\n" for table in tables if table.name not in shown]
    for reading in readings:
        words = reading.text(results)
        if _plain(words) not in _plain(texts[reading.page]):
            found.append(f"{reading.page} must say, by the results: {words}\n")
    return found


def write(results: Results, tables: Sequence[Table]) -> list[str]:
    """Writes the tables into their pages; gives the pages that changed."""
    changed = []
    for page in PAGES:
        before = _read(results.root, page)
        after = rendered(before, tables, results)
        if after != before:
            (results.root / page).write_text(after)
            changed.append(page)
    return changed


def _read(root: Path, page: str) -> str:
    path = root / page
    if not path.is_file():
        raise InputError(f"no page {path}; give --root the folder of a clone")
    return path.read_text()


def _plain(text: str) -> str:
    """Without line breaks, which are the page's matter."""
    return " ".join(text.split())


def _origin(results: Results, figures: str) -> str:
    """Files, GPUs, days and routings of everything that was read; the link's limit where it is one file's."""
    runs = list(dict.fromkeys(run for run, _ in results.read))
    routings = list(dict.fromkeys(routing for _, routing in results.read))
    machines = list(dict.fromkeys(_machine(results, run) for run in runs))
    limits = [results.of(run)["link"]["gbps"]["push"] for run in runs if "link" in results.of(run)]
    names = ", ".join(dict.fromkeys(f"`{_stem(run)}`" for run in runs))
    words = [" and ".join(machines), f"{' and '.join(routings)} routing", figures]
    if len({run.file for run in runs}) == 1 and limits:
        low, high = f"{min(limits):.0f}", f"{max(limits):.0f}"
        words.append(f"link {low if low == high else f'{low} to {high}'} GB/s")
    return "\n".join(textwrap.wrap(f"From {names}: {', '.join(words)}.", _WIDTH, break_on_hyphens=False))


def _stem(run: Run) -> str:
    """A file's name without its ending, unless only the text was kept."""
    name = run.file.removesuffix(".json")
    return f"{name}, {run.section}" if run.section else name


def _machine(results: Results, run: Run) -> str:
    result = results.of(run)
    at, day = result["machine"], result["date"][:10]
    return f"{at['gpus']} {at['name'].removesuffix(' 80GB HBM3')}, {day}"
