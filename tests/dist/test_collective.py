# SPDX-License-Identifier: Apache-2.0
"""Path collective between processes: gloo on CPUs, nccl on GPUs of their own. What path ipc gives is what is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.processes import Processes

import moegen
from moegen import errors

EXPERTS, TOPK, HIDDEN, MOST = 13, 4, 128, 24


def devices() -> list[object]:
    gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs on this machine")
    return ["cpu", pytest.param("cuda", marks=gpus)]


@pytest.fixture(scope="module", params=devices())
def group(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(4 if request.param == "cpu" else 2, request.param)
    yield processes
    processes.stop()


_groups: dict[str, Any] = {}


def group_of(device: str) -> Any:
    """A group whose backend moves this device's tensors."""
    if device == "cpu":
        return torch.distributed.group.WORLD
    if "nccl" not in _groups:
        _groups["nccl"] = torch.distributed.new_group(backend="nccl")
    return _groups["nccl"]


def make(device: str, path: str, **more: Any) -> moegen.OneSided:
    return moegen.OneSided(
        group_of(device),
        num_experts=EXPERTS,
        num_topk=TOPK,
        max_tokens_per_rank=MOST,
        payload_bytes=2 * HIDDEN + 8 * TOPK + 3,
        hidden=HIDDEN,
        device=device,
        path=path,
        **more,
    )


def inputs(rank: int, size: int, seed: int, device: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Ranks with no tokens among them."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    tokens = 0 if (rank + seed) % 3 == 0 else (7 * rank + 5 * seed) % (MOST + 1)
    ids = torch.randint(-1, EXPERTS, (tokens, TOPK), generator=generator).to(device, torch.int32)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(device, torch.bfloat16)
    small = torch.randint(0, 255, (tokens, 3), generator=generator).to(device, torch.uint8)
    return ids, [x, ids, torch.rand(tokens, TOPK, generator=generator).to(device), small]


def outputs(received: moegen.DispatchedPayloads, rank: int) -> torch.Tensor:
    """A factor for each rank; what nothing came for is not a number."""
    rows = received.payloads[0].float() * (rank + 1)
    slot = torch.arange(rows.shape[1], device=rows.device)
    return rows.bfloat16().masked_fill_((slot >= received.counts[:, None])[:, :, None], torch.nan)


def compare(rank: int, device: str, rounds: int) -> str:
    """Every result of both paths, bit by bit, with sizes that change from call to call."""
    size = torch.distributed.get_world_size()
    with make(device, "ipc") as right, make(device, "collective") as layer:
        for seed in range(rounds):
            ids, payloads = inputs(rank, size, seed, device)
            most = MOST if seed < 5 else max(1, *(len(inputs(r, size, seed, "cpu")[0]) for r in range(size)))
            stats = torch.arange(7, dtype=torch.int32, device=device) + 100 * rank
            options: dict[str, Any] = {"stats": stats, "unused_ids": (1, -5), "max_tokens": most}
            results = []
            for each in (right, layer):
                received = each.dispatch(ids, payloads, **options)
                parts = [part.clone() for part in received.payloads]  # combine lets the others write there again
                combined = each.combine(outputs(received, rank), received.handle)
                each.synchronize()
                results.append((received, parts, combined))
            (wanted, rows, sums), (found, own_rows, mine) = results
            assert torch.equal(wanted.counts, found.counts)
            assert wanted.stats is not None and found.stats is not None and torch.equal(wanted.stats, found.stats)
            for a, b in zip(rows, own_rows, strict=True):
                for source, count in enumerate(wanted.counts.tolist()):
                    assert torch.equal(a[source, :count].view(torch.uint8), b[source, :count].view(torch.uint8))
            assert torch.equal(rows[1], own_rows[1])  # unused ids are filled
            assert torch.equal(sums, mine)
    return "ok"


def test_equals_path_ipc(group: Processes) -> None:
    assert group.call(compare, 9) == ["ok"] * group.size


def interleave(rank: int, device: str, times: int) -> int:
    """Two layers, one inside the other; every result equals the layer's first."""
    size = torch.distributed.get_world_size()
    with make(device, "collective") as outer, make(device, "collective") as inner:
        wrong = torch.zeros((), dtype=torch.int64, device=device)
        wanted: list[torch.Tensor | None] = [None, None]
        for _ in range(times):
            ids, payloads = inputs(rank, size, 1, device)
            other_ids, other = inputs(rank, size, 2, device)
            first = outer.dispatch(ids, payloads)
            y = outputs(first, rank)
            second = inner.dispatch(other_ids, other)
            within = inner.combine(outputs(second, rank), second.handle)
            around = outer.combine(y, first.handle)
            for place, found in enumerate((within, around)):
                before = wanted[place]
                wanted[place] = found if before is None else before
                wrong += 0 if before is None else (found != before).sum()
        outer.synchronize()
        return int(wrong)


def test_two_layers_interleaved(group: Processes) -> None:
    assert group.call(interleave, 20) == [0] * group.size


@pytest.mark.slow
def test_two_layers_interleaved_1000(group: Processes) -> None:
    assert group.call(interleave, 1000) == [0] * group.size


def mix_up(rank: int, device: str) -> str:
    """Rank 0 calls the other of two layers."""
    size = torch.distributed.get_world_size()
    with make(device, "collective") as one, make(device, "collective") as other:
        ids, payloads = inputs(rank, size, 1, device)
        for layer in (one, other):
            layer.dispatch(ids, payloads)  # loads its kernel, on all ranks
        layer = one if rank == 0 else other
        received = layer.dispatch(ids, payloads)
        try:
            layer.synchronize()
        except errors.WorldError as error:
            assert "belongs to another call" in str(error)
            strangers = received.counts[1:] if rank == 0 else received.counts[:1]
            assert not strangers.any()  # their rows are left out
            return "noticed"
    return "unnoticed"


def test_calls_of_different_layers_are_noticed(group: Processes) -> None:
    assert group.call(mix_up) == ["noticed"] * group.size


def chosen(rank: int, device: str, monkeypatched: bool) -> str:
    import os

    os.environ["MOEGEN_PEER_ACCESS"] = "0" if monkeypatched else "1"
    try:
        with make(device, "auto") as layer:
            return layer.problem.path
    finally:
        del os.environ["MOEGEN_PEER_ACCESS"]


def test_auto_takes_it_without_peer_access(group: Processes) -> None:
    assert group.call(chosen, True) == ["collective"] * group.size
    assert group.call(chosen, False) == ["ipc"] * group.size
