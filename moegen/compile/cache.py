# SPDX-License-Identifier: Apache-2.0
"""The disk cache of binaries: one folder per binary, committed by renaming it into place. No locks; works on NFS.

    <root>/v<schema>/<target>/<stem>-<key16>/{kernel.cu, kernel.cubin | kernel.so, meta.json}
    <root>/v<schema>/new/      folders being written
    <root>/v<schema>/failed/   what failed compiles left behind

Its content is executed, so every folder and file on the way is checked for who can write to it, and every file
against the digest in meta.json. Anything incomplete is a miss.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moegen import env, leftovers
from moegen.compile import safety
from moegen.compile.recipe import KEY_WORD
from moegen.compile.target import TARGETS, Target
from moegen.errors import CacheError
from moegen.kernels.spec import SCHEMA

log = logging.getLogger(__name__)

STALE_SECONDS = 3600.0
"""A folder that has been under way this long belongs to a process that died."""


@dataclass(frozen=True)
class Entry:
    """One committed binary: its folder and its checked meta.json."""

    folder: Path
    meta: Mapping[str, Any]

    @property
    def binary(self) -> Path:
        return self.folder / f"kernel.{Target(self.meta['target']).suffix}"


@dataclass(frozen=True)
class Store:
    """A cache under one root."""

    root: Path

    @property
    def base(self) -> Path:
        """The folder of this schema."""
        return self.root / f"v{SCHEMA}"

    def place(self, target: Target, stem: str, key: str) -> Path:
        """Where the entry of that key is, or would be."""
        return self.base / target.name / f"{stem}-{key[:KEY_WORD]}"

    def find(self, target: Target, stem: str, key: str) -> Entry | None:
        """The entry of that key, every digest checked; None for a missing, torn or foreign one.

        Raises:
            CacheError: it is there, but others could have written it.
        """
        return self._load(self.place(target, stem, key), key)

    def commit(self, target: Target, stem: str, key: str, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> Entry:
        """Writes an entry, whole or not at all. If another process was first, its entry is given back.

        Args:
            files: content by file name, the binary among them.
            meta: what meta.json says beside schema, stem, target, key and the files' digests.

        Raises:
            CacheError: a folder on the way is not safe.
            OSError: it cannot be written.
        """
        place = self.place(target, stem, key)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        fixed = {"schema": SCHEMA, "stem": stem, "target": target.name, "key": key, "sha256": digests}
        full = {**meta, **fixed, "created": time.time()}
        self._make(place.parent)
        folder = self.scratch(stem)
        try:
            for name, content in files.items():
                _write(folder / name, content)
            _write(folder / "meta.json", json.dumps(full, indent=1, sort_keys=True).encode())
            _sync(folder)
            return self._place(folder, place, key)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def scratch(self, word: str) -> Path:
        """A new private folder on the cache's file system; `prune` sweeps it if its maker dies."""
        parent = self._make(self.base / "new")
        folder = parent / f"{word}-{uuid.uuid4().hex}"
        folder.mkdir(mode=0o700)
        return folder

    def entries(self) -> Iterator[Entry]:
        """Every whole entry of this schema; refused and torn ones are left out."""
        for folder in self._folders():
            try:
                entry = self._load(folder, None)
            except (CacheError, OSError):
                continue
            if entry is not None:
                yield entry

    def prune(self, older_than: float) -> tuple[int, int]:
        """Removes entries made more than `older_than` seconds ago, and what dead processes left.

        Returns:
            Number of entries, and bytes, removed.
        """
        now, removed, freed = time.time(), 0, 0
        for folder in list(self._folders()):
            if now - folder.stat().st_mtime >= older_than:
                freed += size(folder)
                removed += 1
                _remove(folder, self.base / "new")
        for name, limit in (("new", min(older_than, STALE_SECONDS)), ("failed", older_than)):
            parent = self.base / name
            for folder in list(parent.iterdir()) if parent.is_dir() else []:
                if now - folder.stat().st_mtime >= limit:
                    freed += size(folder)
                    shutil.rmtree(folder, ignore_errors=True)
        return removed, freed

    def clear(self) -> tuple[int, int]:
        """Removes everything of every schema. Returns number of entries of this schema, and bytes, removed."""
        removed, freed = len(list(self._folders())), 0
        for folder in self.root.glob("v*"):
            if folder.name[1:].isdecimal() and folder.is_dir() and not folder.is_symlink():
                freed += size(folder)
                shutil.rmtree(folder, ignore_errors=True)
        return removed, freed

    def _folders(self) -> Iterator[Path]:
        for target in TARGETS:
            parent = self.base / target
            if parent.is_dir():
                yield from sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())

    def _load(self, folder: Path, key: str | None) -> Entry | None:
        try:
            for path in (self.root, self.base, folder.parent, folder):
                safety.check_folder(path)
            meta = json.loads(safety.read(folder / "meta.json"))
            if meta["schema"] != SCHEMA or key not in (None, meta["key"]):
                return None
            entry = Entry(folder, meta)
            if entry.binary.name not in meta["sha256"]:
                return None
            for name, digest in meta["sha256"].items():
                if hashlib.sha256(safety.read(folder / name)).hexdigest() != digest:
                    log.warning("event=torn_entry folder=%s file=%s", folder, name)
                    return None
            return entry
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("event=torn_entry folder=%s file=meta.json", folder)
            return None

    def _place(self, folder: Path, place: Path, key: str) -> Entry:
        for _ in range(8):
            try:
                os.rename(folder, place)
                _sync(place.parent)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                if (winner := self._load(place, key)) is not None:
                    return winner
                # What stands there is torn: aside with it, never in place, so that a reader sees old or new.
                _remove(place, self.base / "new")
                continue
            if (entry := self._load(place, key)) is not None:
                return entry
            break
        raise CacheError(f"{place} cannot be read back after it was written; is the disk sound?")

    def _make(self, folder: Path) -> Path:
        """Makes the folders from the root to `folder` for this user alone, and checks each."""
        self.root.parent.mkdir(parents=True, exist_ok=True)
        chain = [self.root, *(path for path in reversed([folder, *folder.parents]) if self.root in path.parents)]
        for path in chain:
            path.mkdir(mode=0o700, exist_ok=True)
            safety.check_folder(path)
        return folder


def store() -> Store:
    """The cache in use: the one of MOEGEN_CACHE_DIR, or a temporary one, with one warning, if that is unusable."""
    root = env.cache_dir()
    return temporary_store() if _unusable(root, env.cache_trust()) else Store(root)


@functools.cache
def _temporary_stores() -> dict[int, Store]:
    """By process: a forked one makes its own, since its parent's goes with the parent."""
    return {}


def temporary_store() -> Store:
    """A private cache that lasts as long as this process; made when it is first needed."""
    made = _temporary_stores()
    if os.getpid() not in made:
        made[os.getpid()] = Store(leftovers.folder_of_this_process("cache"))
    return made[os.getpid()]


def _stores() -> list[Store]:
    """Where a binary may be: in the cache in use, and in the temporary one if there is one."""
    in_use, temporary = store(), _temporary_stores().get(os.getpid())
    return [in_use] if temporary in (None, in_use) else [in_use, temporary]


@functools.cache
def _unusable(root: Path, trusted: bool) -> bool:
    """Whether nothing may be read from `root`; says so once. One that is only read-only is usable."""
    try:
        made = Store(root)
        if not (made.base.is_dir() and trusted):
            made._make(made.base)
    except (CacheError, OSError) as error:
        warn_unusable(root, error)
        return True
    return False


def keep(target: Target, stem: str, key: str, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> Entry:
    """Commits to the cache in use, or to a temporary one, with one warning, if that cannot be written."""
    place = store()
    try:
        return place.commit(target, stem, key, files, meta)
    except (CacheError, OSError) as error:
        if place == _temporary_stores().get(os.getpid()):
            raise
        warn_unusable(place.root, error)
        return temporary_store().commit(target, stem, key, files, meta)


def look_up(target: Target, stem: str, key: str) -> Entry | None:
    """The entry of that key in the cache in use, or in the temporary one; a refused entry is a warning and a miss."""
    leftovers.sweep_once()
    for place in _stores():
        try:
            entry = place.find(target, stem, key)
        except (CacheError, OSError) as error:
            warn_unusable(place.place(target, stem, key), error)
            continue
        if entry is not None:
            return entry
    return None


@functools.cache
def _warn_once(place: Path, why: str) -> None:
    log.warning("the kernel cache %s is unusable, a temporary folder takes its place: %s", place, why)


def warn_unusable(place: Path, error: Exception) -> None:
    """One warning for each place."""
    _warn_once(place, str(error))


def size(folder: Path) -> int:
    """Bytes of the files under a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _remove(folder: Path, aside: Path) -> None:
    """Renames a folder out of the way, then deletes it: nobody sees half of it under its own name."""
    aside.mkdir(mode=0o700, exist_ok=True)
    away = aside / f"old-{uuid.uuid4().hex}"
    try:
        os.rename(folder, away)
    except FileNotFoundError:
        return
    if away.is_dir() and not away.is_symlink():
        shutil.rmtree(away, ignore_errors=True)
    else:
        away.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Makes the names in a folder last; file systems that cannot do this for folders say EINVAL."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
