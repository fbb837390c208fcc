# SPDX-License-Identifier: Apache-2.0
"""The wheel, built through the sdist and installed in an empty environment, runs a kernel far from the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
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

print(moegen.__file__, find("templates"), find("generated"))
print(moegen.LocalWorld(2).run(layer))
"""


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MOEGEN"))}
    environment = {**kept, **variables}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, which is built from a copy of what the repository holds."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    assert len(list(folder.glob("*.tar.gz"))) == 1
    (built,) = folder.glob("*.whl")
    return built


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
    for folder in ("templates", "generated"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert files and files <= {name.removeprefix("moegen/") for name in names}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "moegen").rglob("*.py")}
    tables = {path.relative_to(ROOT).as_posix() for path in (ROOT / "moegen" / "tuning").glob("*.json")}
    assert tables and modules | tables | {"moegen/py.typed"} <= set(names)
    assert not [name for name in names if not name.startswith(("moegen/", "moegen-"))]


def test_a_host_kernel_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    text = run(python, "-c", SCRIPT, cwd=tmp_path, MOEGEN_CACHE_DIR=str(tmp_path / "cache"))
    places, result = text.splitlines()
    environment = str(python.parents[1])
    assert all(place.startswith(environment) for place in places.split())
    assert result == "[([2], True), ([4], True)]"


def test_the_command_is_installed(python: Path, tmp_path: Path) -> None:
    text = run(python.parent / "moegen", "list", cwd=tmp_path, MOEGEN_CACHE_DIR=str(tmp_path / "cache"))
    assert text.startswith("ll_dispatch_")
