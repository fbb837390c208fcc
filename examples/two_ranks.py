# SPDX-License-Identifier: Apache-2.0
"""Two ranks as two processes: dispatch tokens, run the experts, combine.

python examples/two_ranks.py            # on CPUs
python examples/two_ranks.py cuda       # one process per GPU, two GPUs (not run yet)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import moegen

RANKS, EXPERTS, TOPK, HIDDEN, CAPACITY = 2, 6, 2, 128, 32


def run_rank(rank: int, device_type: str, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS)
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)

    # The default process group; every rank gives the same numbers.
    with moegen.ExpertParallel(
        device=device, num_experts=EXPERTS, num_topk=TOPK, hidden=HIDDEN, max_tokens_per_rank=CAPACITY
    ) as ep:
        torch.manual_seed(rank)
        tokens = 20 + 5 * rank  # ranks need not have as many tokens as each other
        x = torch.randn(tokens, HIDDEN, device=device).bfloat16()
        weights, ids = torch.rand(tokens, EXPERTS, device=device).softmax(dim=1).topk(TOPK, dim=1)

        received = ep.dispatch(x, ids, weights)
        y = torch.empty_like(received.tokens)
        for local, expert in enumerate(ep.local_experts):
            rows = int(received.counts[local])
            y[local, :rows] = received.tokens[local, :rows] * (expert + 1)  # the expert: times its number plus one
        out = ep.combine(y, received.handle)
        ep.synchronize()

        expected = x.float() * (weights * (ids + 1)).sum(dim=1, keepdim=True)
        torch.testing.assert_close(out.float(), expected, rtol=2**-6, atol=2**-6)
        print(f"rank {rank}: sent {tokens} tokens, experts {list(ep.local_experts)} got {received.counts.tolist()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        chosen = sys.argv[1] if len(sys.argv) > 1 else "cpu"
        spawn(run_rank, (chosen, Path(folder, "meeting").as_uri()), nprocs=RANKS)
