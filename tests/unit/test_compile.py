# SPDX-License-Identifier: Apache-2.0
"""Text to binary: the ladder, its errors, and what a key depends on."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moegen.codegen.render import Source
from moegen.compile import binary, cache, elf, host, nvrtc, resources
from moegen.compile.binary import obtain, obtain_many, read
from moegen.compile.recipe import Recipe, reachable
from moegen.compile.target import TARGETS, Target
from moegen.errors import CacheError, CompileError, InputError, MissingKernelError, UnsupportedPlatformError

ROOT = Path(__file__).resolve().parents[2]
GPU_TARGETS = [name for name in TARGETS if name != "host"]

Kernel = Callable[..., Source]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.nvrtc
@pytest.mark.parametrize("name", GPU_TARGETS)
def test_every_gpu_target_compiles_here(kernel: Kernel, name: str) -> None:
    made = obtain(kernel(), Target(name))
    assert made.origin == "compiled" and made.seconds > 0
    assert made.resources is not None and made.resources.registers > 0 and made.resources.spill_bytes == 0
    assert read(made).startswith(b"\x7fELF") and len(read(made)) == made.bytes


@pytest.mark.nvrtc
def test_the_second_time_it_comes_from_the_cache(kernel: Kernel, sm90: Target) -> None:
    first, second = obtain(kernel(), sm90), obtain(kernel(), sm90)
    assert (first.origin, second.origin) == ("compiled", "cache")
    assert (first.sha256, first.resources, first.seconds) == (second.sha256, second.resources, second.seconds)


@pytest.mark.nvrtc
def test_many_come_in_order_and_through_ninja(kernel: Kernel, sm90: Target) -> None:
    sources = [kernel(f"tiny_{i}", i) for i in range(7)]
    obtain(sources[3], sm90)
    made = obtain_many(sources, sm90, jobs=2)
    assert [one.stem for one in made] == [source.stem for source in sources]
    assert [one.origin for one in made].count("compiled") == 6 and made[3].origin == "cache"
    assert {one.origin for one in obtain_many(sources, sm90)} == {"cache"}


@pytest.mark.nvrtc
def test_one_of_many_that_fails_raises_and_the_others_are_kept(kernel: Kernel, broken: Source, sm90: Target) -> None:
    sources = [kernel(f"tiny_{i}", i) for i in range(5)]
    with pytest.raises(CompileError) as caught:
        obtain_many([broken, *sources], sm90, jobs=2)
    assert caught.value.stem == broken.stem and Path(caught.value.folder).is_dir()
    assert {one.origin for one in obtain_many(sources, sm90)} == {"cache"}


@pytest.mark.nvrtc
def test_compile_error_pickles_and_its_folder_reproduces(broken: Source, sm90: Target) -> None:
    with pytest.raises(CompileError, match=r"no\.such|no'|such") as caught:
        obtain(broken, sm90)
    error = pickle.loads(pickle.dumps(caught.value))
    assert (str(error), error.options) == (str(caught.value), caught.value.options)
    folder = Path(error.folder)
    assert "no.such.instruction" in (folder / "kernel.ptx").read_text()
    assert (folder / "log.txt").read_text().strip() == error.log
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([folder / "repro.sh"], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 1 and done.stderr.strip() == error.log


@pytest.mark.nvrtc
def test_a_failure_is_not_remembered(broken: Source, kernel: Kernel, sm90: Target) -> None:
    with pytest.raises(CompileError):
        obtain(broken, sm90)
    assert obtain(Source(broken.stem, kernel(broken.stem).text), sm90).origin == "compiled"


@pytest.mark.nvrtc
def test_a_warning_is_an_error(sm90: Target) -> None:
    with pytest.raises(CompileError, match="never referenced"):
        obtain(Source("tiny_warns", 'extern "C" __global__ void k() { int unused; }\n'), sm90)


@pytest.mark.nvrtc
def test_an_unknown_header_is_a_compile_error(sm90: Target) -> None:
    with pytest.raises(CompileError, match="nothing"):
        obtain(Source("tiny_lost", "#include <moegen/nothing.cuh>\n"), sm90)


@pytest.mark.nvrtc
def test_a_spill_is_no_error(sm90: Target) -> None:
    text = """extern "C" __global__ void __launch_bounds__(1024, 2) k(float* p) {
    float v[64];
    #pragma unroll
    for (int i = 0; i < 64; ++i) v[i] = p[i * 1024 + threadIdx.x];
    __syncthreads();
    #pragma unroll
    for (int i = 0; i < 64; ++i) p[(63 - i) * 2048 + threadIdx.x] = v[i] * v[(i * 7) % 64];
}
"""
    made = obtain(Source("tiny_spills", text), sm90)
    assert made.resources is not None and made.resources.spill_bytes > 0


@pytest.mark.nvrtc
def test_ptx_needs_no_driver(kernel: Kernel, sm90: Target) -> None:
    text = nvrtc.ptx(nvrtc.recipe(kernel(), sm90))
    assert ".target sm_90a" in text and "moegen_tiny_one" in text


@pytest.mark.nvrtc
def test_compiling_loads_no_driver(python: Run) -> None:
    code = (
        "from moegen.codegen.render import Source; from moegen.compile.binary import obtain;"
        "from moegen.compile.target import Target;"
        "obtain(Source('k', 'extern \"C\" __global__ void k() {}'), Target('sm90'));"
        "print('libcuda.so' in open('/proc/self/maps').read())"
    )
    done = python(code)
    assert done.stdout.strip() == "False", done.stderr


KEY_CODE = """
import sys
from moegen.codegen.catalog import catalog
from moegen.codegen.render import render
from moegen.compile import nvrtc, host
from moegen.compile.target import Target
source = render(catalog()[0])
print(nvrtc.recipe(source, Target("sm90")).key, host.recipe(source, Target("host")).key)
"""


@pytest.mark.nvrtc
def test_key_depends_neither_on_cwd_nor_on_the_install_path(python: Run, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other place"
    shutil.copytree(ROOT / "moegen", elsewhere / "moegen")
    shutil.copytree(ROOT / "templates", elsewhere / "templates")
    here = python(KEY_CODE, cwd=ROOT)
    there = python(KEY_CODE, cwd=tmp_path, PYTHONPATH=str(elsewhere), HOME=str(tmp_path))
    assert here.returncode == there.returncode == 0, there.stderr
    assert here.stdout == there.stdout


def recipe(**changed: object) -> Recipe:
    fields: dict[str, object] = {
        "stem": "stem",
        "target": Target("sm90"),
        "text": "text",
        "headers": (("moegen/a.cuh", b"a"),),
        "options": ("-x", "-y"),
        "compiler": "nvrtc 1.2",
    }
    return Recipe(**{**fields, **changed})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [
        {"stem": "other"},
        {"text": "text "},
        {"target": Target("sm100")},
        {"headers": (("moegen/a.cuh", b"b"),)},
        {"headers": (("moegen/b.cuh", b"a"),)},
        {"headers": ()},
        {"options": ("-y", "-x")},
        {"options": ("-x-y",)},
        {"compiler": "nvrtc 1.3"},
        {"linked": (("lib", "digest"),)},
        {"stem": "stemt", "text": "ext"},
    ],
)
def test_everything_is_in_the_key(changed: dict[str, object]) -> None:
    assert recipe().key == recipe().key
    assert recipe().key != recipe(**changed).key


def test_an_option_with_a_path_is_refused() -> None:
    with pytest.raises(ValueError, match="path"):
        recipe(options=("-I/usr/include",))


def test_reachable_headers_are_exactly_the_included_ones() -> None:
    headers = {
        "moegen/a.cuh": b"#include <moegen/b.cuh>\n#pragma once\n",
        "moegen/b.cuh": b'  #  include <moegen/a.cuh>\n#include "moegen/c.cuh"\n',
        "moegen/c.cuh": b"",
        "moegen/d.cuh": b"",
    }
    assert [name for name, _ in reachable("#include <moegen/a.cuh>\n", headers)] == ["moegen/a.cuh", "moegen/b.cuh"]


@pytest.mark.nvrtc
def test_jit_off_names_the_build_to_run(kernel: Kernel, sm90: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    obtain(kernel("tiny_known"), sm90)
    monkeypatch.setenv("MOEGEN_JIT", "off")
    assert obtain(kernel("tiny_known"), sm90).origin == "cache"
    with pytest.raises(MissingKernelError, match="moegen build --arch sm90 tiny_one"):
        obtain(kernel(), sm90)
    with pytest.raises(MissingKernelError, match="moegen build --arch sm90 tiny_one"):
        obtain_many([kernel("tiny_known"), kernel()], sm90)


def test_without_nvrtc_the_error_says_what_to_install(
    kernel: Kernel, sm90: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cached in (nvrtc._api, nvrtc.version, nvrtc.identity, nvrtc.library):
        monkeypatch.setattr(nvrtc, cached.__name__, cached.__wrapped__)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnsupportedPlatformError, match=r"pip install 'moegen\[cu13\]'"):
        obtain(kernel(), sm90)
    monkeypatch.setenv("MOEGEN_JIT", "off")
    with pytest.raises(MissingKernelError):
        obtain(kernel(), sm90)


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_are_refused(kernel: Kernel, sm90: Target, system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for cached in (nvrtc._api, nvrtc.version, nvrtc.identity):
        monkeypatch.setattr(nvrtc, cached.__name__, cached.__wrapped__)
    monkeypatch.setattr(host, "_compiler", host._compiler.__wrapped__)
    monkeypatch.setattr(sys, "platform", system)
    for target in (sm90, Target("host")):
        with pytest.raises(UnsupportedPlatformError, match="Linux"):
            obtain(kernel(), target)


@pytest.mark.nvrtc
def test_an_nvrtc_newer_than_the_driver_is_refused() -> None:
    major, _ = nvrtc.version()
    nvrtc.check_driver(major * 1000)
    nvrtc.check_driver((major + 1) * 1000)
    with pytest.raises(UnsupportedPlatformError, match=rf"pip install 'moegen\[cu{major - 1}\]'"):
        nvrtc.check_driver((major - 1) * 1000 + 90)


@pytest.mark.nvrtc
def test_nvrtc_is_identified_by_its_build_id() -> None:
    assert nvrtc.identity() == f"nvrtc {'.'.join(map(str, nvrtc.version()))} {elf.identity(nvrtc.library())}"
    assert "build-id" in nvrtc.identity()


def test_a_library_without_a_build_id_is_identified_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    for content in (b"", b"\x7fELF\x02\x01 cut", b"no library at all"):
        path.write_bytes(content)
        assert elf.identity(path).startswith("sha256 ")


@pytest.mark.nvrtc
def test_a_binary_that_changed_is_not_read(kernel: Kernel, sm90: Target) -> None:
    made = obtain(kernel(), sm90)
    made.path.write_bytes(read(made) + b"x")
    with pytest.raises(CacheError, match="digest"):
        read(made)
    assert obtain(kernel(), sm90).origin == "compiled"
    made.path.unlink()
    with pytest.raises(CacheError, match="gone"):
        read(made)


@pytest.mark.nvrtc
def test_line_info_has_its_own_key(kernel: Kernel, sm90: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nvrtc.recipe(kernel(), sm90)
    monkeypatch.setenv("MOEGEN_NVRTC_LINEINFO", "1")
    assert nvrtc.recipe(kernel(), sm90).key != plain.key
    assert obtain(kernel(), sm90).bytes > 0


def test_targets() -> None:
    assert [Target(name).arch for name in TARGETS] == ["sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120", "host"]
    assert Target.parse(" SM90 ") == Target("sm90")
    assert Target.for_capability(8, 6) == Target("sm80") and Target.for_capability(9, 0) == Target("sm90")
    with pytest.raises(InputError, match="sm80, sm89, sm90"):
        Target.parse("sm_90")
    with pytest.raises(UnsupportedPlatformError, match=r"7\.0"):
        Target.for_capability(7, 0)


def test_resources_of_a_log_with_two_functions() -> None:
    log = """ptxas info    : Compiling entry function 'a' for 'sm_80'
ptxas         .     8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 256 bytes smem, 360 bytes cmem[0]
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers
"""
    assert resources.parse(log) == resources.Resources(40, 256, 40, 8, 360)
    assert resources.parse("") is None
    assert not resources.has_warning(log)
    assert resources.has_warning('/moegen/k.cu(1): warning #177-D: variable "x" was declared\n')
    assert resources.has_warning("ptxas warning : something\n")


def test_the_host_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGEN_CXX", "no-such-compiler")
    with pytest.raises(UnsupportedPlatformError, match="no-such-compiler"):
        host.compiler()


def test_host_kernel_compiles_and_is_cached(kernel: Kernel) -> None:
    first, second = obtain(kernel(), Target("host")), obtain(kernel(), Target("host"))
    assert (first.origin, second.origin) == ("compiled", "cache")
    assert first.path == second.path and first.path.suffix == ".so" and first.resources is None


def test_host_compile_error_reproduces() -> None:
    with pytest.raises(CompileError, match="nonsense") as caught:
        obtain(Source("tiny_bad", "#include <moegen/ptx.cuh>\nnonsense\n"), Target("host"))
    done = subprocess.run([f"{caught.value.folder}/repro.sh"], capture_output=True, text=True, cwd="/")
    assert done.returncode != 0 and "nonsense" in done.stderr
    about = json.loads((Path(caught.value.folder) / "recipe.json").read_text())
    assert about["stem"] == "tiny_bad" and about["target"] == "host"


BROKEN_COMPILERS = {
    "garbage": "echo garbage > kernel.so",
    "nothing in the file": ": > kernel.so",
    "no file": ":",
    "half of it": 'c++ "$@" && truncate -s 9000 kernel.so',
    "another program": "c++ -shared -xc++ /dev/null -o kernel.so",
    "half, and says so": "head -c 9000 /bin/sh > kernel.so; echo full >&2; exit 1",
    "killed": "echo garbage > kernel.so; kill -9 $$",
}


def test_nothing_of_a_broken_host_compiler_is_kept(
    kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that it is the same compiler as the sound one, which is used behind it."""
    compiler = tmp_path / "cxx"
    asked = 'case "$1" in --version|-dumpmachine) exec c++ "$@";; esac'
    monkeypatch.setenv("MOEGEN_CXX", str(compiler))
    for what, does in {**BROKEN_COMPILERS, "": 'exec c++ "$@"'}.items():
        compiler.write_text(f"#!/bin/sh\n{asked}\n{does}\n")
        compiler.chmod(0o700)
        if not what:
            assert obtain(kernel(), Target("host")).origin == "compiled"
            continue
        with pytest.raises(CompileError) as caught:
            obtain(kernel(), Target("host"))
        silent = "says so" in what or what == "killed"
        assert silent or "the compiler succeeded, but its output" in str(caught.value), what
        assert list(cache.store().entries()) == [], what
    compiler.write_text("no program")
    with pytest.raises(CompileError, match="does not start"):
        obtain(kernel(value=2), Target("host"))


@pytest.mark.nvrtc
def test_a_cubin_that_is_cut_off_is_not_kept(kernel: Kernel, sm90: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = nvrtc._run
    monkeypatch.setattr(nvrtc, "_run", lambda *of: (*sound(*of)[:2], sound(*of)[2][:-1]))
    with pytest.raises(CompileError, match="ends early"):
        obtain(kernel(), sm90)
    monkeypatch.setattr(nvrtc, "_run", sound)
    assert obtain(kernel(), sm90).origin == "compiled"


def test_both_toolchains_offer_the_same() -> None:
    for target in (Target("sm90"), Target("host")):
        for name in ("headers", "recipe", "identity", "compile"):
            assert callable(getattr(binary.toolchain(target), name))
