# SPDX-License-Identifier: Apache-2.0
"""One rank of a group whose ranks have nothing but TCP in common: run by `namespaces.sh`. Prints what it found."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import moegen
from moegen.reference_payloads import combine_payloads, dispatch_payloads
from support.collective_cases import EXPERTS, MOST, inputs, make

ROUNDS = 4


def round_trip(layer: moegen.OneSided, seed: int) -> None:
    """Compared with the reference, whose inputs every rank can make."""
    rank, size = layer.rank, layer.num_ranks
    everyone = [inputs(each, size, seed, "cpu") for each in range(size)]
    all_ids, all_payloads = [ids for ids, _ in everyone], [payloads for _, payloads in everyone]
    expected = dispatch_payloads(all_payloads, all_ids, EXPERTS, MOST)
    y = [(part.payloads[0].float() * (each + 1)).bfloat16() for each, part in enumerate(expected)]
    received = layer.dispatch(all_ids[rank], all_payloads[rank])
    assert torch.equal(received.counts, expected[rank].counts)
    used = expected[rank].used
    for found, wanted in zip(received.payloads, expected[rank].payloads, strict=True):
        assert torch.equal(found[used].view(torch.uint8), wanted[used].view(torch.uint8))
    combined = layer.combine(y[rank], received.handle)
    layer.synchronize()
    assert torch.equal(combined, combine_payloads(y, expected, [len(ids) for ids in all_ids])[rank].rounded)


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for exchange in ("padded", "exact"):
        with make(None, "cpu", "collective", exchange=exchange) as layer:
            networks = layer.world.exchange(os.readlink("/proc/self/ns/net"))
            assert [networks.count(network) for network in networks] == [2, 2, 2, 2]
            for seed in range(ROUNDS):
                round_trip(layer, seed)
    torch.distributed.barrier()
    print(f"rank {layer.rank}: ok", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
