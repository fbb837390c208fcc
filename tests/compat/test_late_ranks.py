# SPDX-License-Identifier: Apache-2.0
"""A call that one rank makes alone, with a shape of its own, ends within the timeout that the caller has set."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from moegen.compat import deep_ep
from moegen.errors import MissingRanksError
from moegen.runtime import worlds
from moegen.runtime.worlds import LocalWorld, RankWorld


def test_another_shape_on_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "LEAST_SECONDS", 0.2)
    over = threading.Event()

    def work(world: RankWorld) -> None:
        buffer = deep_ep.Buffer(world, num_rdma_bytes=1, low_latency_mode=True)
        ids = torch.arange(8).view(4, 2)
        buffer.low_latency_dispatch(torch.ones(4, 64).bfloat16(), ids, 8, 8, use_fp8=False)
        if world.rank == 0:
            over.wait(60)
            return
        buffer.timeout = 0.3
        begin = time.monotonic()
        try:
            with pytest.raises(MissingRanksError, match=r"rank 1 waited 0\.3 s for rank 0") as raised:
                buffer.low_latency_dispatch(torch.ones(4, 128).bfloat16(), ids, 8, 8, use_fp8=False)
            assert raised.value.missing == (0,)
            assert time.monotonic() - begin < 5
        finally:
            over.set()

    LocalWorld(2).run(work)
