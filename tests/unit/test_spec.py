# SPDX-License-Identifier: Apache-2.0
"""Rules that hold for every Spec class; a new family is picked up through the catalog."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moegen.codegen.catalog import MAX_CATALOG, catalog
from moegen.codegen.render import render
from moegen.compile import nvrtc
from moegen.compile.target import Target
from moegen.errors import InputError, SpecError
from moegen.kernels.a2a_payloads import RowBytes
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec, WarpGroups

SPECS = catalog()
SAMPLES = list({type(spec): spec for spec in reversed(SPECS)}.values())


def other_values(field: dataclasses.Field[Any], value: Any) -> Iterator[Any]:
    if field.metadata["one_of"]:
        yield from (word for word in field.metadata["one_of"] if word != value)
    elif isinstance(value, int):
        yield from (value * 2, value // 2, value + 1, value - 1, value + 8, value + 16)
    elif isinstance(value, RowBytes):
        yield from (RowBytes((*value.widths, 4)), RowBytes(value.widths[1:]), RowBytes(value.widths[::-1]))
    else:
        groups = [WarpGroups(a, b) for a in (1, 2, 4) for b in (1, 2, 8)]
        yield from (other for other in groups if other != value)


def neighbours(spec: Spec) -> Iterator[tuple[str, Spec]]:
    """For each field that may have another value: its name, and the Spec with only that changed."""
    for field in dataclasses.fields(spec):
        for value in other_values(field, getattr(spec, field.name)):
            try:
                changed = dataclasses.replace(spec, **{field.name: value})
            except SpecError:
                continue
            yield field.name, changed
            break


CHANGES = [(spec, name, other) for spec in SAMPLES for name, other in neighbours(spec)]
change = pytest.mark.parametrize(("spec", "field", "other"), CHANGES, ids=lambda v: v if isinstance(v, str) else "")


def test_every_registered_class_has_a_sample() -> None:
    shipped = {cls for cls in Spec.registry.values() if cls.family != "bench"}  # registered when first imported
    assert {type(spec) for spec in SAMPLES} == shipped


def test_fields_that_can_change_are_covered() -> None:
    for spec in SAMPLES:
        fixed = {f.name for f in dataclasses.fields(spec) if len(f.metadata["one_of"]) == 1}
        assert {name for s, name, _ in CHANGES if s is spec} == {f.name for f in dataclasses.fields(spec)} - fixed


@change
def test_one_field_changes_stem_and_text(spec: Spec, field: str, other: Spec) -> None:
    assert spec.stem != other.stem
    assert render(spec).digest != render(other).digest


@pytest.mark.nvrtc
@change
def test_one_field_changes_the_key(spec: Spec, field: str, other: Spec) -> None:
    target = Target("sm90")
    assert nvrtc.recipe(render(spec), target).key != nvrtc.recipe(render(other), target).key


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
def test_stem_is_a_symbol_and_parses_back(spec: Spec) -> None:
    assert re.fullmatch(r"[a-z0-9_]+", spec.stem)
    assert Spec.parse(spec.stem) == spec
    assert f"{spec.symbol}(" in render(spec).text


@pytest.mark.parametrize("spec", SAMPLES, ids=lambda spec: type(spec).__name__)
def test_bad_stems_say_what_is_wrong(spec: Spec) -> None:
    words = spec.stem.split("_")
    for bad in ("", "nonsense", "_".join(words[:-1]), spec.stem + "_more", spec.stem.upper(), f" {spec.stem}"):
        with pytest.raises(SpecError, match=r"known kernel|fields after|expected"):
            Spec.parse(bad)
    for position in range(2, len(words)):
        bad = "_".join([*words[:position], "what", *words[position + 1 :]])
        with pytest.raises(SpecError):
            Spec.parse(bad)


def test_the_usual_word_of_a_rare_field_is_not_said() -> None:
    rare = [(spec, f) for spec in SAMPLES for f in dataclasses.fields(spec) if f.metadata["unsaid"]]
    assert rare
    for spec, f in rare:
        usual, *others = f.metadata["one_of"]
        assert usual not in spec.stem
        assert f.name not in render(spec).text.splitlines()[2]
        with pytest.raises(SpecError, match="expected"):
            Spec.parse(f"{spec.stem}_{usual}")
        for word in others:
            changed = dataclasses.replace(spec, **{f.name: word})
            assert f"_{word}" in changed.stem
            assert Spec.parse(changed.stem) == changed


@pytest.mark.parametrize("spec", SAMPLES, ids=lambda spec: type(spec).__name__)
def test_a_number_has_one_spelling(spec: Spec) -> None:
    padded = re.sub(r"_r(\d+)_", r"_r0\1_", spec.stem)
    assert padded != spec.stem
    with pytest.raises(SpecError, match="canonical"):
        Spec.parse(padded)


def test_catalog_is_small_and_without_doubles() -> None:
    assert 0 < len(SPECS) <= MAX_CATALOG
    assert len({spec.stem for spec in SPECS}) == len(SPECS)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.stem)
def test_text_has_no_jinja_left(spec: Spec) -> None:
    text = render(spec).text
    for mark in ("//%", "$(", "/*%", "/*#", "//#"):
        assert mark not in text
    assert text.startswith("// SPDX-License-Identifier: Apache-2.0\n")
    assert text.endswith("\n")


@pytest.mark.parametrize("spec", SAMPLES, ids=lambda spec: f"{spec.family}_{spec.op}")
def test_a_kernel_first_waits_for_the_launch_before(spec: Spec) -> None:
    """Launches overlap from sm_90 on: what is read ahead of this may not be written yet."""
    body = re.search(r'extern "C" __global__ [^{]*\{\s*(\S+)', render(spec).text)
    assert body is not None
    assert body[1] == "await_launch_before();"


@pytest.mark.parametrize("spec", SAMPLES, ids=lambda spec: spec.stem)
def test_numbers_are_integers(spec: Spec) -> None:
    """8.0 and True equal 8 and 1: caches would find one Spec's text under the other's key."""
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, int):
            for wrong in (float(value), str(value), value == 1, None):
                with pytest.raises(SpecError, match=f"{field.name} must be an integer"):
                    dataclasses.replace(spec, **{field.name: wrong})
            same = dataclasses.replace(spec, **{field.name: np.int64(value)})
            assert same == spec and type(getattr(same, field.name)) is int


def test_parts_of_specs_are_integers() -> None:
    for wrong in (2.0, True, "2"):
        with pytest.raises(SpecError, match="must be an integer"):
            WarpGroups(wrong, 2)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="integers"):
            RowBytes((16, wrong))  # type: ignore[arg-type]
        with pytest.raises(InputError, match="num_experts must be an integer"):
            Problem(1, wrong, 2, 64, 8)  # type: ignore[arg-type]
    assert str(RowBytes((np.int32(16), 8))) == "16x8" and type(WarpGroups(np.int32(1), 2).groups) is int
