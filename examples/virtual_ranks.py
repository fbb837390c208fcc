# SPDX-License-Identifier: Apache-2.0
"""Many ranks in one process, and what happens when one of them does not come.

python examples/virtual_ranks.py
"""

from __future__ import annotations

from typing import Any

import torch

import moegen


def layer(world: Any) -> str:
    ep = moegen.ExpertParallel(world, num_experts=5, num_topk=2, hidden=64, max_tokens_per_rank=8, timeout=0.5)
    x = torch.ones(world.rank, 64, dtype=torch.bfloat16)  # rank 0 has no tokens at all
    ids = torch.tensor([[0, 4]]).repeat(world.rank, 1)
    received = ep.dispatch(x, ids)
    ep.combine(received.tokens, received.handle)
    if world.rank == 2:
        return "rank 2 leaves without a word"
    try:
        ep.dispatch(x, ids)
    except moegen.errors.PeerTimeoutError as error:
        return f"rank {error.rank} missed rank {error.peer}: {error.phase}"
    finally:
        ep.destroy()
    return "nobody was missed"


if __name__ == "__main__":
    for line in moegen.LocalWorld(3, "cpu").run(layer):
        print(line)
