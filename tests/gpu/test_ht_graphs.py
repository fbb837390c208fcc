# SPDX-License-Identifier: Apache-2.0
"""`HighThroughput` in CUDA graphs on virtual ranks."""

from __future__ import annotations

import pytest
from support.ht_graph_cases import SHAPES, replays
from support.ht_layer import RowsShape

import moegen


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_replays_equal_calls(shape: RowsShape) -> None:
    assert moegen.LocalWorld(shape.ranks, "cuda").run(replays, shape) == [0] * shape.ranks
