# SPDX-License-Identifier: Apache-2.0
"""Finds things of a revision's moegen by what they are, wherever that revision has them."""

from __future__ import annotations

import functools
import importlib
import re
from pathlib import Path
from types import ModuleType

import moegen

PACKAGE = Path(moegen.__file__).resolve().parent
if PACKAGE.parent != Path.cwd():
    raise SystemExit(f"{PACKAGE} was imported, not the moegen of {Path.cwd()}")


@functools.cache
def homes(*patterns: str) -> tuple[ModuleType, ...]:
    """The modules whose text has all these; `^` is a line's start."""
    found = [path for path in sorted(PACKAGE.rglob("*.py")) if _has(path.read_text(), patterns)]
    return tuple(importlib.import_module(_name(path)) for path in found)


def home(*patterns: str) -> ModuleType:
    """The only one."""
    found = homes(*patterns)
    if len(found) != 1:
        raise SystemExit(f"{PACKAGE}: one module was expected to have {patterns}: {[each.__name__ for each in found]}")
    return found[0]


def _has(text: str, patterns: tuple[str, ...]) -> bool:
    return all(re.search(pattern, text, re.MULTILINE) for pattern in patterns)


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
