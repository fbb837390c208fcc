# SPDX-License-Identifier: Apache-2.0
"""Gradients between processes: gloo groups on the CPU, and on all GPUs of the machine, each its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.functional_layer import (
    LAYOUTS,
    MODES,
    Rank,
    compare,
    dense,
    make_layer,
    make_routing,
    make_targets,
)
from support.layer import Shape
from support.processes import Processes, devices, ranks_on

from moegen.runtime.worlds import GroupWorld


def shape_of(ranks: int) -> Shape:
    """Experts that do not divide over the ranks."""
    return Shape(ranks, 2 * ranks + 3, 3, 64, 16)


@pytest.fixture(scope="module", params=devices(gpu_each=True))
def group(request: pytest.FixtureRequest, processes: Any) -> Processes:
    kept: Processes = processes(ranks_on(request.param, on_cpu=2), request.param)
    return kept


def in_process(rank: int, device: str, layout: str, mode: str) -> str:
    shape = shape_of(torch.distributed.get_world_size())
    routing = make_routing(shape, [(16, 9, 5)[r % 3] for r in range(shape.ranks)], seed=3)
    targets = make_targets(routing)
    with make_layer(GroupWorld(device=device), shape, layout, mode) as layer:
        mine = Rank(layer, shape, routing, targets)
        grads = mine.backward(mine.forward())
    compare(grads, dense(shape, routing, targets)[rank])
    return "ok"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_dense_layer(group: Processes, layout: str, mode: str) -> None:
    assert group.call(in_process, layout, mode) == ["ok"] * group.size
