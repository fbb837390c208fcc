# SPDX-License-Identifier: Apache-2.0
"""One shape of call with any number of tokens per rank: few objects, whose buffers the numbers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moegen import checks
from moegen.expert_parallel import ExpertParallel
from moegen.kernels.ll import MAX_TOKENS_PER_RANK

MOST_KEPT = 64
"""Numbers whose bound kernels are kept, 20 to 100 KB of the host's memory each; any other is bound again."""

_FATE = ("_ops", "_poison")
"""Attributes of a Lifecycle that change."""


class FewerTokens(ExpertParallel):
    """An ExpertParallel's calls for fewer tokens per rank than it was made for. Its buffers, slots, mask and fate are
    that object's; results and handles have the shapes of this number. Making one is not collective.
    """

    def __init__(self, whole: ExpertParallel, max_tokens: int) -> None:
        shared = {name: value for name, value in vars(whole).items() if name not in _FATE}
        vars(self).update(shared)
        self._whole = whole
        self.problem = replace(whole.problem, max_tokens=max_tokens)
        self._sized = whole._alive().for_fewer(max_tokens)

    @property
    def _ops(self) -> Any:
        return None if self._whole._ops is None else self._sized

    @_ops.setter
    def _ops(self, ops: Any) -> None:
        self._whole._ops = ops

    def _raise_reported(self) -> None:
        """Kernels report to that object, which raises in its own way."""
        self._whole._raise_reported()

    @property
    def _poison(self) -> Any:
        return self._whole._poison

    @_poison.setter
    def _poison(self, poison: Any) -> None:
        self._whole._poison = poison


def whole_of(layer: ExpertParallel) -> ExpertParallel:
    """The object that has the buffers."""
    return layer._whole if isinstance(layer, FewerTokens) else layer


class Sizes:
    """The objects of one shape of call, by tokens per rank: a number up to what the newest object was made for is
    served by that one; a larger one makes another, at least twice as large. So all objects together hold less than four
    times what the largest number needs, and there are few collective allocations however often the number changes. The
    first is made for exactly what is asked for. Numbers come in the same order on all ranks, so all decide alike.

    The older objects stay until `destroy()`: handles belong to them, and peers may still write to them.
    """

    def __init__(self) -> None:
        self._wholes: list[ExpertParallel] = []
        self._by_tokens: dict[int, ExpertParallel] = {}

    def of(self, max_tokens: int) -> ExpertParallel | None:
        """For so many tokens per rank, if that number was seen before."""
        return self._by_tokens.get(max_tokens)

    def has(self, whole: ExpertParallel) -> bool:
        return any(each is whole for each in self._wholes)

    def add(self, max_tokens: int, make: Callable[[int], ExpertParallel]) -> ExpertParallel:
        """For a number that is new. `make` gives an object for so many tokens per rank, on all ranks together."""
        checks.in_range("num_max_dispatch_tokens_per_rank", max_tokens, 1, MAX_TOKENS_PER_RANK)
        room = self._wholes[-1].problem.max_tokens if self._wholes else 0
        if max_tokens > room:
            room = max(max_tokens, min(2 * room, MAX_TOKENS_PER_RANK))
            self._wholes.append(make(room))
        newest = self._wholes[-1]
        layer = newest if max_tokens == room else FewerTokens(newest, max_tokens)
        if len(self._by_tokens) >= MOST_KEPT:
            del self._by_tokens[next(iter(self._by_tokens))]
        self._by_tokens[max_tokens] = layer
        return layer

    def destroy(self) -> None:
        for whole in self._wholes:
            whole.destroy()
        self._wholes.clear()
        self._by_tokens.clear()
