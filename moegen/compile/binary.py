# SPDX-License-Identifier: Apache-2.0
"""The ladder from a kernel's text to its binary: pack, disk cache, compile."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moegen import env
from moegen.codegen.render import Source
from moegen.compile import cache, host, nvrtc, pack, safety
from moegen.compile.cache import Entry
from moegen.compile.recipe import Recipe, content_digest, digest
from moegen.compile.resources import Resources
from moegen.compile.target import Target
from moegen.errors import CacheError, MissingKernelError, UnsupportedPlatformError

log = logging.getLogger(__name__)

Origin = Literal["pack", "cache", "compiled"]


@dataclass(frozen=True)
class Binary:
    """A kernel's binary on disk.

    Attributes:
        key: its cache key.
        path: the file that holds it: a cubin, a shared library, or a pack (then `member` says where in it).
        origin: the rung of the ladder that it came from.
        seconds: what compiling it took, when it was compiled.
        resources: what the kernel uses; None for the host.
        bytes: size of the binary.
        sha256: digest of the binary.
    """

    stem: str
    target: Target
    key: str
    path: Path
    origin: Origin
    seconds: float
    resources: Resources | None
    bytes: int
    sha256: str
    member: str = ""


def obtain(source: Source, target: Target) -> Binary:
    """The binary of a kernel: from a pack, else from the disk cache, else compiled now.

    Raises:
        MissingKernelError: it would have to be compiled under MOEGEN_JIT=off.
        CompileError: it does not compile.
        UnsupportedPlatformError: there is no compiler for that target here.
        CacheError: a pack is damaged or not safe to execute.
    """
    found, recipe = look_up(source, target)
    if found is not None:
        return found
    return make(permitted(recipe, source.stem, target))


def obtain_many(sources: Sequence[Source], target: Target, jobs: int | None = None) -> list[Binary]:
    """`obtain` for many kernels, in their order; what is missing is compiled by `jobs` processes (default: the cores).

    Raises: as `obtain`; of several kernels that do not compile, the first one's error.
    """
    from moegen.compile import ninja_build

    looked = {source.stem: look_up(source, target) for source in sources}
    missing = [permitted(recipe, stem, target) for stem, (found, recipe) in looked.items() if found is None]
    made = {binary.stem: binary for binary in ninja_build.make_all(missing, jobs)}
    return [looked[source.stem][0] or made[source.stem] for source in sources]


def read(binary: Binary) -> bytes:
    """The bytes of a binary, checked against its digest just now.

    Raises:
        CacheError: they changed since, or others can write them.
    """
    if binary.member:
        opened = pack.load(binary.path)
        item = next((item for item in opened.items.values() if item.member == binary.member), None)
        if item is None or item.sha256 != binary.sha256:
            raise CacheError(f"{binary.path} was replaced while {binary.stem} was in use")
        return opened.read(item)
    try:
        content = safety.read(binary.path)
    except OSError as error:
        raise CacheError(f"{binary.path} is gone ({error.strerror}); was the cache cleared? Obtain it again") from error
    if hashlib.sha256(content).hexdigest() != binary.sha256:
        raise CacheError(f"{binary.path} does not match its digest; remove it with `moegen cache clear`")
    return content


def host_runtime() -> Path:
    """The shared library that host kernels are linked with, found or built by the same ladder."""
    return obtain(host.runtime_source(), Target("host")).path


def look_up(source: Source, target: Target) -> tuple[Binary | None, Recipe | None]:
    """(the binary if pack or cache have it, the recipe to compile it by; None without a compiler)."""
    headers = toolchain(target).headers(source)
    packed = pack.find(target.name, source.stem, content_digest(source.stem, source.text, headers))
    if packed is not None:
        return _from_pack(*packed), None
    try:
        recipe = toolchain(target).recipe(source, target)
    except UnsupportedPlatformError:
        if env.jit():
            raise
        return None, None
    entry = cache.look_up(target, recipe.stem, recipe.key)
    return (_from_entry(entry, "cache") if entry else None), recipe


def permitted(recipe: Recipe | None, stem: str, target: Target) -> Recipe:
    """The recipe, if compiling is allowed.

    Raises:
        MissingKernelError: it is not; the text names the command that builds the kernel beforehand.
    """
    if recipe is None or not env.jit():
        raise MissingKernelError(
            f"{stem} for {target} is in no pack and not in the cache, and MOEGEN_JIT=off forbids compiling. "
            f"Build it beforehand: moegen build --arch {target} {stem}"
        )
    return recipe


def make(recipe: Recipe) -> Binary:
    """Compiles a recipe now and keeps the binary."""
    made = toolchain(recipe.target).compile(recipe)
    about = {"seconds": made.seconds, "resources": made.resources.to_json() if made.resources else None}
    return keep(recipe, made.content, about)


def keep(recipe: Recipe, content: bytes, about: Mapping[str, Any]) -> Binary:
    """Commits a recipe's binary to the cache."""
    meta = {**about, "options": recipe.options, "compiler": recipe.compiler, "content": recipe.content}
    files = {"kernel.cu": recipe.text.encode(), f"kernel.{recipe.target.suffix}": content}
    entry = cache.keep(recipe.target, recipe.stem, recipe.key, files, meta)
    return _from_entry(entry, "compiled")


def from_cache(recipe: Recipe, origin: Origin) -> Binary | None:
    """The binary that the cache holds for a recipe."""
    entry = cache.look_up(recipe.target, recipe.stem, recipe.key)
    return _from_entry(entry, origin) if entry else None


def toolchain(target: Target) -> Any:
    """The module that compiles for a target; both have `headers`, `recipe`, `identity` and `compile`."""
    return host if target.is_host else nvrtc


def _from_entry(entry: Entry, origin: Origin) -> Binary:
    meta = entry.meta
    return Binary(
        stem=meta["stem"],
        target=Target(meta["target"]),
        key=meta["key"],
        path=entry.binary,
        origin=origin,
        seconds=meta.get("seconds", 0.0),
        resources=Resources.from_json(meta.get("resources")),
        bytes=entry.binary.stat().st_size,
        sha256=meta["sha256"][entry.binary.name],
    )


def _from_pack(opened: pack.Pack, item: pack.Item) -> Binary:
    """A cubin is read from the pack itself; a shared library needs a path, so it is unpacked into the cache."""
    target = Target(item.target)
    if target.is_host:
        return _from_entry(_unpack(opened, item, target), "pack")
    return Binary(
        stem=item.stem,
        target=target,
        key=item.key,
        path=opened.path,
        origin="pack",
        seconds=item.seconds,
        resources=Resources.from_json(item.resources),
        bytes=item.bytes,
        sha256=item.sha256,
        member=item.member,
    )


def _unpack(opened: pack.Pack, item: pack.Item, target: Target) -> Entry:
    """The entry's key holds the binary's digest: a library made here by the same recipe may differ in its bytes."""
    key = digest([("packed", item.key.encode()), ("sha256", item.sha256.encode())])
    entry = cache.look_up(target, item.stem, key)
    if entry is not None:
        return entry
    meta = {"seconds": item.seconds, "resources": None, "compiler": item.compiler, "content": item.content}
    return cache.keep(target, item.stem, key, {f"kernel.{target.suffix}": opened.read(item)}, meta)
