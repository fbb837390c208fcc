# SPDX-License-Identifier: Apache-2.0
"""Who imports whom in moegen; imports for type checkers and inside functions count like others."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

from scripts.house.finding import ROOT, Finding, relative
from scripts.house.kernels import committed, seam

FAMILIES = {
    "ll": ("ll", "low_latency"),
    "ht": ("ht", "high_throughput"),
    "a2a": ("a2a", "one_sided"),
}
"""How modules and folders of a family of kernels are called: by one of these words, or with it in front and `_`."""

Modules = dict[str, str]


def long_modules(texts: Modules, limit: int) -> list[Finding]:
    """Those of more lines than the limit, docstrings of classes and functions aside."""
    lengths = {path: code_lines(text) for path, text in texts.items()}
    return [Finding(path, 0, f"{length} lines") for path, length in lengths.items() if length > limit]


def code_lines(text: str) -> int:
    """Lines of a module but those of the docstrings of classes and functions."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    owners = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds) and ast.get_docstring(node)]
    docstrings = [owner.body[0] for owner in owners]
    return len(text.splitlines()) - sum((node.end_lineno or 0) - node.lineno + 1 for node in docstrings)


@functools.cache
def modules() -> Modules:
    """Source by full name; that of a package is its __init__."""
    return {_name_of(path): path.read_text() for path in sorted((ROOT / "moegen").rglob("*.py"))}


def _name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def by_path() -> dict[str, str]:
    """The same by path."""
    return {relative(path): path.read_text() for path in sorted((ROOT / "moegen").rglob("*.py"))}


def imports(name: str, sources: Modules) -> Iterator[tuple[str, int]]:
    """The modules that a module imports, and where. What a package has from elsewhere counts as imported from there."""
    for node in ast.walk(_tree(sources[name])):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in sources)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(name, node, is_package=_is_package(name, sources))
            targets = (_origin(base, alias.name, sources) for alias in node.names)
            yield from ((target, node.lineno) for target in targets if target in sources)


def _origin(base: str, imported: str, sources: Modules) -> str:
    """The module that `from base import imported` is about, also by way of packages that import it themselves."""
    if f"{base}.{imported}" in sources:
        return f"{base}.{imported}"
    if not _is_package(base, sources):
        return base
    for node in _tree(sources[base]).body:
        if isinstance(node, ast.ImportFrom) and imported in [alias.asname or alias.name for alias in node.names]:
            return _origin(_absolute(base, node, is_package=True), imported, sources)
    return base


@functools.cache
def _tree(source: str) -> ast.Module:
    return ast.parse(source)


def _absolute(name: str, node: ast.ImportFrom, *, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = name.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, node.module] if node.module else kept)


def _is_package(name: str, sources: Modules) -> bool:
    return any(other.startswith(f"{name}.") for other in sources)


def _only_passes_on(name: str, sources: Modules) -> bool:
    """Whether a package defines no class and no function of its own, lazy attributes aside."""
    own = [node for node in _tree(sources[name]).body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return _is_package(name, sources) and all(node.name in ("__getattr__", "__dir__") for node in own)


def cycles(sources: Modules) -> list[Finding]:
    """Each set of modules that all import each other, directly or by way of others."""
    return [Finding(group[0], 0, " <-> ".join(group)) for group in _cycles(sources)]


def in_cycles(sources: Modules) -> list[Finding]:
    """Each module of such a set: two sets that grow together are one fewer, and no better."""
    return [Finding(name, 0, f"with {len(group) - 1} others") for group in _cycles(sources) for name in group]


def _cycles(sources: Modules) -> list[list[str]]:
    """Packages that only pass on what their modules have are left out."""
    names = [name for name in sources if not _only_passes_on(name, sources)]
    graph = {name: {target for target, _ in imports(name, sources)} - {name} for name in names}
    reached = {name: _reached(name, graph) for name in graph}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def _reached(name: str, graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        new = (graph[waiting.pop()] & graph.keys()) - found
        found |= new
        waiting += new
    return found


def arrows(sources: Modules) -> list[Finding]:
    """Each pair of rooms once, of which the first imports the second: a room is what stands directly in moegen."""
    found: dict[str, Finding] = {}
    for name in sources:
        for target, line in imports(name, sources):
            here, there = _room(name), _room(target)
            if here and there and here != there:
                found.setdefault(f"{here} -> {there}", Finding(name, line, f"{here} -> {there}"))
    return [found[arrow] for arrow in sorted(found)]


def _room(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else None


def family_imports(sources: Modules) -> list[Finding]:
    """Imports of one family's modules by another family's."""
    return [
        Finding(name, line, target)
        for name in sources
        for target, line in sorted(set(imports(name, sources)))
        if family_of(name) and family_of(target) and family_of(name) != family_of(target)
    ]


def family_of(name: str) -> str | None:
    """The family whose word begins one of the parts of a module's name, if any."""
    for part in name.split(".")[1:]:
        for family, words in FAMILIES.items():
            if any(part == word or part.startswith(f"{word}_") for word in words):
                return family
    return None


def importers(of: set[str], sources: Modules) -> list[Finding]:
    """Each other module once that imports one of these."""
    found: dict[str, Finding] = {}
    for name in sources.keys() - of:
        for target, line in imports(name, sources):
            if target in of:
                found.setdefault(name, Finding(name, line, target))
    return [found[name] for name in sorted(found)]


def low_latency_specs() -> set[str]:
    """The modules that define the low-latency kernels' Specs."""
    committed()  # imports every family
    return {cls.__module__ for (family, _), cls in seam("Spec").registry.items() if family == "ll"}
