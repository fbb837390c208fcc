# SPDX-License-Identifier: Apache-2.0
"""`moegen build`: parallel, incremental, with a table and a last line that scripts can read."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from moegen.codegen.catalog import preset_specs
from moegen.codegen.render import Source, render
from moegen.compile import ninja_build
from moegen.compile.ninja_build import build
from moegen.compile.target import Target
from moegen.errors import CompileError
from moegen.kernels.spec import SCHEMA

pytestmark = pytest.mark.nvrtc

Kernel = Callable[..., Source]
Run = Callable[..., subprocess.CompletedProcess[str]]
FAMILY = "a2a"
TINY = ("build", "--arch", "sm90", "--preset", "tiny", "--ranks", "2", "--family", FAMILY)


def test_second_build_does_nothing(moegen_command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = moegen_command(*TINY), moegen_command(*TINY)
    specs = preset_specs("tiny", [2], FAMILY, "sm90")
    count = len(specs)
    assert first.stdout.splitlines()[-1] == f"compiled {count}, up to date 0", first.stderr
    assert second.stdout.splitlines()[-1] == f"compiled 0, up to date {count}"
    for spec in specs:
        assert spec.stem in first.stdout and spec.stem in second.stdout


def test_build_ignores_jit_off_and_writes_a_pack(moegen_command: Run, tmp_path: Path) -> None:
    stem = preset_specs("tiny", [2], None, "sm90")[0].stem
    out = tmp_path / "tiny.moepack"
    done = moegen_command("build", "--arch", "sm90", stem, "--out", str(out), MOEGEN_JIT="off")
    assert done.stdout.splitlines()[-1] == "compiled 1, up to date 0", done.stderr
    shown = moegen_command("show", stem, "--resources", MOEGEN_JIT="off", MOEGEN_PACK=str(out))
    assert "from pack" in shown.stdout, shown.stderr


def test_only_what_changed_is_compiled(kernel: Kernel, sm90: Target) -> None:
    sources = [kernel(f"tiny_{i}", i) for i in range(5)]
    assert build([(source, sm90) for source in sources], jobs=2).compiled == 5
    sources[2] = kernel("tiny_2", 99)
    report = build([(source, sm90) for source in sources], jobs=2)
    assert (report.compiled, report.up_to_date) == (1, 4)
    assert [made.origin for made in report.binaries].index("compiled") == 2


def test_several_targets_and_doubles(kernel: Kernel, sm90: Target) -> None:
    wanted = [(kernel(f"tiny_{i}"), Target(name)) for name in ("sm90", "sm80") for i in range(3)]
    report = build([*wanted, wanted[0]], jobs=2)
    assert (report.compiled, report.up_to_date) == (6, 0)
    assert [(made.stem, made.target) for made in report.binaries[:6]] == [(s.stem, t) for s, t in wanted]


def test_progress_counts_to_the_end(kernel: Kernel, sm90: Target) -> None:
    seen: list[tuple[int, int]] = []
    build([(kernel(f"tiny_{i}"), sm90) for i in range(5)], jobs=2, progress=lambda a, b: seen.append((a, b)))
    assert seen[0] == (0, 5) and seen[-1] == (5, 5)


def test_without_ninja_or_workers_it_compiles_here(
    kernel: Kernel, sm90: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ninja_build, "ninja_program", lambda: None)
    assert build([(kernel(f"tiny_{i}"), sm90) for i in range(5)], jobs=2).compiled == 5
    monkeypatch.setattr(ninja_build, "ninja_program", lambda: Path("/bin/false"))
    assert build([(kernel(f"more_{i}"), sm90) for i in range(5)], jobs=2).compiled == 5


def test_a_failure_names_the_kernel_and_leaves_no_build_folder(
    kernel: Kernel, broken: Source, sm90: Target, cache_root: Path
) -> None:
    wanted = [(broken, sm90), *((kernel(f"tiny_{i}"), sm90) for i in range(4))]
    with pytest.raises(CompileError, match=broken.stem):
        build(wanted, jobs=2)
    assert build(wanted[1:]).compiled == 0
    assert not list((cache_root / f"v{SCHEMA}" / "new").iterdir())


def test_a_cache_that_cannot_be_written_still_builds(kernel: Kernel, sm90: Target, cache_root: Path) -> None:
    cache_root.write_text("a file")
    assert build([(kernel(f"tiny_{i}"), sm90) for i in range(5)], jobs=2).compiled == 5


def test_bad_words_are_one_message(moegen_command: Run) -> None:
    for words, expected in (
        (("build",), "what to build"),
        (("build", "--arch", "sm91", "--preset", "tiny"), "no target 'sm91'"),
        (("build", "--preset", "tinny"), "no preset 'tinny'"),
        (("build", "--preset", "tiny", "--ranks", "two"), "numbers are written like"),
        (("build", "no_such_kernel"), "no known kernel"),
        (("build", "--family", "ll", "no_such_kernel"), "give a --preset"),
    ):
        done = moegen_command(*words)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and expected in done.stderr, done.stderr
        assert "Traceback" not in done.stderr


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("sm80", "sm100", "host")]
"""The catalog is compiled for GPUs in `make generated` and `make nvrtc-oldest`, kernels for CPUs in most tests."""


@pytest.mark.parametrize("name", [*SLOW, "sm90"])
def test_the_tiny_preset_compiles(name: str) -> None:
    target = Target(name)
    report = build([(render(spec), target) for spec in preset_specs("tiny", [2], None, name)])
    assert report.compiled == len(report.binaries)
    allowed = 24 if name == "sm100" else 0  # one dispatch of many warps there; that chip is not tuned for
    assert all(made.resources is None or made.resources.spill_bytes <= allowed for made in report.binaries)
