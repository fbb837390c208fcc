# SPDX-License-Identifier: Apache-2.0
"""Every tensor that moegen makes says where it is and what it holds: torch's defaults are the user's to change."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import _device

PACKAGE = Path(__file__).resolve().parents[2] / "moegen"
MODULES = sorted(PACKAGE.rglob("*.py"))

FACTORIES = {made.__name__ for made in _device._device_constructors()}  # type: ignore[no-untyped-call]
"""What `torch.set_default_device` and `with torch.device(...)` act on."""

NEEDED = {
    **{name: {"device", "dtype"} for name in FACTORIES},
    "frombuffer": {"dtype"},  # its memory is the buffer's
    "Generator": {"device"},  # holds a state and no numbers of a dtype
}
"""Keywords of each factory. Not here, because the tensor they are called with decides: `*_like`, `new_*`."""

LEGACY = {"Tensor", "FloatTensor", "IntTensor", "LongTensor", "ByteTensor", "from_numpy"}
"""Constructors that take neither, or are of no use where the others are."""

HOMES = {"torch", "symm_mem"}


def faults(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    types = {id(inner) for node in ast.walk(tree) for inner in _annotations(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name) or node.value.id not in HOMES:
            continue
        call = called.get(id(node))
        if node.attr in LEGACY and call is not None:
            yield f"{node.lineno}: torch.{node.attr}(...)"
        if node.attr not in NEEDED or id(node) in types:
            continue
        given = set() if call is None else {keyword.arg for keyword in call.keywords}
        missing = NEEDED[node.attr] - given
        if missing:
            yield f"{node.lineno}: {ast.unparse(node)} without {' and '.join(sorted(missing))}"


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    """What stands where a type is written."""
    for name in ("annotation", "returns"):
        written = getattr(node, name, None)
        if written is not None:
            yield from ast.walk(written)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_factories_name_device_and_dtype(path: Path) -> None:
    assert list(faults(path.read_text())) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.zeros(3, dtype=torch.int32, device='cpu')", 0),
        ("torch.zeros(3, dtype=torch.int32)", 1),
        ("torch.arange(3, device=x.device)", 1),
        ("make = partial(torch.empty, device='cpu')", 1),
        ("torch.frombuffer(memory, dtype=torch.uint8)", 0),
        ("torch.Generator().manual_seed(1)", 1),
        ("torch.Tensor(3)", 1),
        ("x.new_zeros(3), torch.empty_like(x)", 0),
        ("def f(generator: torch.Generator) -> torch.Tensor: ...", 0),
    ],
)
def test_the_rule_sees(source: str, count: int) -> None:
    assert len(list(faults(source))) == count


def test_the_rule_knows_the_usual_factories() -> None:
    assert {"empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "randint", "randperm"} <= FACTORIES
    assert all(hasattr(torch, name) for name in ("frombuffer", "Generator"))
