# SPDX-License-Identifier: Apache-2.0
"""Handles whose memory comes back as a slice of a larger tensor, as offloaded activations do; on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import moegen
from moegen import errors
from moegen.runtime.worlds import RankWorld
from support.flashinfer_cases import in_step
from support.functional_layer import LAYOUTS, MODES, moe, run_and_compare
from support.ht_layer import RowsShape, make
from support.layer import Shape
from support.object_kinds import KINDS, Data

Tensor = torch.Tensor


def sliced(tensor: Tensor, offset: int) -> Tensor:
    """The same numbers, `offset` of them behind the begin of a larger tensor that is full of others."""
    flat = torch.full((tensor.numel() + offset + 3,), 1, dtype=torch.int64, device=tensor.device).to(tensor.dtype)
    flat[offset : offset + tensor.numel()] = tensor.flatten()
    return flat[offset : offset + tensor.numel()].view(tensor.shape)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_with_saved_tensors_in_slices(device: str, layout: str, mode: str, offset: int) -> None:
    def how(layer: moegen.HighThroughput, *tensors: Tensor) -> Tensor:
        def move(tensor: Tensor) -> Tensor:
            return sliced(tensor, offset)

        with torch.autograd.graph.saved_tensors_hooks(move, move):
            return moe(layer, *tensors)

    run_and_compare(device, Shape(2, 6, 2, 64, 16), (11, 4), layout, mode, how)


PACKED = RowsShape(2, 6, 2, 64, "packed", max_tokens=16)
STACKS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "rows": lambda each: list(torch.stack(each).unbind(0)),
    "columns": lambda each: list(torch.stack(each, dim=1).unbind(1)),
    "ends": lambda each: list(torch.cat([each[0][:1], *each])[1:].split(len(each[0]))),
}
"""Of several handles' memories; columns are strided, and one of the ends is at an odd word."""


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
@pytest.mark.parametrize(
    ("shape", "path"),
    [
        (PACKED, "ipc"),
        (replace(PACKED, layout="token"), "ipc"),
        (RowsShape(3, 10, 3, 24, "packed", max_tokens=16, mode="exact"), "collective"),
    ],
    ids=str,
)
def test_stacked_handles(
    device: str, shape: RowsShape, path: str, stack: Callable[[list[Tensor]], list[Tensor]]
) -> None:
    def work(world: RankWorld) -> None:
        layer = make(world, shape, path=path)
        generator = torch.Generator().manual_seed(world.rank)
        x = torch.randn(9, shape.hidden, generator=generator).bfloat16().to(device)
        scores = [torch.rand(9, shape.experts, generator=generator) for _ in range(3)]
        ids = [each.topk(shape.topk, dim=1).indices.to(device) for each in scores]
        weights = torch.rand(9, shape.topk, generator=generator).to(device)
        in_step(world)
        received = [layer.dispatch(x, each, weights) for each in ids]
        in_step(world)
        for kept, memory in zip(received, stack([each.handle.memory for each in received]), strict=True):
            again = layer.handle_of(memory, 9, kept.handle.rows)
            for part in ("counts", "first_slots", "first_rows", "source_counts"):
                assert torch.equal(getattr(again.numbers, part), getattr(kept.handle.numbers, part)), part
            results = []
            for handle in (kept.handle, again):
                in_step(world)
                by_handle = layer.dispatch(x, handle=handle)
                in_step(world)
                results.append(layer.combine(by_handle.tokens, handle)[0])
            in_step(world)
            assert torch.equal(*results)
            assert results[0].abs().max() > 0
        in_step(world)
        layer.destroy()

    moegen.LocalWorld(shape.ranks, device).run(work)


def test_memory_that_is_no_handles_is_refused(device: str) -> None:
    def work(world: RankWorld) -> None:
        layer = make(world, replace(PACKED, ranks=1))
        memory = layer.row_memory.empty_numbers()
        for wrong in (memory[1:], memory.float(), memory.to("meta"), memory[None]):
            with pytest.raises(errors.HandleError, match=f"{len(memory)} words int32"):
                layer.handle_of(wrong, 3, 3)
        layer.destroy()

    moegen.LocalWorld(1, device).run(work)


def test_numbers_of_layout_expert_in_a_slice(device: str) -> None:
    (kind,) = [kind for kind in KINDS if kind.name == "ExpertParallel"]

    def work(world: RankWorld) -> None:
        layer: Any = kind.make(kind, world)
        data = Data(kind, world)
        in_step(world)
        received = kind.dispatch(layer, data)
        in_step(world)
        moved = replace(received, handle=replace(received.handle, memory=sliced(received.handle.memory, 3)))
        for name in ("counts", "ranges", "row_tokens"):
            assert torch.equal(getattr(moved, name), getattr(received, name)), name
        layer.destroy()

    moegen.LocalWorld(kind.ranks, device).run(work)
