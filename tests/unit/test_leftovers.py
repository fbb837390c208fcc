# SPDX-License-Identifier: Apache-2.0
"""Temporary folders: made when first needed, and removed by the next process if their own was killed."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moegen import leftovers
from moegen.codegen.render import Source
from moegen.compile import binary, cache, host
from moegen.compile.target import Target
from moegen.errors import CompileError
from moegen.runtime.processes import gone, this_process


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder with nothing in it."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(leftovers.tempfile, "tempdir", str(folder))
    leftovers.sweep_once.cache_clear()
    return folder


def killed_inside(make: Callable[[], object]) -> None:
    """Runs it in a forked process that ends at once after, as a killed one does."""
    child = os.fork()
    if child == 0:
        make()
        os._exit(0)
    os.waitpid(child, 0)


def test_the_folder_of_a_killed_process_is_swept(temporary: Path) -> None:
    killed_inside(lambda: (leftovers.OwnedFolder("word").path / "file").write_text("x"))
    assert len(list(temporary.iterdir())) == 1
    with leftovers.folder("other") as mine:
        assert list(temporary.iterdir()) == [mine]
        leftovers.sweep(temporary)
        assert mine.is_dir()
    assert list(temporary.iterdir()) == []


def test_a_named_file_of_a_killed_process_is_swept(temporary: Path) -> None:
    def hold() -> None:
        leftovers.hold(os.open(leftovers.new_name(temporary, "memory"), os.O_RDWR | os.O_CREAT))

    killed_inside(hold)
    foreign = temporary / "moegen-of-someone-else"
    foreign.touch()
    hold()
    assert len(list(temporary.iterdir())) == 3
    leftovers.sweep(temporary)
    assert len(list(temporary.iterdir())) == 2 and foreign.exists()


def test_a_forked_child_keeps_what_its_parent_made(temporary: Path) -> None:
    made = leftovers.folder_of_this_process("word")
    killed_inside(atexit._run_exitfuncs)
    leftovers.sweep(temporary)
    assert made.is_dir()


def test_a_sound_cache_needs_no_temporary_folder(temporary: Path) -> None:
    assert cache.look_up(Target("sm90"), "stem", "k" * 64) is None
    assert list(temporary.iterdir()) == []


def test_a_process_that_ends_leaves_nothing(temporary: Path) -> None:
    code = "from moegen.compile import cache; print(cache.temporary_store().root.is_dir())"
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
    assert list(temporary.iterdir()) == []


def test_a_compiler_that_hangs_is_ended(
    temporary: Path, tmp_path: Path, kernel: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what it has started."""
    script, started = tmp_path / "c++", tmp_path / "started"
    script.write_text(
        f'#!/bin/sh\ncase "$1" in -*version|-dumpmachine) exec c++ "$1";; esac\nsleep 60 &\necho $! > {started}\nwait\n'
    )
    script.chmod(0o700)
    monkeypatch.setenv("MOEGEN_CXX", str(script))
    monkeypatch.setattr(host, "LONGEST_SECONDS", 0.5)
    with pytest.raises(CompileError, match=r"did not end within 0\.5 s"):
        binary.obtain(kernel(), Target("host"))
    about = Path(f"/proc/{started.read_text().strip()}/stat")
    assert not about.exists() or about.read_text().split()[2] == "Z"  # not collected yet
    assert list(temporary.iterdir()) == []


def test_a_process_that_has_ended_is_known() -> None:
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(theirs, repr(tuple(this_process())).encode())
        os._exit(0)
    name = type(this_process())(*eval(os.read(ours, 1000)))
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert gone([this_process(), None, name]) == (2,)  # not collected yet
    os.waitpid(child, 0)
    assert gone([this_process(), name, name._replace(machine=("another", ""))]) == (1,)
    assert gone([this_process()._replace(started=1)]) == (0,)  # its number was given again
