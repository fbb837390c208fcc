# SPDX-License-Identifier: Apache-2.0
"""The documents agree with the code."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moegen import env, errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
README_ORDER = ["Install", "Example", "Two commands", "What runs where", "Measured", "Limits", "Links"]


def text(name: str) -> str:
    return (ROOT / name).read_text()


def test_the_environment_page_is_current() -> None:
    assert text("docs/environment.md") == env.markdown(), "run `python docs/write_environment.py`"


def test_no_document_names_a_variable_that_is_not_read() -> None:
    for page in PAGES:
        assert set(re.findall(r"\bMOEGEN_[A-Z_]+", page.read_text())) <= set(env.VARIABLES), page.name


def test_every_error_has_its_entry_in_troubleshooting() -> None:
    named = set(re.findall(r"^### (\w+)$", text("docs/troubleshooting.md"), re.MULTILINE))
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert named == classes


def test_the_readme_has_its_sections_in_order() -> None:
    assert re.findall(r"^## (.*)$", text("README.md"), re.MULTILINE) == README_ORDER


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_licence_and_notice_are_whole() -> None:
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text("LICENSE")
    for project in ("DeepEP", "MSCCL++", "FlashInfer", "TensorRT-LLM", "Mooncake"):
        assert project in text("NOTICE")


def test_the_kernel_of_contributing_works(tmp_path: Path) -> None:
    page = text("CONTRIBUTING.md")
    files = re.findall(r"^`(\S+)`, the .*?```\w+\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in files] == ["moegen/kernels/scale.py", "templates/scale_rows.cu.jinja"]
    for folder in ("moegen", "templates"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in files:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(content)
    assert len(files[1][1].splitlines()) == 10
    call = re.findall(r"^The call, .*?```python\n(.*?)```", page, re.MULTILINE | re.DOTALL)[0]
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{call}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
