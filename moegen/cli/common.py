# SPDX-License-Identifier: Apache-2.0
"""What several verbs need."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from moegen.codegen.render import Source
    from moegen.compile.ninja_build import Progress
    from moegen.compile.target import Target
    from moegen.kernels.spec import Spec

PIPE_WIDTH = 200
"""Columns of a table that goes into a file or pipe, so that no stem is cut."""


def console() -> Console:
    """The console of stdout."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, soft_wrap=False)


def targets(words: str) -> list[Target]:
    """The targets of a list like `sm90,host`, each once."""
    from moegen.compile.target import Target

    return list(dict.fromkeys(Target.parse(word) for word in words.split(",") if word.strip()))


def words(text: str) -> list[str]:
    """The words of a list like `bf16,fp8`."""
    return [word.strip() for word in text.split(",") if word.strip()]


def numbers(text: str) -> list[int]:
    """The numbers of a list like `2,4,8`.

    Raises:
        InputError: one of them is none.
    """
    from moegen.errors import InputError

    try:
        return [int(word) for word in words(text)]
    except ValueError:
        raise InputError(f"numbers are written like 2,4,8; got {text!r}") from None


def parse(stem: str) -> Spec:
    """The Spec of a stem, of any family."""
    import moegen.codegen.catalog  # noqa: F401  registers the families
    from moegen.kernels.spec import Spec

    if stem.startswith("bench_"):
        from moegen.kernels import bench  # noqa: F401  registers what only the benchmark uses

    return Spec.parse(stem)


def sources(stems: Sequence[str]) -> list[Source]:
    """The sources of kernels given by stem."""
    from moegen.codegen.render import render

    return [render(parse(stem)) for stem in stems]


@contextlib.contextmanager
def progress(what: str) -> Iterator[Progress]:
    """A progress bar on stderr while kernels compile; nothing if there is nothing to do."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, visible=False)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, visible=total > 0)

        yield report
