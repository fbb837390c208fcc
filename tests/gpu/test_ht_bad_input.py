# SPDX-License-Identifier: Apache-2.0
"""Bad input to `HighThroughput`, on this device."""

from typing import Any

import pytest
import torch
from support.ht_input_cases import *  # noqa: F403
from support.ht_input_cases import SHAPES
from support.ht_layer import make

import moegen
from moegen import errors


def test_what_waits_for_the_host_cannot_be_captured(device: str) -> None:
    def work(world: Any) -> None:
        with make(world, SHAPES["exact"]) as layer:
            x = torch.zeros(3, 128, dtype=torch.bfloat16, device=device)
            ids = torch.zeros(3, 2, dtype=torch.int64, device=device)
            layer.dispatch(x, ids)
            layer.synchronize()
            with (
                torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()),
                pytest.raises(errors.InputError, match="cannot be captured"),
            ):
                layer.dispatch(x, ids)

    moegen.LocalWorld(1, device).run(work)
