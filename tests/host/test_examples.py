# SPDX-License-Identifier: Apache-2.0
"""The examples, and the README's, do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README_LINES = 12


def run(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.dist
def test_two_ranks(tmp_path: Path) -> None:
    # Not by lines: both processes and gloo write to one stream.
    sent = re.findall(r"rank (\d): sent (\d+) tokens", run(str(ROOT / "examples" / "two_ranks.py"), cwd=tmp_path))
    assert sorted(sent) == [("0", "20"), ("1", "25")]


def test_virtual_ranks(tmp_path: Path) -> None:
    lines = run(str(ROOT / "examples" / "virtual_ranks.py"), cwd=tmp_path).splitlines()
    assert lines[2] == "rank 2 leaves without a word"
    assert lines[0].startswith("rank 0 missed rank 2") and lines[1].startswith("rank 1 missed rank 2")


@pytest.mark.dist
def test_train_moe_lm(tmp_path: Path) -> None:
    """Two ranks and one process; the script itself fails if their losses differ."""
    script = str(ROOT / "examples" / "train_moe_lm.py")
    command = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, "--device", "cpu")
    told = run(*command, "--steps", "6", "--batch", "4", "--check", "--out", "losses", cwd=tmp_path)
    assert "largest difference to one process" in told
    lines = (tmp_path / "losses" / "losses.csv").read_text().splitlines()
    assert lines[0] == "step,2 ranks,one process" and len(lines) == 1 + 6
    first, last = (float(lines[at].split(",")[1]) for at in (1, -1))
    assert last < first - 0.5


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert all(path.name in here for path in (ROOT / "examples").glob("*.py"))


def test_the_readme_example_runs(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert len(code.splitlines()) <= README_LINES
    (tmp_path / "example.py").write_text(code)
    assert run("example.py", cwd=tmp_path).split() == ["[0.0,", "0.0,", "0.0,", "0.0]"]
