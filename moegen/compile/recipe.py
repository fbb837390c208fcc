# SPDX-License-Identifier: Apache-2.0
"""`Recipe`: all that a binary depends on, and the cache key made from it."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from moegen.compile.resources import Resources
from moegen.compile.target import Target
from moegen.kernels.spec import SCHEMA

_INCLUDE = re.compile(rb"^[ \t]*#[ \t]*include[ \t]*<(moegen/[^>]+)>", re.MULTILINE)
KEY_WORD = 16
"""Characters of the key that a folder's name shows."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the bytes of one binary. No path is among it.

    Attributes:
        headers: (name, content) of every header the text opens, sorted by name.
        options: the compiler's options in order.
        compiler: exact identity of the compiler (and linker).
        linked: (name, sha256) of the libraries it is linked with.
    """

    stem: str
    target: Target
    text: str
    headers: tuple[tuple[str, bytes], ...]
    options: tuple[str, ...]
    compiler: str
    linked: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        held = [option for option in self.options if "/" in option]
        if held:
            raise ValueError(f"options must not hold a path, else the key depends on the machine: {held}")

    @functools.cached_property
    def content(self) -> str:
        """Digest of text and headers: what a pack is searched by, without any compiler."""
        return content_digest(self.stem, self.text, self.headers)

    @functools.cached_property
    def key(self) -> str:
        """sha256 in hex over all fields; equal keys mean equal binaries."""
        fields = [("stem", self.stem.encode()), ("text", self.text.encode())]
        for name, content in self.headers:
            fields += [("header name", name.encode()), ("header", content)]
        fields += [("linked", f"{name} {digest}".encode()) for name, digest in self.linked]
        fields += [("target", self.target.arch.encode())]
        fields += [("option", option.encode()) for option in self.options]
        return digest([*fields, ("compiler", self.compiler.encode())])


@dataclass(frozen=True)
class Compiled:
    """A fresh binary: its bytes, the seconds it took, and its resources (None for the host)."""

    content: bytes
    seconds: float
    resources: Resources | None = None


def digest(fields: Iterable[tuple[str, bytes]]) -> str:
    """sha256 in hex over labelled, length-prefixed fields, the schema number first."""
    sha = hashlib.sha256()
    for label, value in (("schema", str(SCHEMA).encode()), *fields):
        sha.update(f"{label}:{len(value)}:".encode())
        sha.update(value)
    return sha.hexdigest()


def content_digest(stem: str, text: str, headers: Iterable[tuple[str, bytes]]) -> str:
    """Digest of a kernel's text and of the headers that it opens."""
    fields = [("stem", stem.encode()), ("text", text.encode())]
    for name, content in headers:
        fields += [("header name", name.encode()), ("header", content)]
    return digest(fields)


def reachable(text: str, headers: Mapping[str, bytes]) -> tuple[tuple[str, bytes], ...]:
    """The headers that `text` opens, directly or through others: exactly those written `#include <moegen/...>`.

    A name that is not in `headers` is left out here; the compiler reports it.
    """
    found: dict[str, bytes] = {}
    waiting = [text.encode()]
    while waiting:
        for raw in _INCLUDE.findall(waiting.pop()):
            name = raw.decode()
            if name in headers and name not in found:
                found[name] = headers[name]
                waiting.append(headers[name])
    return tuple(sorted(found.items()))
