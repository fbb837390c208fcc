# SPDX-License-Identifier: Apache-2.0
"""Is a file or folder safe to execute from? It must be this user's, writable by nobody else, and no symlink."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from moegen import env
from moegen.errors import CacheError

_TRUST = "set MOEGEN_CACHE_TRUST=1 if you trust everybody who can write there"


def check_folder(path: Path) -> None:
    """Raises CacheError if `path` is not a folder that only this user can write to, OSError if it is not there."""
    if env.cache_trust():
        return
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise CacheError(f"{path} is a symlink; moegen executes what it holds, so name the folder itself or {_TRUST}")
    if not stat.S_ISDIR(found.st_mode):
        raise CacheError(f"{path} is no folder")
    _check_owner(path, found)


def read(path: Path) -> bytes:
    """The bytes of a regular file that only this user can write to.

    Raises: as `opened`.
    """
    with opened(path) as file:
        return file.read()


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file that only this user can write to, open for reading.

    Raises:
        CacheError: it is somebody else's, writable by others, or a symlink.
        OSError: it cannot be read.
    """
    trusted = env.cache_trust()
    # O_NONBLOCK: a FIFO in the file's place must not hang the reader.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | (0 if trusted else getattr(os, "O_NOFOLLOW", 0))
    if not trusted and path.is_symlink():
        raise CacheError(f"{path} is a symlink; moegen executes what it holds, so it must be a file, or {_TRUST}")
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise CacheError(f"{path} is no regular file")
        if not trusted:
            _check_owner(path, found)
        yield file


def _check_owner(path: Path, found: os.stat_result) -> None:
    if not hasattr(os, "geteuid"):
        return
    if found.st_uid != os.geteuid():
        raise CacheError(f"{path} belongs to user {found.st_uid}, not to you ({os.geteuid()}); remove it or {_TRUST}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheError(f"{path} is writable by others ({stat.filemode(found.st_mode)}); chmod go-w it or {_TRUST}")
