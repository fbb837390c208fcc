# SPDX-License-Identifier: Apache-2.0
"""The measures by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from scripts.house import kernels, modules, templates
from scripts.house.dead import DeadKind
from scripts.house.finding import Finding

MODULE_LINES = 400
TEMPLATE_LINES = 300


class Measure(NamedTuple):
    """What is counted, in words, and how it is found."""

    what: str
    find: Callable[[], list[Finding]]


def _on_committed(find: Callable[[dict[str, str]], list[Finding]], what: str) -> Measure:
    return Measure(f"{what}, committed kernels", lambda: find(kernels.committed()))


def _on_templates(find: Callable[[dict[str, str]], list[Finding]], what: str) -> Measure:
    return Measure(what, lambda: find(templates.for_device(templates.templates())))


def _on_modules(find: Callable[[modules.Modules], list[Finding]], what: str) -> Measure:
    return Measure(what, lambda: find(modules.modules()))


def _dead(name: str, kind: DeadKind, what: str) -> dict[str, Measure]:
    return {
        f"{name}s": Measure(f"{what}, committed kernels", partial(kernels.dead_in_committed, kind)),
        f"{name}-names": Measure(f"{what}, distinct names in all kernels", partial(kernels.dead_names, kind)),
    }


MEASURES: dict[str, Measure] = {
    **_dead("uncalled-function", "function", "functions that the kernel never calls"),
    **_dead("unread-member", "member", "members of Params that are never read"),
    **_dead("unused-enumerator", "enumerator", "enumerators (phases) that are never used"),
    **_dead("unused-constant", "constant", "constants that are never used"),
    **_dead("unused-type", "type", "structs and aliases that are never used"),
    "long-code-lines": _on_committed(partial(kernels.long_lines, code_only=True), "code over 120 columns"),
    "long-lines": _on_committed(partial(kernels.long_lines, code_only=False), "lines over 120 columns"),
    "stray-alignment": _on_committed(kernels.stray_alignment, "blanks in a row in code"),
    "stray-comments": _on_committed(kernels.stray_comments, "comments far behind their code, under no other"),
    "doubled-blank-lines": _on_committed(kernels.doubled_blank_lines, "blank lines in a row"),
    "maybe-unused": _on_committed(kernels.maybe_unused, "[[maybe_unused]]"),
    "maybe-unused-templates": _on_templates(kernels.maybe_unused, "[[maybe_unused]] in the device's templates"),
    "duplicate-functions": _on_templates(templates.duplicate_functions, "functions that several templates define"),
    "duplicate-structs": _on_templates(templates.duplicate_structs, "structs that several templates define"),
    "cpp-in-statements": _on_templates(templates.strings_in_statements, "C++ in strings of Jinja's statements"),
    "cpp-in-expressions": _on_templates(templates.strings_in_expressions, "C++ in strings of $(...)"),
    "family-tests": _on_templates(templates.family_tests, "mentions of s.family in parts, also by another name"),
    "long-templates": Measure(
        f"templates over {TEMPLATE_LINES} lines", lambda: templates.long_files(templates.templates(), TEMPLATE_LINES)
    ),
    "long-modules": Measure(
        f"modules over {MODULE_LINES} lines, docstrings aside",
        lambda: modules.long_modules(modules.by_path(), MODULE_LINES),
    ),
    "import-cycles": _on_modules(modules.cycles, "cycles of imports, those for type checkers counted"),
    "modules-in-cycles": _on_modules(modules.in_cycles, "modules in such cycles"),
    "room-arrows": _on_modules(modules.arrows, "pairs of a room and one that it imports"),
    "family-imports": _on_modules(modules.family_imports, "imports of one family's modules by another's"),
    "low-latency-importers": Measure(
        "modules that import the low-latency Specs",
        lambda: modules.importers(modules.low_latency_specs(), modules.modules()),
    ),
}
