# SPDX-License-Identifier: Apache-2.0
"""What two revisions make of their manifests' kernels, compared kernel by kernel."""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel_compare import ptx
from kernel_compare.cubin import Cubin
from kernel_compare.revisions import Revision, finish
from kernel_compare.table import table

SAME = "the same machine code"
NAMES = "the same but for which constants the text names"
MOVED = "the same but for where parameters lie"
REGROUPED = "the same but for where parameters lie and which are read together"
DIFFERENT = "differ"
_USED = ("registers", "shared", "spills", "text bytes")


@dataclass
class Kernel:
    """What a revision makes of one stem: digests of what counts, and what it uses."""

    text: str
    parts: dict[str, str]
    used: dict[str, int]
    members: list[ptx.Member]
    symbol: str


@dataclass
class Compared:
    """One kernel of both revisions."""

    stem: str
    old: Kernel | None
    new: Kernel | None
    verdict: str = DIFFERENT
    where: list[str] = field(default_factory=list)
    ptx_diff: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        made = {name: kernel and _to_json(kernel) for name, kernel in (("old", self.old), ("new", self.new))}
        return {"stem": self.stem, "verdict": self.verdict, "differs_in": self.where, "ptx_diff": self.ptx_diff, **made}


def _to_json(kernel: Kernel) -> dict[str, Any]:
    return {"text": kernel.text, "parts": kernel.parts, "used": kernel.used}


def compare(
    old: Revision, new: Revision, stems: tuple[Sequence[str], Sequence[str]], arch: str, names: Mapping[str, str]
) -> list[Compared]:
    """Compiles the stems of both, side by side. `names`: an old stem's new name, where it is another."""
    before, after = _kernels((old, new), stems, arch)
    renamed = {names.get(stem, stem): stem for stem in before}
    compared = []
    for stem in sorted(renamed.keys() | after.keys()):
        pair = Compared(stem, before.get(renamed.get(stem, "")), after.get(stem))
        pair.where = differences(pair.old, pair.new)
        pair.verdict = verdict(pair.where)
        compared.append(pair)
    return compared


def verdict(where: Sequence[str]) -> str:
    """`.nv.constant4` lists the addresses of constants at namespace scope, in the order of the text. Equal instructions
    use these by value: the kernels have no constant arrays.
    """
    if not where:
        return SAME
    return NAMES if list(where) == [".nv.constant4"] else DIFFERENT


def differences(old: Kernel | None, new: Kernel | None) -> list[str]:
    """The parts that are not equal."""
    if old is None or new is None:
        return ["only in the new revision" if old is None else "only in the old revision"]
    parts = [name for name in sorted(old.parts | new.parts) if old.parts.get(name) != new.parts.get(name)]
    return parts + [name for name in old.used if old.used[name] != new.used[name]]


def judge_moved(
    old: Revision, new: Revision, compared: Sequence[Compared], arch: str, names: Mapping[str, str]
) -> None:
    """Looks at the PTX of kernels that differ: whether it is no more than where the parameters lie."""
    changed = [pair for pair in compared if pair.verdict == DIFFERENT and pair.old and pair.new]
    of_old = {new_name: old_name for old_name, new_name in names.items()}
    stems = [of_old.get(pair.stem, pair.stem) for pair in changed], [pair.stem for pair in changed]
    with tempfile.TemporaryDirectory(prefix="compare_kernels_") as folder:
        one, two = _run((old, new), stems, arch, "ptx", Path(folder)) if changed else ({}, {})
        for pair, before, after in zip(changed, *stems, strict=True):
            assert pair.old is not None and pair.new is not None
            sides = ((one[before], pair.old), (two[after], pair.new))
            texts = [(path.read_text(), kernel.symbol, kernel.members) for path, kernel in sides]
            pair.verdict, pair.ptx_diff = moved(texts[0], texts[1])


_Ptx = tuple[str, str, Sequence[ptx.Member]]


def moved(old: _Ptx, new: _Ptx) -> tuple[str, list[str]]:
    """The verdict on two PTX, each with its kernel's symbol and members; and where they differ, if they do."""
    if ptx.places(*old) == ptx.places(*new):
        return MOVED, []
    one, two = ptx.reads(*old), ptx.reads(*new)
    if one == two:
        return REGROUPED, []
    return DIFFERENT, list(difflib.unified_diff(one, two, "old", "new", n=1, lineterm=""))


def _kernels(
    revisions: tuple[Revision, Revision], stems: tuple[Sequence[str], Sequence[str]], arch: str
) -> list[dict[str, Kernel]]:
    with tempfile.TemporaryDirectory(prefix="compare_kernels_") as folder:
        files = _run(revisions, stems, arch, "cubin", Path(folder))
        told = [json.loads((Path(folder) / side / "kernels.json").read_text()) for side in ("old", "new")]
        if told[0]["compiler"] != told[1]["compiler"]:
            raise SystemExit(f"two compilers were loaded: {told[0]['compiler']} and {told[1]['compiler']}")
        return [
            {stem: _kernel(each["kernels"][stem], path.read_bytes()) for stem, path in there.items()}
            for each, there in zip(told, files, strict=True)
        ]


def _run(
    revisions: tuple[Revision, Revision], stems: tuple[Sequence[str], Sequence[str]], arch: str, kind: str, folder: Path
) -> tuple[dict[str, Path], dict[str, Path]]:
    """A process per revision, both at once; the file of each stem."""
    running = []
    files: list[dict[str, Path]] = []
    for side, revision, wanted in zip(("old", "new"), revisions, stems, strict=True):
        (folder / side).mkdir()
        running.append((revision.start("compile_kernels", folder / side, arch, kind), "\n".join(wanted)))
        files.append({stem: folder / side / f"{stem}.{kind}" for stem in wanted})
    finish(running)
    return files[0], files[1]


def _kernel(told: Mapping[str, Any], content: bytes) -> Kernel:
    cubin = Cubin(content, told["symbol"])
    resources = told["resources"]
    used = {
        "registers": resources["registers"],
        "shared": cubin.bytes_of(".nv.shared."),
        "spills": resources["spill_bytes"],
        "text bytes": cubin.bytes_of(".text."),
        "block threads": told["launch"][0],
        "dynamic shared": told["launch"][1],
    }
    members = [ptx.Member(*member) for member in told["members"]]
    return Kernel(told["text"], cubin.parts, used, members, told["symbol"])


def report(compared: Sequence[Compared], *, with_moved: bool) -> list[str]:
    """The table of what is not the same, and the closing line."""
    rows = [_row(pair) for pair in compared if pair.verdict != SAME]
    head = ("kernel", "verdict", "differs in", *_USED)
    others = sum(pair.old is not None and pair.new is not None and pair.old.text != pair.new.text for pair in compared)
    lines = table(head, rows) if rows else []
    lines += [f"{others} kernels have another text"] if others else []
    return [*lines, closing(compared, with_moved=with_moved)]


def _row(pair: Compared) -> tuple[str, ...]:
    used = [_change(pair.old.used[name], pair.new.used[name]) if pair.old and pair.new else "" for name in _USED]
    return (pair.stem, pair.verdict, ", ".join(pair.where), *used)


def _change(old: int, new: int) -> str:
    return str(old) if old == new else f"{old} -> {new}"


def closing(compared: Sequence[Compared], *, with_moved: bool) -> str:
    numbers = {verdict: sum(pair.verdict == verdict for pair in compared) for verdict in _verdicts(with_moved)}
    return f"{len(compared)} kernels: " + ", ".join(f"{number} {verdict}" for verdict, number in numbers.items())


def _verdicts(with_moved: bool) -> tuple[str, ...]:
    return (SAME, NAMES, MOVED, REGROUPED, DIFFERENT) if with_moved else (SAME, NAMES, DIFFERENT)
