# SPDX-License-Identifier: Apache-2.0
"""What the high-throughput interfaces of other libraries have in common: they learn the shapes call by call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from moegen import checks
from moegen.errors import CapacityError, HandleError, InputError
from moegen.high_throughput import HighThroughput
from moegen.kernels.integers import settle_integers
from moegen.kernels.problem import Problem
from moegen.rows import DispatchedRows, Given, Layout, RowsHandle
from moegen.runtime.kernel import load
from moegen.runtime.layout import LayoutOp
from moegen.runtime.ownership import ProcessBound
from moegen.runtime.streams import CommStream
from moegen.runtime.worlds import RankWorld, as_rank_world
from moegen.select import layout_spec

Tensor = torch.Tensor

SMALLEST_CAPACITY = 128
"""Tokens per rank: objects for fewer would save little and have to grow."""

PER_TOKEN_LIMIT = "all ranks set the attribute max_tokens_per_rank of their buffers to {most} or more before this call"


@dataclass(frozen=True)
class Shape:
    """What one HighThroughput is made for, but for its capacity. Equal on all ranks."""

    hidden: int
    num_topk: int
    num_experts: int
    layout: str = "token"
    alignment: int = 1
    dtype: torch.dtype = torch.bfloat16
    scale_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        settle_integers(self, InputError)

    def of(self, x: Tensor | Given) -> Shape:
        """The same routing for such tokens."""
        data, scales = x if isinstance(x, tuple) else (x, None)
        if data.dim() != 2:
            raise InputError(f"x is [tokens, hidden]; got {list(data.shape)}")
        scale_dtype = torch.float32 if scales is None else scales.dtype
        return replace(self, hidden=data.shape[1], dtype=data.dtype, scale_dtype=scale_dtype)


class Counts(ProcessBound):
    """One rank's `layout` for a number of experts and of selections; made by this rank alone."""

    def __init__(self, world: RankWorld, num_topk: int, num_experts: int) -> None:
        on_host = world.device.type == "cpu"
        self.device = world.device
        self.problem = Problem(world.size, num_experts, num_topk, hidden=0, max_tokens=0, on_host=on_host)
        kernel = load(layout_spec(world.size, num_topk, num_experts, on_host=on_host), world.device)
        self._op = LayoutOp(kernel, world.device, world.ranks_per_device)

    def __call__(self, topk_idx: Tensor) -> Layout:
        self._op.raise_what_happened()
        layout = self._op(checks.topk_idx(self, topk_idx, topk_idx.shape[0], None))
        if self.device.type == "cpu":
            self._op.raise_what_happened()
        return layout


class RowLayers(ProcessBound):
    """One HighThroughput per Shape; made, on all ranks together, when a shape is first seen.

    An object that becomes too small is replaced by a larger one. The old one lives on until `destroy()`, because
    handles belong to it and peers may still write to it; capacities are powers of two, so all the old ones together
    are smaller than the new one.

    Args:
        group: a torch process group, or a rank_world.

    Attributes:
        timeout: seconds that ranks wait for each other where the next object is made, and between hosts.
    """

    timeout = 30.0

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._world: RankWorld | None = None
        self._newest: dict[Shape, HighThroughput] = {}
        self._all: list[HighThroughput] = []
        self._counts: dict[tuple[int, int], Counts] = {}
        self.comm = CommStream(device)

    @property
    def world(self) -> RankWorld:
        """Made when it is first needed: on GPUs that is collective."""
        if self._world is None:
            self._world = as_rank_world(self._group, self._device, self.timeout)
        self._world.timeout = self.timeout
        return self._world

    def counts(self, num_topk: int, num_experts: int) -> Counts:
        key = (num_topk, checks.integer("num_experts", num_experts))
        if key not in self._counts:
            self._counts[key] = Counts(self.world, *key)
        return self._counts[key]

    def with_room(self, shape: Shape, tokens: int) -> HighThroughput:
        """An object for at least `tokens` per rank, a number that all ranks give alike."""
        layer = self._newest.get(shape)
        if layer is None or layer.problem.max_tokens < tokens:
            layer = self._make(shape, tokens)
        return layer

    def agreed(self, shape: Shape, tokens: int, floor: int) -> HighThroughput:
        """An object that had room for every rank's `tokens` when it was made: the ranks ask each other only then. All
        ranks give the same `floor`, and have that much room always.
        """
        if shape not in self._newest:
            return self._make(shape, max(self.world.exchange(max(tokens, floor))))
        return self.with_room(shape, floor)

    def dispatch(
        self, shape: Shape, tokens: int, floor: int, x: Tensor | Given, *routing: Any, **options: Any
    ) -> DispatchedRows:
        """A dispatch of this shape. In mode "exact" every rank learns with the counts that one of them has more tokens
        than there is room for, and then all make a larger object and begin again.

        Args:
            tokens, floor: see `agreed`.

        Raises:
            CapacityError: too many tokens in mode "capacity", where ranks learn nothing of each other in time.
        """
        layer = self.agreed(shape, tokens, floor)
        try:
            return cast(DispatchedRows, layer.dispatch(x, *routing, **options))
        except CapacityError as error:
            if error.tokens_needed == 0:
                most = len(x[0] if isinstance(x, tuple) else x)
                advice = PER_TOKEN_LIMIT.format(most=most)
                raise CapacityError(f"{most} tokens, and room for {layer.problem.max_tokens}: {advice}") from error
            layer = self._make(shape, error.tokens_needed)
            return cast(DispatchedRows, layer.dispatch(x, *routing, **options))

    def for_handle(self, shape: Shape, handle: RowsHandle) -> tuple[HighThroughput, RowsHandle]:
        """The object that moves rows of this shape by a handle, and the handle as that object takes it: where rows go
        does not depend on what they hold.
        """
        owner = self._owner(handle)
        if (shape.hidden, shape.dtype, shape.scale_dtype) == (owner.problem.hidden, owner.dtype, owner.scale_dtype):
            return owner, handle
        layer = self.with_room(shape, owner.problem.max_tokens)
        return layer, replace(handle, owner=layer)

    def for_sums(self, shape: Shape, handle: RowsHandle) -> tuple[HighThroughput, RowsHandle]:
        """The same for combine, which is the same whatever dispatch sent."""
        owner = self._owner(handle)
        return (owner, handle) if owner.problem.hidden == shape.hidden else self.for_handle(shape, handle)

    def _owner(self, handle: RowsHandle) -> HighThroughput:
        owner = handle.owner
        assert isinstance(owner, HighThroughput)
        if owner not in self._all and not owner.destroyed:  # the error of destroyed ones is their own
            raise HandleError("this handle comes from another buffer; give it to the one whose dispatch returned it")
        return owner

    def _make(self, shape: Shape, tokens: int) -> HighThroughput:
        layer = HighThroughput(
            self.world,
            num_experts=shape.num_experts,
            num_topk=shape.num_topk,
            hidden=shape.hidden,
            max_tokens_per_rank=capacity_for(tokens),
            layout=shape.layout,
            alignment=shape.alignment,
            dtype=shape.dtype,
            scale_dtype=shape.scale_dtype,
            timeout=self.timeout,
        )
        self._newest[shape] = layer
        self._all.append(layer)
        return layer

    def destroy(self) -> None:
        for layer in self._all:
            layer.destroy()
        self._all.clear()
        self._newest.clear()


def capacity_for(tokens: int) -> int:
    """Tokens per rank that an object is made for."""
    return max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())


def rounded_up(counts: list[int], alignment: int) -> list[int]:
    """Each to the next multiple."""
    return [-(-count // alignment) * alignment for count in counts]
