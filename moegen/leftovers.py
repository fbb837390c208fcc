# SPDX-License-Identifier: Apache-2.0
"""Temporary files and folders that do not outlive their processes for long: what a killed one has left is removed by
the next that starts.

An owner holds a lock on what is its own. The system takes the lock away when the last process that holds it ends,
however that ends; so what can be locked has no owner. This also holds where processes do not see each other (PID
namespaces), and for forked processes that use what their parent has made.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "moegen-owned-"
"""Names of what may be removed when its lock is free."""

SHARED = Path("/dev/shm")


def new_name(folder: Path, word: str) -> Path:
    return folder / f"{PREFIX}{word}-{secrets.token_hex(6)}"


def hold(fd: int) -> None:
    """Marks the file, or folder, as in use as long as this descriptor, or a copy of it, is open.

    Raises:
        BlockingIOError: another process is removing it.
    """
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


class OwnedFolder:
    """A new private folder in the temporary folder."""

    def __init__(self, word: str) -> None:
        sweep_once()
        while True:
            self.path = new_name(Path(tempfile.gettempdir()), word)
            self.path.mkdir(mode=0o700)
            try:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # taken for a dead process's
                continue
            try:
                hold(self._fd)
            except BlockingIOError:  # being taken for that
                os.close(self._fd)
                continue
            except OSError:  # a file system without locks: what is left there stays
                return
            if self.path.is_dir():
                return
            os.close(self._fd)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


@contextmanager
def folder(word: str) -> Iterator[Path]:
    """A private folder for what is done inside."""
    made = OwnedFolder(word)
    try:
        yield made.path
    finally:
        made.remove()


def folder_of_this_process(word: str) -> Path:
    """A private folder that is removed when this process exits; forked children leave it alone."""
    made, owner = OwnedFolder(word), os.getpid()
    atexit.register(lambda: made.remove() if os.getpid() == owner else None)
    return made.path


def sweep(parent: Path) -> None:
    """Removes what dead processes of this user have left in a folder."""
    with suppress(OSError), os.scandir(parent) as found:
        for entry in found:
            if entry.name.startswith(PREFIX):
                with suppress(OSError):
                    _remove_if_left(Path(entry.path))


@functools.cache
def sweep_once() -> None:
    """The temporary folder and /dev/shm, the first time that a process asks."""
    with suppress(OSError):  # no temporary folder can be used
        sweep(Path(tempfile.gettempdir()))
    sweep(SHARED)


def _remove_if_left(path: Path) -> None:
    about = path.lstat()
    if about.st_uid != os.getuid() or not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
        return
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        hold(fd)
        if stat.S_ISDIR(about.st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
    finally:
        os.close(fd)
