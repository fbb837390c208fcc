# SPDX-License-Identifier: Apache-2.0
"""The committed folder `generated/`: the catalog's kernels as text, and a manifest.

`generated/<family>/<stem>.cu`, and `generated/manifest.json`:

    schema     number of the naming scheme
    kernels    stem -> path and sha256 of its text
    nvrtc      identity of the NVRTC that `resources` is from, or null
    resources  stem -> target -> sha256 of the cubin, registers, shared memory, spills (compile/manifest.py)
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moegen.codegen.files import find
from moegen.codegen.render import render
from moegen.kernels.spec import SCHEMA, Spec

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Difference:
    """One file of generated/ that is not as it should be, and the unified diff from what is there to what should be."""

    kind: Literal["stale", "missing", "orphaned"]
    path: str
    diff: str


def specs() -> list[Spec]:
    """The catalog."""
    from moegen.codegen.catalog import catalog

    return list(catalog())


def folder() -> Path:
    """The folder `generated` of this installation or source tree."""
    return find("generated")


def expected(root: Path, kernels: Sequence[Spec]) -> dict[str, str]:
    """What generated/ should hold: text by path. Resources are carried over where the kernel's text is unchanged."""
    files: dict[str, str] = {}
    entries: dict[str, dict[str, str]] = {}
    for spec in kernels:
        source = render(spec)
        path = f"{spec.family}/{spec.stem}.cu"
        files[path] = source.text
        entries[spec.stem] = {"path": path, "sha256": source.digest}
    old = read_manifest(root)
    known = old.get("kernels", {})
    kept = {stem: found for stem, found in old.get("resources", {}).items() if known.get(stem) == entries.get(stem)}
    manifest = {"schema": SCHEMA, "kernels": entries, "nvrtc": old.get("nvrtc") if kept else None, "resources": kept}
    return {**files, MANIFEST: manifest_text(manifest)}


def write(root: Path, kernels: Sequence[Spec]) -> list[Difference]:
    """Makes generated/ what it should be; gives what was changed."""
    found = differences(root, kernels)
    files = expected(root, kernels)
    for difference in found:
        path = root / difference.path
        if difference.kind == "orphaned":
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[difference.path])
    return found


def differences(root: Path, kernels: Sequence[Spec]) -> list[Difference]:
    """Every stale, missing or orphaned file of generated/; nothing is written."""
    wanted = expected(root, kernels)
    there = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    found: list[Difference] = []
    for name, text in sorted(wanted.items()):
        old = there[name].read_text(errors="replace") if name in there else ""
        if name not in there:
            found.append(Difference("missing", name, _diff(name, old, text)))
        elif old != text:
            found.append(Difference("stale", name, _diff(name, old, text)))
    for name in sorted(there.keys() - wanted.keys()):
        if Path(name).suffix in (".cu", ".json"):
            found.append(Difference("orphaned", name, _diff(name, there[name].read_text(errors="replace"), "")))
    return found


def read_manifest(root: Path) -> Mapping[str, Any]:
    """The manifest as it stands; empty if there is none or it is not sound."""
    try:
        found = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def manifest_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def _diff(name: str, old: str, new: str) -> str:
    lines = difflib.unified_diff(
        old.splitlines(keepends=True), new.splitlines(keepends=True), f"generated/{name}", f"{name} as it should be"
    )
    return "".join(lines)
