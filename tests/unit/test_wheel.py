# SPDX-License-Identifier: Apache-2.0
"""The wheel, built through the sdist and installed in an empty environment, runs a kernel far from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("build")
pytest.importorskip("hatchling")

SCRIPT = """
import torch, moegen
from moegen.codegen.files import find

def layer(world):
    with moegen.ExpertParallel(world, num_experts=2, num_topk=1, hidden=8, max_tokens_per_rank=4) as ep:
        x = torch.full((3, 8), float(world.rank + 1)).bfloat16()
        received = ep.dispatch(x, torch.tensor([[0], [1], [1]]))
        return received.counts.tolist(), torch.equal(ep.combine(received.tokens, received.handle), x)

print(moegen.__file__, find("templates"))
print(moegen.LocalWorld(2).run(layer))
"""


def ran(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOEGEN"))}
    environment = {**kept, **variables}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = ran(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, built from a copy of what the repository holds, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (wheel,) = built.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone; torch and the other dependencies are found where this Python has them."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # Only the paths count: .pth files in there, such as an editable moegen's, are not read.
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *dependency_paths()])
    (site / "dependencies.pth").write_text("\n".join(paths) + "\n")
    return python


def dependency_paths() -> list[str]:
    import jinja2
    import torch

    return [str(Path(module.__file__ or "").parents[1]) for module in (torch, jinja2)]


def test_the_wheel_is_pure_and_whole(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    templates = files_of("templates")
    assert templates and templates <= {name.removeprefix("moegen/") for name in names}
    assert not [name for name in names if name.startswith("moegen/generated/")], "kernels are rendered, not carried"
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "moegen").rglob("*.py")}
    tables = {path.relative_to(ROOT).as_posix() for path in (ROOT / "moegen" / "tuning").glob("*.json")}
    assert tables and modules | tables | {"moegen/py.typed"} <= set(names)
    assert not [name for name in names if not name.startswith(("moegen/", "moegen-"))]


def files_of(folder: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}


def test_the_sdist_has_what_tests_read_and_no_results(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert files_of("generated") <= names and files_of("templates") <= names
    assert not [name for name in names if name.startswith("bench/")]


def test_a_host_kernel_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    text = run(python, "-c", SCRIPT, cwd=tmp_path, MOEGEN_CACHE_DIR=str(tmp_path / "cache"))
    places, result = text.splitlines()
    environment = str(python.parents[1])
    assert all(place.startswith(environment) for place in places.split())
    assert result == "[([2], True), ([4], True)]"


def test_the_command_needs_no_checkout_but_to_write_one(python: Path, tmp_path: Path) -> None:
    command, cache = python.parent / "moegen", {"MOEGEN_CACHE_DIR": str(tmp_path / "cache")}
    stems = run(command, "list", cwd=tmp_path, **cache).split()
    committed = min((ROOT / "generated").rglob("*.cu"))
    assert committed.stem in stems
    assert run(command, "show", committed.stem, cwd=tmp_path, **cache) == committed.read_text()
    for options in ([], ["--check"]):
        refused = ran(command, "generate", *options, cwd=tmp_path, **cache)
        assert refused.returncode == 1 and "run `moegen generate` in a clone" in refused.stderr
