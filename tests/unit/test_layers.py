# SPDX-License-Identifier: Apache-2.0
"""Each layer imports only what lies below it, and importing moegen does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "moegen"

LAYERS = (
    ("errors", "env", "admission", "leftovers"),
    ("kernels",),
    ("tuning",),
    ("codegen", "select"),
    ("compile",),
    ("runtime", "handle", "rows", "payloads", "checks", "row_checks", "payload_checks", "payload_results"),
    ("expert_parallel", "high_throughput", "row_calls", "one_sided"),
    ("functional",),
    ("cli", "bench", "demo", "compat", "__main__"),
)
"""Lowest first; what stands on one line may import each other."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
_ALONE = ("reference", "reference_payloads", "reference_quantise", "reference_rows")
ALONE = {name: {"torch"} for name in _ALONE}
"""Modules that import nothing of moegen but each other, and of others only these."""

MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
Run = Callable[..., subprocess.CompletedProcess[str]]


def layer_of(module: str) -> str:
    return module.split(".")[1]


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports, also inside functions; what is for type checkers only does not count."""
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "moegen":
            yield from (f"moegen.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


def statements(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downwards(path: Path) -> None:
    module = name_of(path)
    layer = layer_of(module)
    ours = [name for name in imports(path) if name.startswith("moegen.")]
    if layer in ALONE:
        assert {layer_of(name) for name in ours} <= set(ALONE)
        others = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"moegen"}
        assert others <= ALONE[layer]
        return
    if layer in ("demo", "bench", "cli", "compat"):
        ours = [name for name in ours if layer_of(name) not in ALONE]
    assert layer in RANK, f"{module} belongs to no layer; add it to LAYERS"
    upwards = [name for name in ours if RANK.get(layer_of(name), len(LAYERS)) > RANK[layer]]
    assert upwards == [], f"{module} imports what lies above it"


def test_importing_moegen_does_no_work(python: Run) -> None:
    code = "import sys, moegen; print([m for m in ('cuda', 'jinja2', 'torch', 'rich', 'typer') if m in sys.modules])"
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_compile_layer_imports_lazily(python: Run) -> None:
    code = "import sys, moegen.compile.binary; print([m for m in ('cuda', 'jinja2', 'torch') if m in sys.modules])"
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_file_says_its_licence_and_stays_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert not lines or lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert len(lines) <= 400
