# SPDX-License-Identifier: Apache-2.0
"""The command line; the package's docstring says how it is used."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import scripts.house
from scripts.house.limits import LIMITS
from scripts.house.measures import MEASURES


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m scripts.house", description=scripts.house.__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--markdown", action="store_true", help="print the table for docs")
    how.add_argument("--json", action="store_true", help="print counts and limits for programs")
    how.add_argument("--list", metavar="NAME", choices=MEASURES, help="print the findings of one measure")
    how.add_argument("--check", action="store_true", help="fail where a measure is above its limit")
    told = parser.parse_args(arguments)
    if told.list:
        print(listing(told.list))
        return 0
    counts = {name: len(measure.find()) for name, measure in MEASURES.items()}
    if told.json:
        print(json.dumps({name: {"count": counts[name], "limit": LIMITS.get(name)} for name in counts}, indent=1))
    else:
        print(markdown(counts) if told.markdown else table(counts))
    above = complaints(counts) if told.check else []
    print(*above, sep="\n", end="\n" if above else "", file=sys.stderr)
    return 1 if above else 0


def listing(name: str) -> str:
    found = MEASURES[name].find()
    places, names = ({each[index] for each in found} for index in (0, 2))
    return "\n".join([*map(str, found), f"{len(found)} findings, {len(places)} places, {len(names)} names"])


def table(counts: dict[str, int]) -> str:
    rows = [("measure", "count", "limit", "what"), *_rows(counts)]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    name, count, limit = widths
    return "\n".join(f"{row[0]:{name}}  {row[1]:>{count}}  {row[2]:>{limit}}  {row[3]}" for row in rows)


def markdown(counts: dict[str, int]) -> str:
    rows = [f"| {name} | {count} | {limit} | {what} |" for name, count, limit, what in _rows(counts)]
    return "\n".join(["| measure | count | limit | what |", "|---|---:|---:|---|", *rows])


def _rows(counts: dict[str, int]) -> list[tuple[str, str, str, str]]:
    return [(name, str(count), str(LIMITS.get(name, "-")), MEASURES[name].what) for name, count in counts.items()]


def complaints(counts: dict[str, int]) -> list[str]:
    """What is above its limit or has none; and measures that are gone and have one still."""
    found = []
    for name, count in counts.items():
        if name not in LIMITS:
            found.append(f"{name}: {count} and no limit; add one to scripts/house/limits.py")
        elif count > LIMITS[name]:
            found.append(
                f"{name}: {count}, over the limit of {LIMITS[name]}; see python -m scripts.house --list {name}"
            )
    return found + [f"{name}: a limit of no measure" for name in LIMITS.keys() - counts.keys()]


if __name__ == "__main__":
    sys.exit(main())
