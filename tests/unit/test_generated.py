# SPDX-License-Identifier: Apache-2.0
"""The committed kernels: complete, up to date, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moegen.codegen import generated
from moegen.codegen.catalog import catalog
from moegen.codegen.files import find
from moegen.compile import manifest, nvrtc
from moegen.kernels.ll import LowLatencyDispatch
from moegen.kernels.spec import Spec

SPECS = catalog()[:2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A generated/ that is as it should be."""
    root = tmp_path / "generated"
    root.mkdir()
    generated.write(root, SPECS)
    return root


def kinds(root: Path) -> list[tuple[str, str]]:
    return [(found.kind, found.path) for found in generated.differences(root, SPECS)]


def kernel_path(index: int) -> str:
    return f"{SPECS[index].family}/{SPECS[index].stem}.cu"


def test_what_was_written_is_up_to_date(folder: Path) -> None:
    assert kinds(folder) == []
    assert generated.write(folder, SPECS) == []
    text = (folder / kernel_path(0)).read_text()
    assert "SPDX-License-Identifier" in text.splitlines()[0] and SPECS[0].template in text.splitlines()[1]


def test_stale_is_found_with_its_diff(folder: Path) -> None:
    path = folder / kernel_path(0)
    path.write_text(path.read_text() + "// edited by hand\n")
    (found,) = generated.differences(folder, SPECS)
    assert (found.kind, found.path) == ("stale", kernel_path(0))
    assert "\n-// edited by hand\n" in found.diff and found.diff.startswith("--- ")


def test_missing_and_orphaned_are_found(folder: Path) -> None:
    (folder / kernel_path(0)).unlink()
    (folder / "ll" / "old_kernel.cu").write_text("// old\n")
    assert kinds(folder) == [("missing", kernel_path(0)), ("orphaned", "ll/old_kernel.cu")]
    generated.write(folder, SPECS)
    assert kinds(folder) == [] and not (folder / "ll" / "old_kernel.cu").exists()


@pytest.mark.parametrize("damage", ["gone", "not json", "a kernel less"])
def test_the_manifest_is_checked_too(folder: Path, damage: str) -> None:
    path = folder / "manifest.json"
    if damage == "gone":
        path.unlink()
    elif damage == "not json":
        path.write_text("{")
    else:
        content = json.loads(path.read_text())
        content["kernels"].popitem()
        path.write_text(generated.manifest_text(content))
    assert [name for _, name in kinds(folder)] == ["manifest.json"]


def test_resources_are_carried_over_while_the_text_is_the_same(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content |= {"nvrtc": "some", "resources": {spec.stem: {"sm90": {"registers": 1}} for spec in SPECS}}
    content["kernels"][SPECS[0].stem]["sha256"] = "of an older text"
    path.write_text(generated.manifest_text(content))
    generated.write(folder, SPECS)
    kept = json.loads(path.read_text())
    assert list(kept["resources"]) == [SPECS[1].stem] and kept["nvrtc"] == "some"


@pytest.mark.nvrtc
def test_resources_are_recorded_and_compared(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = SPECS[1:]
    generated.write(folder, kernels)
    manifest.record(folder, kernels)
    assert generated.differences(folder, kernels) == []
    same = manifest.compare(folder, kernels)
    assert same.differences == () and same.pinned == same.running == nvrtc.identity() and same.compiled == 0

    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    assert set(content["resources"][kernels[0].stem]) == {"sm90", "sm100"}
    content["resources"][kernels[0].stem]["sm90"]["registers"] = 7
    path.write_text(generated.manifest_text(content))
    (line,) = manifest.compare(folder, kernels).differences
    assert line.startswith(f"{kernels[0].stem} sm90: registers 7 -> ")

    content["nvrtc"] = "nvrtc 1.0 build-id 00"
    path.write_text(generated.manifest_text(content))
    other = manifest.compare(folder, kernels)
    assert other.differences == () and other.pinned != other.running


def test_dispatch_uses_no_more_shared_memory_than_its_spec_says() -> None:
    """`LowLatencyDispatch.shared_bytes` decides how many teams a block gets; the manifest has what ptxas counted."""
    recorded = json.loads((find("generated") / "manifest.json").read_text())
    checked = 0
    for stem, targets in recorded["resources"].items():
        spec = Spec.parse(stem)
        if isinstance(spec, LowLatencyDispatch):
            checked += 1
            assert all(used["shared"] <= spec.shared_bytes for used in targets.values()), stem
    assert checked
