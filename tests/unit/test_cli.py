# SPDX-License-Identifier: Apache-2.0
"""The command line: quick to start, one message per error, a doctor that never fails."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moegen import env
from moegen.cli import doctor
from moegen.cli.main import VERBS
from moegen.codegen.catalog import catalog
from moegen.codegen.render import render
from moegen.errors import InputError

Run = Callable[..., subprocess.CompletedProcess[str]]
STEM = catalog()[0].stem


def test_help_lists_every_verb_without_loading_anything_heavy(python: Run) -> None:
    code = (
        "import sys; sys.argv = ['moegen', '--help']\n"
        "from moegen.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('loaded', [m for m in ('torch', 'cuda', 'jinja2', 'numpy') if m in sys.modules])"
    )
    done = python(code)
    assert done.stdout.splitlines()[-1] == "loaded []", done.stderr
    for verb in VERBS:
        assert f" {verb} " in done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_module_and_help(verb: str, moegen_command: Run) -> None:
    assert importlib.import_module(VERBS[verb]).app
    done = moegen_command(verb, "--help")
    assert done.returncode == 0 and f"moegen {verb}" in done.stdout


def test_show_prints_the_exact_source(moegen_command: Run) -> None:
    assert moegen_command("show", STEM).stdout == render(catalog()[0]).text
    assert moegen_command("show", STEM, "--source").stdout == render(catalog()[0]).text


def test_list_prints_stems(moegen_command: Run) -> None:
    assert moegen_command("list").stdout.split() == [spec.stem for spec in catalog()]


@pytest.mark.nvrtc
def test_show_ptx_and_resources(moegen_command: Run) -> None:
    assert ".target sm_100a" in moegen_command("show", STEM, "--ptx", "--arch", "sm100").stdout
    assert "registers" in moegen_command("show", STEM, "--resources").stdout
    assert "no PTX" in moegen_command("show", STEM, "--ptx", "--arch", "host").stderr


def test_cache_verbs(moegen_command: Run, cache_root: Path) -> None:
    assert f"folder   {cache_root}" in moegen_command("cache", "info").stdout
    assert "removed 0 kernels" in moegen_command("cache", "prune", "--older-than", "1d").stdout
    assert "removed 0 kernels" in moegen_command("cache", "clear").stdout
    assert "30d" in moegen_command("cache", "prune", "--older-than", "soon").stderr


def test_doctor_answers_every_question(moegen_command: Run) -> None:
    done = moegen_command("doctor")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    for word in ("moegen", "python", "torch", "cuda-bindings", "NVRTC", "driver", "C++ compiler", "GPU", "cache"):
        assert word in done.stdout


def test_doctor_survives_a_broken_machine(moegen_command: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    broken = {"MOEGEN_CACHE_DIR": str(tmp_path / "file"), "MOEGEN_PACK": "/nowhere", "MOEGEN_CXX": "no-such-compiler"}
    done = moegen_command("doctor", **broken)
    assert done.returncode == 0, done.stderr
    assert "no-such-compiler" in done.stdout and "unusable" in done.stdout
    assert moegen_command("doctor", MOEGEN_CACHE_TRUST="maybe").returncode == 0


def test_a_probe_that_fails_is_a_line() -> None:
    def probe() -> doctor.Iterator[doctor.Line]:
        yield "first", "found"
        raise RuntimeError("broken")

    lines = doctor._guarded(probe)
    assert lines[0] == ("first", "found") and "RuntimeError: broken" in lines[1][1]


@pytest.mark.parametrize("name", [name for name, variable in env.VARIABLES.items() if variable.one_of])
def test_a_bad_value_of_a_variable_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "perhaps")
    with pytest.raises(InputError, match=f"{name}='perhaps'"):
        env.raw(name)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEGEN_CACHE_DIR", "~/somewhere")
    assert env.cache_dir() == Path.home() / "somewhere"
    monkeypatch.delenv("MOEGEN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert env.cache_dir() == tmp_path / "moegen"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert env.cache_dir() == Path.home() / ".cache" / "moegen"


def test_the_page_of_environment_variables_is_up_to_date() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "environment.md"
    if not page.exists():
        pytest.skip("docs/environment.md is not written yet")
    assert page.read_text() == env.markdown()
