# SPDX-License-Identifier: Apache-2.0
"""What stands in templates: what is defined twice, and C++ that Jinja's strings hold."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterable, Iterator

from jinja2 import Environment, nodes

from scripts.house.cpp import without_comments
from scripts.house.finding import ROOT, Finding, relative
from scripts.house.kernels import seam

# No members: those of two types have one name where templates take either type.
_FUNCTION = re.compile(
    r"^(?:template\s*<[^;{}]*>\s*)?"
    r"__device__(?:[^;{}()]|__launch_bounds__\([^)]*\))*?(?<![\w:])(\w+)\s*\(",
    re.MULTILINE,
)
# Every kernel has a struct Params of its own.
_STRUCT = re.compile(
    r"^\s*(?:template\s*<[^;{}]*>\s*)?struct\s+(?:alignas\(\w+\)\s*)?(?!Params\b)(\w+)\s*[:{]", re.MULTILINE
)

_SUFFIXES = (".cuh", ".jinja", ".hpp", ".cpp")


@functools.cache
def templates() -> dict[str, str]:
    """Every template and header, by path; what stands in for the device on the host is among them."""
    paths = sorted((ROOT / "templates").rglob("*"))
    return {relative(path): path.read_text() for path in paths if path.suffix in _SUFFIXES}


def for_device(texts: dict[str, str]) -> dict[str, str]:
    """Those that kernels consist of: headers in a folder `host` are twins of the device's."""
    return {path: text for path, text in texts.items() if "host" not in path.split("/")}


def defined_twice(texts: dict[str, str], what: re.Pattern[str]) -> list[Finding]:
    """Each name once that two and more files define."""
    places: dict[str, list[str]] = {}
    for path, text in texts.items():
        for name in sorted(set(what.findall(without_comments(text)))):
            places.setdefault(name, []).append(path)
    return [Finding(", ".join(paths), 0, name) for name, paths in sorted(places.items()) if len(paths) > 1]


def duplicate_functions(texts: dict[str, str]) -> list[Finding]:
    return defined_twice(texts, _FUNCTION)


def duplicate_structs(texts: dict[str, str]) -> list[Finding]:
    return defined_twice(texts, _STRUCT)


@functools.cache
def environment() -> Environment:
    """Jinja's, as kernels are rendered with it."""
    made: Environment = importlib.import_module(seam("render").__module__).environment()
    return made


def _trees(texts: dict[str, str]) -> Iterator[tuple[str, nodes.Template]]:
    return ((path, environment().parse(text)) for path, text in texts.items() if path.endswith(".jinja"))


def strings_in_statements(texts: dict[str, str]) -> list[Finding]:
    """`//% set` and other statements with strings that are more than a word; and sets of whole blocks of text."""
    found = []
    for path, tree in _trees(texts):
        found += [Finding(path, line, text) for line, text in _strings(tree) if line and not _is_word(text)]
        found += [Finding(path, block.lineno, "a block") for block in tree.find_all(nodes.AssignBlock)]
    return found


def strings_in_expressions(texts: dict[str, str]) -> list[Finding]:
    """The same of `$(...)`."""
    found = []
    for path, tree in _trees(texts):
        for output in tree.find_all(nodes.Output):
            strings = [each for part in output.nodes for each in _strings(part)]
            found += [Finding(path, line, text) for line, text in strings if not _is_word(text)]
    return found


def _strings(node: nodes.Node) -> Iterator[tuple[int, str]]:
    """Lines and texts of the strings that become text: not those of comparisons, of file names and between joined
    words. Of a statement, those in what it prints are left out.
    """
    if isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.lineno, node.value
    if isinstance(node, (nodes.Compare, nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Output)):
        return
    if isinstance(node, nodes.Filter) and node.name == "join" and node.node is not None:
        children: Iterable[nodes.Node] = [node.node]
    else:
        children = node.iter_child_nodes()
    for child in children:
        yield from _strings(child)


def _is_word(text: str) -> bool:
    return re.fullmatch(r"\w*", text) is not None


def family_tests(texts: dict[str, str]) -> list[Finding]:
    """In parts, which several kernels include: mentions of `s.family` and of names for comparisons of it."""
    found = []
    for path, tree in _trees({path: text for path, text in texts.items() if not path.endswith(".cu.jinja")}):
        found += [Finding(path, node.lineno, "s.family") for node in tree.find_all(nodes.Getattr) if _is_family(node)]
        names = set(_names_of_tests(tree))
        mentions = [node for node in tree.find_all(nodes.Name) if node.name in names and node.ctx == "load"]
        found += [Finding(path, node.lineno, node.name) for node in mentions]
    return sorted(found, key=lambda each: (each.place, each.line))


def _is_family(node: nodes.Getattr) -> bool:
    return node.attr == "family" and isinstance(node.node, nodes.Name) and node.node.name == "s"


def _names_of_tests(tree: nodes.Template) -> Iterator[str]:
    for assign in tree.find_all(nodes.Assign):
        is_test = isinstance(assign.node, (nodes.Compare, nodes.Not, nodes.And, nodes.Or))
        if is_test and isinstance(assign.target, nodes.Name) and any(map(_is_family, assign.find_all(nodes.Getattr))):
            yield assign.target.name


def long_files(texts: dict[str, str], limit: int) -> list[Finding]:
    """Files of more lines than the limit."""
    lengths = {path: len(text.splitlines()) for path, text in texts.items()}
    return [Finding(path, 0, f"{length} lines") for path, length in lengths.items() if length > limit]
