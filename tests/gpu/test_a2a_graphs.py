# SPDX-License-Identifier: Apache-2.0
"""`OneSided` in CUDA graphs on virtual ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.a2a_data import PayloadShape
from support.a2a_graph_cases import SHAPES, replays
from support.a2a_layer import make

import moegen
from moegen import errors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replays_equal_calls(shape: PayloadShape) -> None:
    assert moegen.LocalWorld(shape.ranks, "cuda").run(replays, shape) == [0] * shape.ranks


def test_what_is_not_loaded_cannot_be_captured() -> None:
    """The first dispatch of a set of payloads loads a kernel."""
    shape = PayloadShape(1, 16, 4, 512, "layer")

    def work(world: Any) -> None:
        with make(world, shape) as layer:
            ids, payload = torch.zeros(3, 4, dtype=torch.int64, device="cuda"), torch.zeros(3, 7, device="cuda")
            layer.synchronize()
            with (
                torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()),
                pytest.raises(errors.MissingKernelError),
            ):
                layer.dispatch(ids, [payload])

    moegen.LocalWorld(1, "cuda").run(work)
