# SPDX-License-Identifier: Apache-2.0
"""Processes forked from one that has imported torch and done nothing else: importing it takes seconds each time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch"])

LONGEST_SECONDS = 240

COMMAND = """
import sys
{before}
from moegen.cli.main import main
sys.argv = {argv!r}
main()
"""


@dataclass(frozen=True)
class Done:
    """What a process that is over has said."""

    returncode: int
    stdout: str
    stderr: str


def take_environment(environment: dict[str, str]) -> None:
    """In such a process: that of the one that asked for it, which may differ from that in which the first one began."""
    os.environ.clear()
    os.environ.update(environment)


def python(code: str) -> Done:
    """Runs Python code in a process of its own; it sees this one's environment and import path.

    Raises:
        TimeoutError: it is not over within 240 s.
    """
    with tempfile.TemporaryDirectory(prefix="moegen-forked-") as name:
        folder = Path(name)
        process = context.Process(target=_run, args=(code, folder, dict(os.environ)))
        process.start()
        process.join(LONGEST_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"not over within {LONGEST_SECONDS} s:\n{code}")
        return Done(process.exitcode, *((folder / stream).read_text() for stream in ("stdout", "stderr")))


def moegen(*words: str, before: str = "") -> Done:
    """The command line in a process of its own, after some Python has run there."""
    return python(COMMAND.format(before=before, argv=["moegen", *words]))


def _run(code: str, folder: Path, environment: dict[str, str]) -> None:
    take_environment(environment)
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(folder / stream, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdin = open(os.devnull)  # noqa: SIM115 - as long as this process lives
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})
