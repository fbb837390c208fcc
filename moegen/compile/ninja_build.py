# SPDX-License-Identifier: Apache-2.0
"""Many kernels at once: what is missing is compiled by ninja, in batches, on all cores.

Freshness is not ninja's business: a binary's name holds the digest of all that it depends on, so what is in the cache
is up to date, and only the rest becomes an edge.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moegen.codegen.render import Source
from moegen.compile import binary, cache, host, pack
from moegen.compile.binary import Binary
from moegen.compile.recipe import Recipe
from moegen.compile.target import Target
from moegen.errors import CompileError

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with (kernels done, kernels to do)."""

# A process needs about 0.4 s until its first cubin, a kernel 0.1-0.2 s: up to 3 are quicker here, and batches of at
# most 16 keep the cores evenly busy at the end.
_INLINE = 3
_BATCH = 16


@dataclass(frozen=True)
class Report:
    """What a build did: every binary and its recipe in the order asked for, and how many had to be compiled."""

    binaries: tuple[Binary, ...]
    recipes: tuple[Recipe, ...]
    compiled: int

    @property
    def up_to_date(self) -> int:
        return len({made.key for made in self.binaries}) - self.compiled

    def write_pack(self, path: Path) -> None:
        """Writes all binaries of this build as one pack.

        Raises:
            OSError: it cannot be written.
        """
        pairs = {made.key: (made, recipe) for made, recipe in zip(self.binaries, self.recipes, strict=True)}
        pack.write(path, [(_item(made, recipe), binary.read(made)) for made, recipe in pairs.values()])


def build(wanted: Sequence[tuple[Source, Target]], jobs: int | None = None, progress: Progress | None = None) -> Report:
    """Brings the cache up to date for these kernels, and for the host's runtime if one of them is for the host.

    Packs and MOEGEN_JIT are not asked: this is the compiler.

    Raises:
        CompileError: of several kernels that do not compile, the first one's; the others are built all the same.
        UnsupportedPlatformError: there is no compiler for a target.
    """
    host_targets = [target for _, target in wanted if target.is_host]
    everything = [*wanted, *((host.runtime_source(), target) for target in host_targets[:1])]
    recipes = [binary.toolchain(target).recipe(source, target) for source, target in everything]
    found = {recipe.key: binary.from_cache(recipe, "cache") for recipe in recipes}
    missing = list({recipe.key: recipe for recipe in recipes if found[recipe.key] is None}.values())
    made = {made.key: made for made in make_all(missing, jobs, progress)}
    binaries = tuple(found[recipe.key] or made[recipe.key] for recipe in recipes)
    return Report(binaries, tuple(recipes), len(made))


def make_all(recipes: Sequence[Recipe], jobs: int | None = None, progress: Progress | None = None) -> list[Binary]:
    """Compiles recipes by `jobs` processes (default: the cores) and keeps the binaries.

    Raises:
        CompileError: the first of those that do not compile, after all others were compiled.
    """
    jobs = jobs or cores()
    if progress:
        progress(0, len(recipes))
    errors: dict[str, CompileError] = {}
    few = len(recipes) <= (1 if any(recipe.target.is_host for recipe in recipes) else _INLINE)
    if not few and jobs > 1 and (program := ninja_program()) is not None:
        errors = _run_ninja(program, recipes, jobs, progress)
    binaries: list[Binary] = []
    for index, recipe in enumerate(recipes):
        if recipe.key in errors:
            continue
        try:
            made = None if few else binary.from_cache(recipe, "compiled")
            binaries.append(made or binary.make(recipe))
        except CompileError as error:
            errors[recipe.key] = error
        if progress:
            progress(index + 1, len(recipes))
    if errors:
        raise next(errors[recipe.key] for recipe in recipes if recipe.key in errors)
    return binaries


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ninja_program() -> Path | None:
    """The ninja of the PyPI package, else the one on PATH; None (then compiles run one by one) if there is neither."""
    try:
        import ninja

        return Path(ninja.BIN_DIR) / "ninja"
    except ImportError:
        found = shutil.which("ninja")
        return Path(found) if found else None


def _item(made: Binary, recipe: Recipe) -> pack.Item:
    return pack.Item(
        stem=made.stem,
        target=made.target.name,
        content=recipe.content,
        key=made.key,
        compiler=recipe.compiler,
        sha256=made.sha256,
        member=f"{made.target.name}/{made.stem}.{made.target.suffix}",
        seconds=made.seconds,
        bytes=made.bytes,
        resources=made.resources.to_json() if made.resources else None,
        machine=platform.machine() if made.target.is_host else "",
    )


def _run_ninja(program: Path, recipes: Sequence[Recipe], jobs: int, report: Progress | None) -> dict[str, CompileError]:
    """Runs the compiles; gives the errors by key. A recipe that has neither binary nor error is left to the caller."""
    try:
        state = cache.store().scratch("build")
    except OSError:
        state = cache.temporary_store().scratch("build")
    try:
        for name in ("done", "failed"):
            (state / name).mkdir()
        _write_edges(state, recipes, jobs)
        command = [str(program), "-C", str(state), "-j", str(jobs), "-k", "0"]
        with (state / "ninja.log").open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment(state))
        _wait(process, state / "done", len(recipes), report)
        if process.returncode:
            text = (state / "ninja.log").read_text(errors="replace")
            log.info("event=ninja_failed status=%d output=%r", process.returncode, text[-4000:])
        return {path.name: pickle.loads(path.read_bytes()) for path in (state / "failed").iterdir()}
    finally:
        shutil.rmtree(state, ignore_errors=True)


def _write_edges(state: Path, recipes: Sequence[Recipe], jobs: int) -> None:
    lines = ["rule compile", f"  command = {_python()} -m moegen.compile.worker $in", "  description = $in"]
    for index, batch in enumerate(_batches(recipes, jobs)):
        (state / f"batch{index}.pickle").write_bytes(pickle.dumps(batch))
        lines.append(f"build batch{index}.stamp: compile batch{index}.pickle")
    (state / "build.ninja").write_text("\n".join([*lines, ""]))


def _batches(recipes: Sequence[Recipe], jobs: int) -> list[list[Recipe]]:
    """Interleaved, so that a batch holds long and short kernels; a C++ compile is long enough to be one of its own."""
    gpu = [recipe for recipe in recipes if not recipe.target.is_host]
    rounds = -(-len(gpu) // (jobs * _BATCH))
    batches = [gpu[start :: jobs * rounds] for start in range(jobs * rounds)]
    return [[recipe] for recipe in recipes if recipe.target.is_host] + [batch for batch in batches if batch]


def _python() -> str:
    return shlex.quote(sys.executable).replace("$", "$$")


def _environment(state: Path) -> dict[str, str]:
    """The workers' environment: this package and this cache, wherever they were found."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return {**os.environ, "PYTHONPATH": path, "MOEGEN_CACHE_DIR": str(state.parent.parent.parent)}


def _wait(process: subprocess.Popen[bytes], done: Path, total: int, progress: Progress | None) -> None:
    try:
        while process.poll() is None:
            if progress:
                progress(len(os.listdir(done)), total)
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
