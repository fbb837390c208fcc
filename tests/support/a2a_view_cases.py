# SPDX-License-Identifier: Apache-2.0
"""What dispatch of `OneSided` returns are views of its buffer, which may be what combine is given; on every device."""

from __future__ import annotations

import torch

from moegen.runtime.worlds import RankWorld
from support.a2a_cases import one_thread_per_rank  # noqa: F401
from support.a2a_data import PayloadShape
from support.a2a_layer import PayloadLayer
from support.ll_cases import delay


def test_rows_of_combine_may_be_the_views(device: str) -> None:
    """No copy is made of what experts leave as it is. Slots per source change, so that what one rank sends in the next
    call lies where another's rows were.
    """
    shape = PayloadShape(4, 4, 4, 512, "layer")
    layer = PayloadLayer(shape, device)
    counts = {24: [24, 0, 0, 24], 9: [0, 9, 9, 0]}

    def work(world: RankWorld) -> int:
        rank, generator = layer.ranks[world.rank], torch.Generator().manual_seed(world.rank)
        given = {}
        for slots, tokens in counts.items():
            ids = torch.arange(4, device=device).expand(tokens[world.rank], 4).contiguous()
            rows = torch.randint(-99, 99, (len(ids), shape.hidden), generator=generator).bfloat16().to(device)
            given[slots] = (ids, [rows, ids.int(), ids.float()])
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        layer.step(world)
        for step in range(60):
            delay(device, generator)
            slots = (24, 9)[step % 2]
            received = rank.dispatch(*given[slots], max_tokens=slots)
            combined = rank.combine(received.payloads[0], received.handle)
            wrong += (combined != 4 * given[slots][1][0]).sum()
        rank.synchronize()
        return int(wrong)

    assert layer.world.run(work) == [0] * 4
    layer.destroy()
