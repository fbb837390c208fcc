# SPDX-License-Identifier: Apache-2.0
"""What rendered kernels look like: those that are committed, and others that differ from them in more than numbers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from scripts.house.cpp import without_comments
from scripts.house.dead import Dead, DeadKind, dead
from scripts.house.finding import ROOT, Finding, line_of

COLUMNS = 120

PRESETS = (("tiny", (1, 2, 3)), ("deepseek-v3", (2, 8)))
"""Layers and numbers of ranks whose kernels are measured beside the committed ones."""

HINTS = {
    "Spec": ("moegen.kernels.spec", "moegen.codegen.spec"),
    "render": ("moegen.codegen.render",),
    "preset_specs": ("moegen.codegen.catalog", "moegen.catalog"),
}
"""Where moegen's own functions are; one that has moved is looked for in all modules."""


@functools.cache
def seam(name: str) -> Any:
    """A class or function of moegen by its name alone."""
    for module in itertools.chain(HINTS[name], _defining(name)):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise LookupError(f"no module of moegen defines {name}")


def _defining(name: str) -> Iterator[str]:
    for path in sorted((ROOT / "moegen").rglob("*.py")):
        if re.search(rf"^(?:class|def) {name}\b", path.read_text(), re.MULTILINE):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def committed() -> dict[str, str]:
    """Text by stem, rendered now, of the kernels in generated/."""
    seam("preset_specs")  # with it every family is imported
    (manifest,) = (ROOT / "generated").rglob("manifest.json")
    spec = seam("Spec")
    return {stem: seam("render")(spec.parse(stem)).text for stem in json.loads(manifest.read_text())["kernels"]}


@functools.cache
def every() -> dict[str, str]:
    """Text by stem: the committed ones, and of those of PRESETS on both targets and of all these with one word changed,
    one for each class with the same words and 1, 2 or more ranks. Of those that differ in numbers only, the first.
    """
    ours = list(map(seam("Spec").parse, committed()))
    specs = dict.fromkeys(ours)
    for name, ranks in PRESETS:
        for target in ("sm90", "host"):
            specs.update(dict.fromkeys(seam("preset_specs")(name, ranks, target=target)))
    specs.update(dict.fromkeys([other for spec in specs for other in _with_another_word(spec)]))
    one_of_each = {_words(spec): spec for spec in reversed(specs)}
    texts: dict[str, tuple[str, str]] = {}
    for spec in (*ours, *reversed(one_of_each.values())):
        source = seam("render")(spec)
        texts.setdefault(_without_numbers(source.stem, source.text), (source.stem, source.text))
    return dict(texts.values())


def _with_another_word(spec: Any) -> Iterator[Any]:
    for field in dataclasses.fields(spec):
        for word in field.metadata["one_of"]:
            if word != getattr(spec, field.name):
                try:
                    yield dataclasses.replace(spec, **{field.name: word})
                except ValueError:  # SpecError: there is no such kernel
                    continue


def _words(spec: Any) -> tuple[object, ...]:
    words = [getattr(spec, field.name) for field in dataclasses.fields(spec) if field.metadata["one_of"]]
    return (type(spec), min(getattr(spec, "num_ranks", 0), 3), *words)


def _without_numbers(stem: str, text: str) -> str:
    _, _, _, body = text.split("\n", 3)  # without the banner, which says the stem's words
    return re.sub(r"\b\d+\b", "0", "\n\n\n" + body.replace(stem, "stem"))


@functools.cache
def headers() -> dict[str, str]:
    """The device's headers by their names in `#include <...>`."""
    paths = [path for path in sorted((ROOT / "templates").rglob("*.cuh")) if "host" not in path.parts]
    return {f"moegen/{path.name}": path.read_text() for path in paths}


@functools.cache
def _dead(text: str) -> list[Dead]:
    return dead(text, headers())


def _dead_in(stem: str, text: str, kind: DeadKind) -> Iterator[Dead]:
    return (each for each in _dead(_without_numbers(stem, text)) if each.kind == kind)


def dead_in_committed(kind: DeadKind) -> list[Finding]:
    """Each thing once for each committed kernel that does not use it."""
    texts = committed()
    return [Finding(stem, each.line, each.name) for stem in texts for each in _dead_in(stem, texts[stem], kind)]


def dead_names(kind: DeadKind) -> list[Finding]:
    """Each name once: how many of all kernels define it and do not use it, and the first of them."""
    stems: dict[str, list[str]] = {}
    for stem, text in every().items():
        for name in {each.name for each in _dead_in(stem, text, kind)}:
            stems.setdefault(name, []).append(stem)
    return [Finding(f"{len(found)} kernels, {found[0]}", 0, name) for name, found in sorted(stems.items())]


def long_lines(texts: dict[str, str], *, code_only: bool) -> list[Finding]:
    """Lines of more than 120 columns; of a line's code, its comment is a part."""
    found = []
    for stem, text in texts.items():
        codes = without_comments(text, strings=True).split("\n")
        for number, (line, code) in enumerate(zip(text.split("\n"), codes, strict=True), 1):
            if len(line) > COLUMNS and (code.strip() or not code_only):
                found.append(Finding(stem, number, f"{len(line)} columns"))
    return found


def stray_alignment(texts: dict[str, str]) -> list[Finding]:
    """Two and more blanks in a line of code, but for those that clang-format puts ahead of `?` and of comments."""
    return [
        Finding(stem, number, " ".join(code.split()))
        for stem, text in texts.items()
        for number, code in enumerate(without_comments(text, strings=True).split("\n"), 1)
        if re.search(r"\S {2,}[^?\s]", code)
    ]


def stray_comments(texts: dict[str, str]) -> list[Finding]:
    """Comments more than two blanks behind their code, in line with none of the lines above and below."""
    found = []
    for stem, text in texts.items():
        begins = list(map(_comment_begin, text.split("\n"), without_comments(text, strings=True).split("\n")))
        for above, (number, (column, gap)), below in zip(
            [(0, 0), *begins], enumerate(begins, 1), [*begins[1:], (0, 0)], strict=False
        ):
            if gap > 2 and column not in (above[0], below[0]):
                found.append(Finding(stem, number, f"{gap} blanks"))
    return found


def _comment_begin(line: str, code: str) -> tuple[int, int]:
    """Column of the comment behind a line's code, and the blanks ahead of it; 0, 0: there is none."""
    length = len(code.rstrip())
    behind = line[length:]
    gap = len(behind) - len(behind.lstrip())
    return (length + gap, gap) if length and behind.strip() else (0, 0)


def doubled_blank_lines(texts: dict[str, str]) -> list[Finding]:
    return [
        Finding(stem, line_of(text, match.start()) + 1, "blank lines")
        for stem, text in texts.items()
        for match in re.finditer(r"\n\n\n+", text)
    ]


def maybe_unused(texts: dict[str, str]) -> list[Finding]:
    """Every [[maybe_unused]], with what follows it. Texts are kernels by stem or templates by path."""
    return [
        Finding(place, line_of(text, match.start()), match[1].strip())
        for place, text in texts.items()
        for match in re.finditer(r"\[\[maybe_unused\]\]([^\[;=,(){}]*)", text)
    ]
