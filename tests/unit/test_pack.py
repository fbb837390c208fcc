# SPDX-License-Identifier: Apache-2.0
"""Packs: used without any compiler, checked before they are executed."""

from __future__ import annotations

import json
import platform
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from moegen.codegen.render import Source
from moegen.compile import host, nvrtc, pack
from moegen.compile.binary import obtain, read
from moegen.compile.ninja_build import build
from moegen.compile.target import Target
from moegen.errors import CacheError, MissingKernelError, UnsupportedPlatformError

pytestmark = pytest.mark.nvrtc

Kernel = Callable[..., Source]


@pytest.fixture
def packed(kernel: Kernel, sm90: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pack with one kernel for sm90; the cache is empty again, and compiling is off."""
    path = tmp_path / "some.moepack"
    build([(kernel(), sm90)]).write_pack(path)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("MOEGEN_PACK", str(path))
    monkeypatch.setenv("MOEGEN_JIT", "off")
    return path


def without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise UnsupportedPlatformError("none")

    monkeypatch.setattr(nvrtc, "recipe", none)
    monkeypatch.setattr(host, "recipe", none)


def test_a_pack_needs_no_compiler(packed: Path, kernel: Kernel, sm90: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    without_compilers(monkeypatch)
    made = obtain(kernel(), sm90)
    assert made.origin == "pack" and made.path == packed and made.resources is not None
    assert read(made).startswith(b"\x7fELF") and len(read(made)) == made.bytes


def test_a_pack_serves_only_the_very_text(packed: Path, kernel: Kernel, sm90: Target) -> None:
    for source, target in ((kernel(value=2), sm90), (kernel("tiny_two"), sm90), (kernel(), Target("sm100"))):
        with pytest.raises(MissingKernelError):
            obtain(source, target)


def test_packs_are_asked_in_order(
    packed: Path, kernel: Kernel, sm90: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second.moepack"
    build([(kernel(), sm90), (kernel("tiny_two"), sm90)]).write_pack(second)
    monkeypatch.setenv("MOEGEN_PACK", f"{packed}:{second}")
    assert obtain(kernel(), sm90).path == packed
    assert obtain(kernel("tiny_two"), sm90).path == second


def test_equal_builds_give_equal_packs(packed: Path, kernel: Kernel, sm90: Target, tmp_path: Path) -> None:
    first, second = tmp_path / "a.moepack", tmp_path / "b.moepack"
    for path in (first, second):
        build([(kernel(), sm90)]).write_pack(path)
    assert first.read_bytes() == second.read_bytes()


def test_a_pack_that_others_could_write_is_refused(
    packed: Path, kernel: Kernel, sm90: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed.chmod(0o666)
    pack._load.cache_clear()
    with pytest.raises(CacheError, match="writable by others"):
        obtain(kernel(), sm90)
    monkeypatch.setenv("MOEGEN_CACHE_TRUST", "1")
    assert obtain(kernel(), sm90).origin == "pack"


def test_a_symlink_to_a_pack_is_refused(
    packed: Path, kernel: Kernel, sm90: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link.moepack").symlink_to(packed)
    monkeypatch.setenv("MOEGEN_PACK", str(tmp_path / "link.moepack"))
    with pytest.raises(CacheError, match="symlink"):
        obtain(kernel(), sm90)


def test_a_missing_or_damaged_pack_is_an_error(packed: Path, kernel: Kernel, sm90: Target) -> None:
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(CacheError, match="no pack"):
        obtain(kernel(), sm90)
    packed.unlink()
    with pytest.raises(CacheError, match="cannot be read"):
        obtain(kernel(), sm90)


def test_a_binary_that_does_not_match_its_digest_is_not_used(packed: Path, kernel: Kernel, sm90: Target) -> None:
    with zipfile.ZipFile(packed) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(packed, "w") as new:
        for name, content in contents.items():
            new.writestr(name, content if name == "manifest.json" else content[:-1] + b"!")
    with pytest.raises(CacheError, match="digest"):
        read(obtain(kernel(), sm90))


def test_a_pack_of_another_schema_is_refused(packed: Path, kernel: Kernel, sm90: Target) -> None:
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("manifest.json", '{"schema": 999, "binaries": []}')
    with pytest.raises(CacheError, match="schema 999"):
        obtain(kernel(), sm90)


def test_a_host_pack_is_unpacked_and_brings_the_runtime(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, target = tmp_path / "host.moepack", Target("host")
    # The runtime is replaced by something small; test_build builds the real one.
    monkeypatch.setattr(host, "runtime_source", lambda: kernel("tiny_runtime"))
    report = build([(kernel(), target)])
    assert [made.stem for made in report.binaries] == ["tiny_one", "tiny_runtime"]
    report.write_pack(path)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("MOEGEN_PACK", str(path))
    without_compilers(monkeypatch)
    for _ in range(2):
        made = obtain(kernel(), target)
        assert made.origin == "pack" and made.path.is_relative_to(tmp_path / "cache")
        assert made.sha256 == report.binaries[0].sha256 and read(made)
    made.path.write_bytes(b"torn")
    assert read(obtain(kernel(), target)).startswith(b"\x7fELF")

    monkeypatch.setattr(platform, "machine", lambda: "another")
    pack._load.cache_clear()
    with pytest.raises(UnsupportedPlatformError):
        obtain(kernel(), target)


def rewrite(path: Path, **changed: object) -> None:
    """The pack with other words in its only item."""
    with zipfile.ZipFile(path) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    manifest = json.loads(contents["manifest.json"])
    manifest["binaries"][0].update(changed)
    contents["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in contents.items():
            new.writestr(name, content)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"bytes": 10**15}, "10{15} bytes"),
        ({"bytes": -1}, "-1 bytes"),
        ({"bytes": True}, "True bytes"),
        ({"bytes": 5}, "must be of 5"),
        ({"stem": "../../away"}, "not where a binary lies"),
        ({"member": "../sm90/tiny_one.cubin"}, "not where a binary lies"),
        ({"member": 7}, "no string"),
        ({"target": "sm00"}, "not where a binary lies"),
        ({"stem": "tiny_two", "member": "sm90/tiny_two.cubin"}, "no item named"),
        ({"key": "../" * 20}, "no digests"),
        ({"resources": {"registers": 1}}, "missing"),
        ({"seconds": "long"}, "'long' seconds"),
        ({"more": 1}, "more"),
    ],
    ids=str,
)
def test_what_a_pack_says_is_checked_before_it_is_read(packed: Path, changed: dict[str, object], says: str) -> None:
    rewrite(packed, **changed)
    with pytest.raises(CacheError, match=rf"some\.moepack is no pack: .*{says}"):
        pack.load(packed)


def test_a_zip_bomb_is_not_inflated(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that says how large it is, nor one that says less."""
    monkeypatch.setattr(pack, "MOST_MANIFEST_BYTES", 1 << 20)
    zeros = bytes(64 << 20)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("manifest.json", zeros)
    content = packed.read_bytes()
    honest = len(zeros).to_bytes(4, "little")
    assert content.count(honest) == 2
    tracemalloc.start()
    try:
        for damaged, says in ((content, "67,108,864 bytes"), (content.replace(honest, bytes([100, 0, 0, 0])), "CRC")):
            packed.write_bytes(damaged)
            pack._load.cache_clear()
            with pytest.raises(CacheError, match=says):
                pack.load(packed)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("cut", [0, 1, 30, -1, -30, -200])
def test_a_pack_that_ends_early_is_an_error(packed: Path, cut: int) -> None:
    packed.write_bytes(packed.read_bytes()[:cut])
    with pytest.raises(CacheError, match=r"some\.moepack is no pack"):
        pack.load(packed)
