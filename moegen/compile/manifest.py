# SPDX-License-Identifier: Apache-2.0
"""The resource part of generated/manifest.json: what the catalog's kernels use, for one pinned NVRTC.

A cubin is a function of text, headers, options and NVRTC, so its digest can be committed, and a change in registers,
shared memory or spills is seen in review.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moegen import env
from moegen.codegen import generated
from moegen.codegen.render import render
from moegen.compile import ninja_build, nvrtc
from moegen.compile.binary import Binary
from moegen.compile.target import Target
from moegen.errors import InputError
from moegen.kernels.spec import Spec

TARGETS = (Target("sm90"), Target("sm100"))

Resources = dict[str, dict[str, dict[str, Any]]]
"""stem -> target -> fields."""


@dataclass(frozen=True)
class Comparison:
    """What comparing the catalog with the manifest gave.

    Attributes:
        differences: one line each; empty if all agree, or if nothing could be compared.
        pinned: identity of the manifest's NVRTC, or None if the manifest has no resources yet.
        running: identity of the NVRTC in use. If it is not the pinned one, the kernels were compiled and not compared.
        compiled: kernels that had to be compiled for it.
    """

    differences: tuple[str, ...]
    pinned: str | None
    running: str
    compiled: int


def record(root: Path, kernels: Sequence[Spec], progress: ninja_build.Progress | None = None) -> Resources:
    """Compiles the catalog and writes its resources, and the NVRTC in use as the pinned one, into the manifest."""
    found, _ = measure(kernels, progress)
    manifest = {**generated.read_manifest(root), "nvrtc": nvrtc.identity(), "resources": found}
    (root / generated.MANIFEST).write_text(generated.manifest_text(manifest))
    return found


def compare(root: Path, kernels: Sequence[Spec], progress: ninja_build.Progress | None = None) -> Comparison:
    """Compiles the catalog, and compares it with the manifest if that was made by the same NVRTC."""
    manifest = generated.read_manifest(root)
    found, compiled = measure(kernels, progress)
    pinned, running = manifest.get("nvrtc"), nvrtc.identity()
    if pinned != running:
        return Comparison((), pinned, running, compiled)
    return Comparison(tuple(_changes(manifest.get("resources", {}), found)), pinned, running, compiled)


def measure(kernels: Sequence[Spec], progress: ninja_build.Progress | None = None) -> tuple[Resources, int]:
    """The resources of every kernel on every target of the manifest, and how many had to be compiled for it."""
    if env.lineinfo():
        raise InputError("MOEGEN_NVRTC_LINEINFO=1 changes every cubin; unset it to measure resources")
    wanted = [(render(spec), target) for target in TARGETS for spec in kernels]
    report = ninja_build.build(wanted, progress=progress)
    found: Resources = {}
    for binary in report.binaries:
        found.setdefault(binary.stem, {})[binary.target.name] = _fields(binary)
    return found, report.compiled


def _fields(binary: Binary) -> dict[str, Any]:
    used = binary.resources
    numbers = {"registers": used.registers, "shared": used.shared_bytes, "spills": used.spill_bytes} if used else {}
    return {"sha256": binary.sha256, **numbers}


def _changes(old: Resources, new: Resources) -> list[str]:
    lines = []
    for stem in sorted(old.keys() | new.keys()):
        for target in sorted(old.get(stem, {}).keys() | new.get(stem, {}).keys()):
            before, after = old.get(stem, {}).get(target, {}), new.get(stem, {}).get(target, {})
            changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
            if changed:
                words = ", ".join(f"{name} {_word(before.get(name))} -> {_word(after.get(name))}" for name in changed)
                lines.append(f"{stem} {target}: {words}")
    return lines


def _word(value: Any) -> str:
    return "none" if value is None else str(value)[:12]
