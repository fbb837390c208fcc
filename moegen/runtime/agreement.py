# SPDX-License-Identifier: Apache-2.0
"""What all ranks must agree on before any of them launches: what was asked for, and the kernels' texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from moegen.codegen.render import render
from moegen.errors import WorldError
from moegen.kernels.problem import Problem
from moegen.kernels.spec import Spec
from moegen.runtime.kernel import LoadedKernel, load
from moegen.runtime.waiting import SETUP_SECONDS
from moegen.runtime.worlds import RankWorld


class Selected(Protocol):
    """The kernels that serve a Problem."""

    @property
    def specs(self) -> Sequence[Spec]: ...


S = TypeVar("S", bound=Selected)


def load_on_all_ranks(
    world: RankWorld, problem: Problem, settings: tuple[object, ...], select: Callable[[Problem], S]
) -> tuple[S, tuple[LoadedKernel, ...]]:
    """Loads every kernel that calls may need, on all ranks before any may launch, and compares what was asked for and
    what they load.

    A rank that compiles while others run looks like a hang to them. Here they have SETUP_SECONDS more for it.
    """
    answers = world.exchange((problem, settings), "the arguments of an object")
    for rank, answer in enumerate(answers):
        _compare("arguments", answers[0], answer, rank)
    failure: Exception | None = None
    digests: tuple[str, ...] = ()
    try:
        selection = select(problem)
        kernels = tuple(load(spec, world.device) for spec in selection.specs)
        digests = tuple(render(spec).digest for spec in selection.specs)
    except Exception as error:  # whatever it was, the other ranks must not wait for this one
        failure = error
    raise_on_all_ranks(world, failure, "could not load its kernels")
    texts = world.exchange(digests, "the texts of their kernels")
    for rank, text in enumerate(texts):
        _compare("kernel texts (two versions of moegen?)", texts[0], text, rank)
    return selection, kernels


def raise_on_all_ranks(world: RankWorld, failure: Exception | None, what: str) -> None:
    """No rank goes on if one has failed: it would wait for that one. Collective."""
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    try:
        answers = world.exchange(said, f"whether a rank {what}", SETUP_SECONDS)
    except WorldError:
        if failure is not None:  # what it has to say is more than that the others are gone
            raise failure from None
        raise
    if failure is not None:
        raise failure
    for rank, failed in enumerate(answers):
        if failed is not None:
            raise WorldError(f"rank {rank} {what}: {failed}")


def _compare(what: str, first: object, other: object, rank: int) -> None:
    if first != other:
        raise WorldError(f"rank {rank} and rank 0 have different {what}: {other} and {first}")
