# SPDX-License-Identifier: Apache-2.0
"""Packs: one zip with a manifest and binaries, made by `moegen build --out`, found through MOEGEN_PACK.

A binary is looked up by target, stem and the digest of its text and headers, so that neither NVRTC nor a C++ compiler
is needed to use it. A pack is code: it must be this user's, and writable by nobody else (MOEGEN_CACHE_TRUST=1 waives
that), and every binary is checked against the manifest's digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moegen import env
from moegen.compile import safety
from moegen.compile.resources import Resources
from moegen.compile.target import TARGETS, Target
from moegen.errors import CacheError
from moegen.kernels.spec import SCHEMA

MOST_MANIFEST_BYTES = 64 << 20
MOST_BINARY_BYTES = 256 << 20
"""Far above any that there is: a binary takes up to a few MiB, and its manifest entry a KiB."""

_STEM, _DIGEST = re.compile(r"\w{1,200}"), re.compile(r"[0-9a-f]{64}")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's earliest date: equal binaries give equal packs


@dataclass(frozen=True)
class Item:
    """One binary of a pack.

    Attributes:
        content: digest of the kernel's text and headers.
        key: the cache key it had where it was made.
        sha256: of the binary, `bytes` long.
        member: its name in the zip.
        machine: the processor it runs on, e.g. x86_64; "" for a GPU's.
    """

    stem: str
    target: str
    content: str
    key: str
    compiler: str
    sha256: str
    member: str
    seconds: float
    bytes: int
    resources: Mapping[str, int] | None
    machine: str = ""

    def check(self) -> None:
        """Raises ValueError if a field is something else than `write` writes: they name folders and sizes."""
        if not all(isinstance(word, str) for word in (self.stem, self.member, self.compiler, self.machine)):
            raise ValueError("a word is no string")
        if not _STEM.fullmatch(self.stem) or self.target not in TARGETS or self.member != self.usual_member:
            raise ValueError(f"{self.member!r} is not where a binary lies")
        if not all(_DIGEST.fullmatch(word) for word in (self.content, self.key, self.sha256)):
            raise ValueError(f"{self.member} has no digests")
        if type(self.bytes) is not int or not 0 < self.bytes <= MOST_BINARY_BYTES:
            raise ValueError(f"{self.member} is of {self.bytes!r} bytes, which must be 1..{MOST_BINARY_BYTES}")
        if not isinstance(self.seconds, (int, float)):
            raise ValueError(f"{self.member} took {self.seconds!r} seconds")
        Resources.from_json(self.resources)

    @property
    def usual_member(self) -> str:
        return f"{self.target}/{self.stem}.{Target(self.target).suffix}"


@dataclass(frozen=True)
class Pack:
    """An open pack: where it is, and the items that can run here, by (target, stem, content)."""

    path: Path
    items: Mapping[tuple[str, str, str], Item]

    def read(self, item: Item) -> bytes:
        """The bytes of an item.

        Raises:
            CacheError: the pack is damaged, or no longer safe to execute.
        """
        with _open(self.path) as file:
            content = _member(file, item.member, item.bytes)
        if hashlib.sha256(content).hexdigest() != item.sha256:
            raise CacheError(f"{item.member} in {self.path} does not match its digest; build the pack again")
        return content


def find(target: str, stem: str, content: str) -> tuple[Pack, Item] | None:
    """The first pack of MOEGEN_PACK that holds that kernel.

    Raises:
        CacheError: a pack is missing, damaged, of another schema, or not safe to execute.
    """
    for path in env.packs():
        pack = load(path)
        if (item := pack.items.get((target, stem, content))) is not None:
            return pack, item
    return None


def load(path: Path) -> Pack:
    """Opens a pack; kept in memory until the file changes."""
    try:
        found = path.stat()
    except OSError as error:
        raise CacheError(f"MOEGEN_PACK names {path}, which cannot be read: {error.strerror}") from error
    return _load(path, found.st_mtime_ns, found.st_size, env.cache_trust())


@functools.lru_cache(maxsize=16)
def _load(path: Path, _changed: int, _size: int, _trusted: bool) -> Pack:
    with _open(path) as file:
        manifest = json.loads(_member(file, "manifest.json", MOST_MANIFEST_BYTES, exact=False))
        schema = manifest["schema"]
        items = [Item(**fields) for fields in manifest["binaries"]] if schema == SCHEMA else []
        for item in items:
            item.check()
            _entry(file, item.member, item.bytes)
    if schema != SCHEMA:
        raise CacheError(f"{path} has schema {schema}, this moegen reads {SCHEMA}; build it again")
    usable = [item for item in items if item.machine in ("", platform.machine())]
    return Pack(path, {(item.target, item.stem, item.content): item for item in usable})


@contextmanager
def _open(path: Path) -> Iterator[zipfile.ZipFile]:
    """The zip, read where it lies: what is wrong with it is found before anything large is read."""
    try:
        with safety.opened(path) as raw, zipfile.ZipFile(raw) as file:
            yield file
    except CacheError:
        raise
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, EOFError, *_DAMAGED) as error:
        raise CacheError(f"{path} is no pack: {error}; build it again with `moegen build --out`") from error


_DAMAGED = (zipfile.BadZipFile, zlib.error, MemoryError, OverflowError)


def _entry(file: zipfile.ZipFile, member: str, bytes: int, *, exact: bool = True) -> zipfile.ZipInfo:
    """The entry of a member of that many bytes, or up to so many.

    Raises:
        ValueError: it says that it has another size.
    """
    info = file.getinfo(member)
    if info.file_size > bytes or (exact and info.file_size != bytes):
        raise ValueError(f"{member} is of {info.file_size:,} bytes and must be of {bytes:,}")
    return info


def _member(file: zipfile.ZipFile, member: str, bytes: int, *, exact: bool = True) -> bytes:
    """Its content. No more is inflated than it says; if there is more, the checksum does not match."""
    info = _entry(file, member, bytes, exact=exact)
    with file.open(info) as opened:
        content = opened.read(info.file_size)
    if len(content) != info.file_size:
        raise ValueError(f"{member} ends behind {len(content):,} of {info.file_size:,} bytes")
    return content


def write(path: Path, binaries: Iterable[tuple[Item, bytes]]) -> None:
    """Writes a pack, whole or not at all. Equal binaries give an equal file.

    Raises:
        OSError: it cannot be written.
    """
    ordered = sorted(binaries, key=lambda pair: pair[0].member)
    manifest: dict[str, Any] = {"schema": SCHEMA, "binaries": [asdict(item) for item, _ in ordered]}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as raw:
            with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as file:
                _add(file, "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
                for item, content in ordered:
                    _add(file, item.member, content)
            raw.flush()
            os.fsync(raw.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _add(file: zipfile.ZipFile, name: str, content: bytes) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    file.writestr(info, content)
