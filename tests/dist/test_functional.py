# SPDX-License-Identifier: Apache-2.0
"""Gradients between processes: gloo groups on the CPU, and on GPUs of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.functional_cases import (
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
from support.processes import Processes

from moegen.runtime.worlds import GroupWorld

SHAPE = Shape(2, 7, 3, 64, 16)
TOKENS = (16, 9)


def devices() -> list[object]:
    gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs on this machine")
    return ["cpu", pytest.param("cuda", marks=gpus)]


@pytest.fixture(scope="module", params=devices())
def group(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(SHAPE.ranks, request.param)
    yield processes
    processes.stop()


def in_process(rank: int, device: str, layout: str, mode: str) -> str:
    routing = make_routing(SHAPE, TOKENS, seed=3)
    targets = make_targets(routing)
    with make_layer(GroupWorld(device=device), SHAPE, layout, mode) as layer:
        mine = Rank(layer, SHAPE, routing, targets)
        grads = mine.backward(mine.forward())
    compare(grads, dense(SHAPE, routing, targets)[rank])
    return "ok"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_dense_layer(group: Processes, layout: str, mode: str) -> None:
    assert group.call(in_process, layout, mode) == ["ok"] * group.size
