# SPDX-License-Identifier: Apache-2.0
"""Compares the machine code, or the kernels' arguments, that two revisions make. Needs no GPU.

    python scripts/compare_kernels.py OLD [NEW]          every kernel of each revision's manifest, compiled by NVRTC
    python scripts/compare_kernels.py OLD --moved        members of parameter structs may have moved: compares PTX too
    python scripts/compare_kernels.py OLD --calls        what calls on CPU ranks launch, and with which arguments

OLD and NEW are git revisions; NEW is the working tree if it is left out. It runs with the interpreter, NVRTC and C++
compiler that are there; nothing of the revisions is installed. Exits with 1 if something differs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from kernel_compare import calls, machine_code
from kernel_compare.revisions import Revision, opened


def main(words: Sequence[str] | None = None) -> int:
    given = _arguments(words)
    with opened(given.old) as old, opened(given.new) as new:
        return _compare_calls(old, new, given) if given.calls else _compare_kernels(old, new, given)


def _compare_kernels(old: Revision, new: Revision, given: argparse.Namespace) -> int:
    names = _names(given.map)
    stems = [[stem for stem in revision.stems() if fnmatch(stem, given.only)] for revision in (old, new)]
    compared = machine_code.compare(old, new, (stems[0], stems[1]), given.arch, names)
    if given.moved:
        machine_code.judge_moved(old, new, compared, given.arch, names)
    print("\n".join(machine_code.report(compared, with_moved=given.moved)))
    if given.json:
        given.json.write_text(json.dumps([pair.to_json() for pair in compared], indent=1) + "\n")
    return int(not compared or any(pair.verdict == machine_code.DIFFERENT for pair in compared))


def _compare_calls(old: Revision, new: Revision, given: argparse.Namespace) -> int:
    found = calls.compare(calls.record(old, given.only), calls.record(new, given.only), _names(given.map))
    print("\n".join(calls.report(found)))
    if given.json:
        given.json.write_text(json.dumps(found.to_json(), indent=1) + "\n")
    return int(found.launches == 0 or bool(found.differences))


def _names(path: Path | None) -> dict[str, str]:
    """Old stem to new one, of the lines `old=new` of a file."""
    lines = path.read_text().split() if path else []
    return dict(line.split("=", 1) for line in lines)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", help="a git revision")
    parser.add_argument("new", metavar="NEW", nargs="?", help="another; the working tree if it is left out")
    parser.add_argument("--arch", default="sm90", help="the target to compile for (sm90)")
    parser.add_argument("--only", metavar="PATTERN", default="*", help="stems, or cases of --calls, as in a shell")
    parser.add_argument("--map", metavar="FILE", type=Path, help="lines OLD=NEW: stems that have another name now")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where to write all that was compared")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--moved", action="store_true", help="members of parameter structs may have moved")
    mode.add_argument("--calls", action="store_true", help="compare the arguments of launches")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
