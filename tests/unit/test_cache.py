# SPDX-License-Identifier: Apache-2.0
"""The disk cache: whole entries or none, and nothing that others could have written."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moegen.compile import cache
from moegen.compile.cache import Entry, Store
from moegen.compile.target import Target
from moegen.errors import CacheError
from moegen.kernels.spec import SCHEMA

KEY = "0123456789abcdef" * 4
FILES = {"kernel.cu": b"text", "kernel.cubin": b"binary" * 100}
SM90 = Target("sm90")

Run = Callable[..., subprocess.CompletedProcess[str]]


def commit(store: Store, key: str = KEY) -> Entry:
    return store.commit(SM90, "stem", key, FILES, {"seconds": 1.0})


def find(store: Store, key: str = KEY) -> Entry | None:
    return store.find(SM90, "stem", key)


@pytest.fixture
def store(cache_root: Path) -> Store:
    return Store(cache_root)


def test_commit_and_find(store: Store) -> None:
    assert find(store) is None
    made = commit(store)
    found = find(store)
    assert found == made
    assert found.binary.read_bytes() == FILES["kernel.cubin"]
    assert found.meta["seconds"] == 1.0
    assert list(store.entries()) == [found]
    assert not list((store.base / "new").iterdir())


def test_everything_is_private(store: Store) -> None:
    commit(store)
    for path in [store.root, *store.root.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_the_whole_key_counts(store: Store) -> None:
    commit(store)
    same_folder = KEY[:16] + "f" * 48
    assert find(store, same_folder) is None
    commit(store, same_folder)
    assert find(store, same_folder) is not None


@pytest.mark.parametrize("name", ["kernel.cubin", "kernel.cu", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_torn_entry_is_a_miss_and_is_replaced(store: Store, name: str, damage: str) -> None:
    path = commit(store).folder / name
    if damage == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"{" + content[1:-1] + b"?")
    assert find(store) is None
    commit(store)
    assert find(store) is not None


def test_an_empty_folder_is_a_miss_and_is_replaced(store: Store) -> None:
    store.place(SM90, "stem", KEY).mkdir(parents=True, mode=0o700)
    for path in (store.root, store.base, store.base / "sm90"):
        path.chmod(0o700)
    assert find(store) is None
    commit(store)
    assert find(store) is not None


RACER = """
import sys
from pathlib import Path
from moegen.compile.cache import Store
from moegen.compile.target import Target
store, me = Store(Path(sys.argv[1])), sys.argv[2]
for i in range(25):
    key = f"{i:064x}"[::-1]
    files = {"kernel.cu": b"text", "kernel.cubin": f"made by {me}".encode() * 500}
    entry = store.commit(Target("sm90"), "stem", key, files, {})
    assert store.find(Target("sm90"), "stem", key) is not None
    assert entry.binary.read_bytes().startswith(b"made by ")
"""


def test_processes_race_for_the_same_keys(store: Store) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", RACER, str(store.root)]
    racers = [subprocess.Popen([*command, str(i)], env=environment, stderr=subprocess.PIPE) for i in range(6)]
    for racer in racers:
        _, errors = racer.communicate(timeout=60)
        assert racer.returncode == 0, errors.decode()
    assert len(list(store.entries())) == 25
    assert not list((store.base / "new").iterdir())


KILLED = """
import os, signal
from moegen.compile import cache
from moegen.compile.target import Target
cache.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cache.store().commit(Target("sm90"), "stem", "0123456789abcdef" * 4, {"kernel.cubin": b"x"}, {})
"""


def test_killed_between_write_and_rename(store: Store, python: Run) -> None:
    assert python(KILLED).returncode == -signal.SIGKILL
    assert find(store) is None
    assert len(list((store.base / "new").iterdir())) == 1
    commit(store)
    assert find(store) is not None
    store.prune(older_than=0.0)
    assert not list((store.base / "new").iterdir())


def test_prune_by_age_and_clear(store: Store) -> None:
    old, young = commit(store), commit(store, "f" * 64)
    os.utime(old.folder, (time.time() - 1000, time.time() - 1000))
    assert store.prune(older_than=500)[0] == 1
    assert [entry.folder for entry in store.entries()] == [young.folder]
    other = store.root / "not-mine"
    other.mkdir()
    assert store.clear()[0] == 1
    assert other.is_dir() and not list(store.entries())


@pytest.mark.parametrize("where", ["root", "schema", "target", "entry", "kernel.cubin", "meta.json"])
@pytest.mark.parametrize("how", ["writable", "symlink"])
def test_what_others_could_write_is_refused(store: Store, where: str, how: str, tmp_path: Path) -> None:
    folder = commit(store).folder
    path = {"root": store.root, "schema": store.base, "target": folder.parent, "entry": folder}.get(
        where, folder / where
    )
    if how == "writable":
        path.chmod(0o770)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=r"writable by others|symlink"):
        find(store)


def test_another_users_entry_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(CacheError, match="belongs to user"):
        find(store)


def test_trust_takes_a_shared_cache_as_it_is(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store)
    store.root.chmod(0o777)
    monkeypatch.setenv("MOEGEN_CACHE_TRUST", "1")
    assert find(store) is not None


@pytest.mark.parametrize("how", ["writable", "symlink", "file"])
def test_an_unusable_root_is_one_warning_and_a_temporary_folder(
    cache_root: Path, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if how == "writable":
        cache_root.mkdir()
        cache_root.chmod(0o777)
    elif how == "symlink":
        (tmp_path / "elsewhere").mkdir()
        cache_root.symlink_to(tmp_path / "elsewhere")
    else:
        cache_root.write_text("")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert cache.store().root != cache_root
            cache.keep(SM90, "stem", KEY, FILES, {})
            assert cache.look_up(SM90, "stem", KEY) is not None
    assert len([record for record in caplog.records if "unusable" in record.message]) == 1


def test_a_refused_entry_is_made_elsewhere(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    commit(store).folder.chmod(0o777)
    assert cache.look_up(SM90, "stem", KEY) is None
    entry = cache.keep(SM90, "stem", KEY, FILES, {})
    assert entry.folder != store.place(SM90, "stem", KEY)
    assert cache.look_up(SM90, "stem", KEY) == entry
    assert "unusable" in caplog.text


def test_a_write_that_fails_goes_elsewhere(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Store, word: str) -> Path:
        raise OSError(28, "No space left on device")

    assert cache.store() == store
    other = cache.temporary_store()
    scratch = Store.scratch
    monkeypatch.setattr(Store, "scratch", lambda self, word: full(self, word) if self == store else scratch(self, word))
    assert cache.keep(SM90, "stem", KEY, FILES, {}).folder.is_relative_to(other.root)


def test_meta_names_schema_and_digests(store: Store) -> None:
    meta = json.loads((commit(store).folder / "meta.json").read_text())
    assert meta["schema"] == SCHEMA and meta["key"] == KEY and set(meta["sha256"]) == set(FILES)
