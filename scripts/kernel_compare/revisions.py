# SPDX-License-Identifier: Apache-2.0
"""A revision's tree, and programs that run with its moegen."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SCRIPTS = ROOT / "scripts"
_KEPT = ("MOEGEN_CACHE_DIR", "MOEGEN_CXX")


@dataclass(frozen=True)
class Revision:
    """A tree of files, and what to call it."""

    name: str
    tree: Path

    def stems(self) -> list[str]:
        """The kernels of its manifest."""
        return sorted(json.loads((self.tree / "generated" / "manifest.json").read_text())["kernels"])

    def start(self, worker: str, *arguments: str | Path) -> subprocess.Popen[str]:
        """A program of `workers/`, which finds this revision's moegen and no other; it reads its stdin."""
        command = [sys.executable, "-m", f"kernel_compare.workers.{worker}", *map(str, arguments)]
        return subprocess.Popen(command, cwd=self.tree, env=self._environment(), stdin=subprocess.PIPE, text=True)

    def _environment(self) -> dict[str, str]:
        """This one's, without what decides what moegen makes."""
        kept = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith("MOEGEN_")}
        return {**kept, "PYTHONPATH": f"{self.tree}{os.pathsep}{_SCRIPTS}", "PYTHONDONTWRITEBYTECODE": "1"}


def finish(processes: Sequence[tuple[subprocess.Popen[str], str]]) -> None:
    """Gives each program its stdin and waits for all; ends the script if one fails."""
    for process, given in processes:
        assert process.stdin is not None
        process.stdin.write(given)
        process.stdin.close()
    codes = [process.wait() for process, _ in processes]
    if any(codes):
        raise SystemExit("a revision's program failed; what it said is above")


@contextmanager
def opened(name: str | None) -> Iterator[Revision]:
    """A git revision's files in a folder of their own, or the working tree as it is."""
    if name is None:
        yield Revision("working tree", ROOT)
        return
    done = subprocess.run(["git", "-C", str(ROOT), "archive", "--format=tar", name], stdout=subprocess.PIPE)
    if done.returncode != 0:
        raise SystemExit(f"no revision {name!r} here")
    with tempfile.TemporaryDirectory(prefix="compare_kernels_") as folder:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
        yield Revision(name, Path(folder).resolve())
