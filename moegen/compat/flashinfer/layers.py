# SPDX-License-Identifier: Apache-2.0
"""The OneSided objects behind a workspace: they are made for a shape, and FlashInfer's calls tell it one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from moegen.compat.flashinfer.checks import CallError
from moegen.compat.flashinfer.communicators import as_world
from moegen.errors import DestroyedError
from moegen.kernels.integers import settle_integers
from moegen.one_sided import OneSided
from moegen.payloads import PayloadsHandle
from moegen.runtime.ownership import ProcessBound
from moegen.runtime.worlds import RankWorld

Tensor = torch.Tensor


@dataclass(frozen=True)
class Routed:
    """How tokens of one layer are spread. Equal on all ranks."""

    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        settle_integers(self, CallError)


@dataclass(frozen=True)
class Rows:
    """Of combine. Equal on all ranks."""

    hidden: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        settle_integers(self, CallError)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.hidden * self.dtype.itemsize


class PayloadLayers(ProcessBound):
    """Objects by routing and length of combine's rows; made, on all ranks together, when they are first needed. One
    that becomes too small is replaced by a larger one and lives on until `destroy()`: a graph may hold its calls.
    """

    def __init__(self, communicator: Any, ep_size: int) -> None:
        self._communicator, self._ep_size = communicator, ep_size
        self._world: RankWorld | None = None
        self._made: dict[Routed, list[OneSided]] = {}
        """The one to dispatch with stands last."""
        self._guesses: set[OneSided] = set()
        """Those whose rows no combine has confirmed."""

    def for_dispatch(self, routed: Routed, tokens: int, payloads: Sequence[Tensor], rows: Rows) -> OneSided:
        """An object with room for such payloads of `tokens` per rank.

        Args:
            rows: what combine is thought to get; counts for the first object of a routing only.
        """
        needed = sum(payload.shape[1] * payload.element_size() for payload in payloads)
        made = self._made.get(routed)
        guessed = not made or made[-1] in self._guesses
        if made:
            newest = made[-1]
            if newest.problem.max_tokens >= tokens and newest.payload_bytes >= needed:
                return newest
            rows = Rows(newest.problem.hidden, newest.dtype)
            needed, tokens = max(needed, newest.payload_bytes), max(tokens, newest.problem.max_tokens)
        foreseen = [(payload.shape[1], payload.dtype) for payload in payloads]
        layer = self._make(routed, tokens, needed, rows, foreseen, payloads[0].device)
        if guessed:
            self._guesses.add(layer)
        return layer

    def for_combine(self, routed: Routed, handle: PayloadsHandle, rows: Rows) -> tuple[OneSided, PayloadsHandle]:
        """An object for such rows, and the handle as that object takes it: where rows go does not depend on what they
        hold.

        Raises:
            DestroyedError: `destroy` came in between.
        """
        owner = handle.owner
        assert isinstance(owner, OneSided)
        made = self._made.get(routed)
        if made is None:
            raise DestroyedError("this workspace was destroyed after the dispatch; dispatch again")
        fit = [layer for layer in made if _fits(layer, handle, rows)]
        if fit:
            layer = owner if owner in fit else fit[-1]
            self._guesses.difference_update(fit)
        else:
            tokens = max(handle.max_tokens, *(layer.problem.max_tokens for layer in made))
            payload_bytes = max(layer.payload_bytes for layer in made)
            layer = self._make(routed, tokens, payload_bytes, rows, (), owner.device)
        made.remove(layer)
        made.append(layer)  # the next dispatch is by the same object: its combine tells peers that its rows are read
        self._forget_wrong_guesses(made)
        return layer, handle if layer is owner else replace(handle, owner=layer)

    def _forget_wrong_guesses(self, made: list[OneSided]) -> None:
        """Gives their memory back. Collective: all ranks have done with what they launched of them."""
        for layer in [layer for layer in made if layer in self._guesses]:
            if layer.device.type == "cuda":
                torch.cuda.synchronize(layer.device)  # calls may have gone to any stream
            layer.check()
            layer.world.barrier()
            layer.destroy()
            made.remove(layer)
            self._guesses.remove(layer)

    def _make(
        self,
        routed: Routed,
        tokens: int,
        payload_bytes: int,
        rows: Rows,
        foreseen: Sequence[tuple[int, torch.dtype]],
        device: torch.device,
    ) -> OneSided:
        if self._world is None:
            self._world = as_world(self._communicator, self._ep_size, device)
        layer = OneSided(
            self._world,
            num_experts=routed.num_experts,
            num_topk=routed.top_k,
            max_tokens_per_rank=tokens,
            payload_bytes=payload_bytes,
            hidden=rows.hidden,
            dtype=rows.dtype,
            payloads=foreseen,
        )
        self._made.setdefault(routed, []).append(layer)
        return layer

    def all(self) -> list[OneSided]:
        return [layer for made in self._made.values() for layer in made]

    def destroy(self) -> None:
        for layer in self.all():
            layer.destroy()
        self._made.clear()
        self._guesses.clear()


def _fits(layer: OneSided, handle: PayloadsHandle, rows: Rows) -> bool:
    room = layer.problem.max_tokens >= handle.max_tokens and layer.combine_bytes >= rows.size
    return room and layer.problem.hidden == rows.hidden
