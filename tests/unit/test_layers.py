# SPDX-License-Identifier: Apache-2.0
"""Each room imports only what lies below it, no family imports another, and importing moegen does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "moegen"

FAMILIES = ("low_latency", "high_throughput", "one_sided")
FLOORS = (
    ("errors", "env", "limits", "formats"),
    ("codegen",),
    ("tuning",),
    ("compile",),
    ("runtime",),
    ("base",),
    ("collective",),
    FAMILIES,
    ("catalog", "presets", "functional", "reference"),
    ("cli", "bench", "demo", "compat", "__main__"),
)
"""Lowest first; rooms of one floor may import each other, but for families."""

FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
REFERENCES = {"torch", "moegen.formats"}
"""What references import besides each other: the definition of right stands apart from what it judges."""

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
Run = Callable[..., subprocess.CompletedProcess[str]]


def room_of(module: str) -> str:
    return module.split(".")[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports, also inside functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in NAMES or node.module == "moegen" else node.module


def allowed(module: str, imported: str) -> bool:
    here, there = room_of(module), room_of(imported)
    if here == there:
        return True
    both_families = here in FAMILIES and there in FAMILIES
    return FLOOR[there] <= FLOOR[here] and not both_families


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downwards(path: Path) -> None:
    module = name_of(path)
    assert room_of(module) in FLOOR, f"{module} is in no room; add it to FLOORS"
    ours = [name for name in imports(path) if name.startswith("moegen.") and room_of(name) in FLOOR]
    assert [name for name in ours if not allowed(module, name)] == [], f"{module} imports what lies above or beside it"


def test_a_family_may_not_import_another() -> None:
    assert not allowed("moegen.low_latency.spec", "moegen.high_throughput.spec")
    assert not allowed("moegen.runtime.kernel", "moegen.base.lifecycle")
    assert allowed("moegen.low_latency.spec", "moegen.codegen.spec")


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.stem.startswith("reference") and path.parent != PACKAGE], ids=name_of
)
def test_references_import_torch_and_each_other(path: Path) -> None:
    others = {name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in others if not name.rpartition(".")[2].startswith("reference")} <= REFERENCES


def test_no_modules_import_each_other_in_a_circle() -> None:
    """A package's `__init__` aside, which is run whenever one of its modules is imported."""
    modules = [path for path in MODULES if path.name != "__init__.py"]
    names = {name_of(path) for path in modules}
    graph = {name_of(path): {name for name in imports(path) if name in names} for path in modules}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_importing_moegen_does_no_work(python: Run) -> None:
    code = "import sys, moegen; print([m for m in ('cuda', 'jinja2', 'torch', 'rich', 'typer') if m in sys.modules])"
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_compile_layer_imports_lazily(python: Run) -> None:
    code = "import sys, moegen.compile.binary; print([m for m in ('cuda', 'jinja2', 'torch') if m in sys.modules])"
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_file_says_its_license(path: Path) -> None:
    text = path.read_text()
    assert not text or text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
