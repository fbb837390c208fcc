# SPDX-License-Identifier: Apache-2.0
"""Which wire and how many warps are fastest for which shape: committed tables, written by `moegen bench tune`.

The tables are part of the package, so ranks that run the same version choose alike.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moegen.errors import InputError
from moegen.kernels.ll import SCALES_PER_WORD, LowLatencyCombine, LowLatencyDispatch
from moegen.kernels.spec import MAX_BLOCK_WARPS, Spec, WarpGroups

SCHEMA = 1
"""Number of the layout of the files."""

DEFAULT_ARCH = "sm90"
"""Whose table serves architectures that have none."""

OPS: dict[str, type[Spec]] = {"dispatch": LowLatencyDispatch, "combine": LowLatencyCombine}
DTYPES = {"dispatch": ("bf16", "fp8"), "combine": ("bf16",)}
"""Op -> dtypes that each table has an entry for; the kinds of FP8 differ by a few scales and share one."""

WIRES = LowLatencyDispatch.words("wire")


@dataclass(frozen=True)
class Choice:
    """How a kernel is made and launched.

    Attributes:
        wire: a word of the Spec.
        warp_groups: GROUPSxWARPS; `moegen.select` fits the warps to shorter and longer rows.
        num_sms: thread blocks at most; None: as many as are useful.
    """

    wire: str
    warp_groups: str
    num_sms: int | None = None

    def __post_init__(self) -> None:
        _require(self.wire in WIRES, f"wire is one of {', '.join(WIRES)}; got {self.wire!r}")
        _require(self.num_sms is None or self.num_sms >= 1, f"num_sms is null or 1 and more; got {self.num_sms}")
        _require(1 <= self.warps <= MAX_BLOCK_WARPS, f"warps are 1..{MAX_BLOCK_WARPS}: {self.warp_groups}")

    @property
    def warps(self) -> int:
        """Warps of a block."""
        parsed = WarpGroups.parse(self.warp_groups)
        return parsed.groups * parsed.warps

    def __str__(self) -> str:
        return f"{self.wire} {self.warp_groups}" + ("" if self.num_sms is None else f" {self.num_sms} SMs")


@dataclass(frozen=True)
class Rule:
    """What serves capacities up to a limit.

    Attributes:
        up_to: tokens per rank; None: any.
        choices: the best first, one per wire that was measured: the others are for who asks for that wire, or has a
            GPU that lacks the better one.
    """

    up_to: int | None
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        wires = [choice.wire for choice in self.choices]
        _require(bool(wires) and len(set(wires)) == len(wires), f"a rule has one choice per wire; got {wires}")


@dataclass(frozen=True)
class Run:
    """Where an entry's figures come from.

    Attributes:
        machine: the GPUs, in words.
        ranks: how many measured.
        date: ISO 8601.
        command: that measures the same again.
        versions: of moegen, driver and compiler.
        note: what a reader must know to judge the figures.
    """

    machine: str
    ranks: int
    date: str
    command: str
    versions: dict[str, str]
    note: str = ""


@dataclass(frozen=True)
class Measured:
    """Microseconds of each candidate, by its name.

    Attributes:
        what: "dispatch", "combine", or "pair" (both).
        tokens: per rank, and the capacity.
    """

    what: str
    tokens: int
    us: dict[str, float]

    def __post_init__(self) -> None:
        _require(self.what in (*OPS, "pair"), f"what was measured is dispatch, combine or pair; got {self.what!r}")
        _require(self.tokens >= 1 and bool(self.us), f"no figures for {self.tokens} tokens")


@dataclass(frozen=True)
class Entry:
    """The rules of one op, dtype and length of a row, and why they are what they are.

    Attributes:
        row_bytes: of one token's elements as they travel, without scales.
        rules: by rising capacity; the last has no limit.
    """

    op: str
    path: str
    dtype: str
    row_bytes: int
    rules: tuple[Rule, ...]
    run: Run
    measured: tuple[Measured, ...]

    def __post_init__(self) -> None:
        _require(self.op in OPS and self.dtype in DTYPES[self.op], f"no kernels for {self.op} of {self.dtype}")
        _require(self.path in OPS[self.op].words("path"), f"no path {self.path!r}")
        _require(self.row_bytes >= 1, f"row_bytes are 1 and more; got {self.row_bytes}")
        limits = [rule.up_to for rule in self.rules]
        _require(bool(limits) and limits[-1] is None, "the last rule of an entry has no limit (null)")
        below = [limit for limit in limits[:-1] if limit is not None]
        _require(
            len(below) == len(limits) - 1 and below == sorted(set(below)) and all(limit >= 1 for limit in below),
            f"limits rise from 1 on; got {limits}",
        )

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.op, self.path, self.dtype, self.row_bytes


@dataclass(frozen=True)
class Table:
    """The entries of one family on one architecture."""

    family: str
    arch: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        keys = [entry.key for entry in self.entries]
        _require(len(set(keys)) == len(keys), "an op, path, dtype and row length has one entry")
        missing = {(op, dtype) for op in OPS for dtype in DTYPES[op]} - {(e.op, e.dtype) for e in self.entries}
        _require(not missing, f"no entry for {sorted(missing)}")

    def ranked(self, op: str, path: str, dtype: str, row_bytes: int, max_tokens: int) -> tuple[Choice, ...]:
        """The choices for a shape, the best first. Of the lengths of a row that were measured, the one that differs by
        the smallest factor counts. Whether such kernels exist is for the Spec to say.
        """
        kind = "fp8" if SCALES_PER_WORD.get(dtype) else "bf16"
        fitting = [entry for entry in self.entries if (entry.op, entry.dtype) == (op, kind)]
        nearest = min(
            fitting, key=lambda entry: (entry.path != path, _factor(entry.row_bytes, row_bytes), entry.row_bytes)
        )
        return next(rule.choices for rule in nearest.rules if rule.up_to is None or max_tokens <= rule.up_to)

    @property
    def limits(self) -> list[int]:
        """Every capacity above which something else may be chosen."""
        return sorted({rule.up_to for entry in self.entries for rule in entry.rules if rule.up_to is not None})


def path_of(arch: str) -> Path:
    """Where the table of an architecture is, or would be."""
    return Path(__file__).with_name(f"ll_{arch}.json")


@functools.cache
def table(arch: str = DEFAULT_ARCH) -> Table:
    """The package's table for an architecture, or DEFAULT_ARCH's where it has none."""
    path = path_of(arch)
    return parse(path.read_text() if path.is_file() else path_of(DEFAULT_ARCH).read_text())


def parse(text: str) -> Table:
    """The table that a file holds.

    Raises:
        InputError: it is not such a file; the text says what is wrong.
    """
    try:
        data = json.loads(text)
        schema = data.pop("schema")
        _require(schema == SCHEMA, f"layout {schema}, and this version reads {SCHEMA}")
        return Table(**data | {"entries": tuple(_entry(**entry) for entry in data["entries"])})
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(f"this is no tuning table: {error}") from error


def text_of(made: Table) -> str:
    """What `parse` reads: JSON whose innermost objects have a line each."""
    text = json.dumps({"schema": SCHEMA} | asdict(made), indent=1)
    return re.sub(r"\{[^{}]*\}", lambda inner: re.sub(r"\n\s*", " ", inner[0]), text) + "\n"


def _entry(*, rules: list[dict[str, Any]], run: dict[str, Any], measured: list[dict[str, Any]], **key: Any) -> Entry:
    return Entry(
        **key,
        rules=tuple(Rule(rule["up_to"], tuple(Choice(**choice) for choice in rule["choices"])) for rule in rules),
        run=Run(**run),
        measured=tuple(Measured(**row) for row in measured),
    )


def _factor(a: int, b: int) -> float:
    return max(a, b) / max(min(a, b), 1)


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ValueError(why)
