# SPDX-License-Identifier: Apache-2.0
"""Path collective of `OneSided`: what path ipc gives is what is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import moegen
from moegen import errors
from moegen.runtime.streams import CommStream
from moegen.tuning import exchange as exchange_rule

EXPERTS, TOPK, HIDDEN, MOST = 21, 4, 128, 23


def make(world: Any, device: str, path: str, **more: Any) -> moegen.OneSided:
    return moegen.OneSided(
        world,
        num_experts=EXPERTS,
        num_topk=TOPK,
        max_tokens_per_rank=MOST,
        payload_bytes=2 * HIDDEN + 8 * TOPK + 3 + 12,
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
    return ids, [x, ids, torch.rand(tokens, TOPK, generator=generator).to(device), small, ids[:, :3]]


@contextmanager
def slow_link() -> Iterator[None]:
    """Any padding is worth a round trip."""
    usual = exchange_rule.NCCL, exchange_rule.GLOO
    exchange_rule.NCCL = exchange_rule.GLOO = exchange_rule.Link(1.0, 1e-9)
    try:
        yield
    finally:
        exchange_rule.NCCL, exchange_rule.GLOO = usual


def outputs(received: moegen.DispatchedPayloads, rank: int) -> torch.Tensor:
    """A factor for each rank; what nothing came for is not a number."""
    rows = received.payloads[0].float() * (rank + 1)
    slot = torch.arange(rows.shape[1], device=rows.device)
    return rows.bfloat16().masked_fill_((slot >= received.counts[:, None])[:, :, None], torch.nan)


def compare_with_ipc(world: Any, device: str, rounds: int, exchange: str = "padded") -> str:
    """Every result of both paths, bit by bit, with sizes that change from call to call."""
    with make(world, device, "ipc") as right, make(world, device, "collective", exchange=exchange) as layer:
        rank, size = layer.rank, layer.num_ranks
        for seed in range(rounds):
            ids, payloads = inputs(rank, size, seed, device)
            most = MOST if seed < 5 else max(1, *(len(inputs(r, size, seed, "cpu")[0]) for r in range(size)))
            options = options_of(layer, seed, most, len(ids))
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
            filled = options["unused_ids"][0]
            assert torch.equal(rows[filled], own_rows[filled])
            used = slice(0, int(options["num_tokens"] or 0) if seed % 2 else None)
            assert torch.equal(sums[used], mine[used])
    return "ok"


def options_of(layer: moegen.OneSided, seed: int, most: int, tokens: int) -> dict[str, Any]:
    """Of a dispatch. Rows of ids are a multiple of 16 bytes, or not."""
    stats = torch.arange(7, dtype=torch.int32, device=layer.device) + 100 * layer.rank
    counted = torch.tensor([tokens // 2], dtype=torch.int32, device=layer.device) if seed % 2 else None
    return {"stats": stats, "unused_ids": (1 + 3 * (seed % 2), -5), "max_tokens": most, "num_tokens": counted}


@pytest.mark.parametrize("exchange", ["padded", "exact"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, pytest.param(16, marks=pytest.mark.slow)])
def test_equals_path_ipc(device: str, ranks: int, exchange: str) -> None:
    assert moegen.LocalWorld(ranks, device).run(compare_with_ipc, device, 8, exchange) == ["ok"] * ranks


def test_auto_is_exact_where_padding_is_dear(device: str) -> None:
    def work(world: Any, exact: bool) -> None:
        with make(world, device, "collective") as layer:
            ids, payloads = inputs(world.rank, world.size, 1, device)
            received = layer.dispatch(ids, payloads)
            assert (received.handle.exchanged is not None) == exact
            layer.combine(outputs(received, world.rank), received.handle)
            layer.synchronize()

    moegen.LocalWorld(2, device).run(work, False)
    with slow_link():
        moegen.LocalWorld(2, device).run(work, True)


def test_virtual_ranks_exchange_on_the_current_stream(device: str) -> None:
    """Which is not the rank's own where calls are asynchronous."""

    def work(world: Any) -> None:
        with CommStream(world.device).behind():
            given = torch.zeros(world.size * 1024, dtype=torch.uint8, device=world.device)
            came = torch.empty_like(given)
            for step in range(1, 9):
                if device == "cuda":
                    torch.cuda._sleep(1_000_000 * (1 + world.rank))
                given.fill_(step)
                world.all_to_all(came, given)
                assert came.eq(step).all()

    moegen.LocalWorld(3, device).run(work)


def test_exact_sends_what_is_needed(device: str) -> None:
    """Of each exchange, the bytes that leave a rank."""

    def work(world: Any) -> None:
        with make(world, device, "collective", exchange="exact") as layer:
            ids, payloads = inputs(world.rank, world.size, 1, device)
            given: list[list[int]] = []
            exchange = layer.world.all_to_all

            def counting(output: torch.Tensor, rows: torch.Tensor, sizes: Any = None) -> None:
                given.append([] if sizes is None else sizes[1])
                exchange(output, rows, sizes)

            layer.world.all_to_all = counting
            try:
                received = layer.dispatch(ids, payloads)
                layer.combine(outputs(received, world.rank), received.handle)
            finally:
                del layer.world.all_to_all
            handle = received.handle.exchanged
            assert handle is not None and list(handle.came) == received.counts.tolist()
            widths = [part.shape[1] * part.element_size() for part in payloads]
            assert given[1] == [sum(-(-rows * width // 16) * 16 for width in widths) for rows in handle.sent]
            assert given[2] == [rows * 2 * HIDDEN for rows in handle.came]

    moegen.LocalWorld(3, device).run(work)


def launched(layer: moegen.OneSided, call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, and the ops of the kernels that it launches."""
    ops: Any = layer._ops
    seen: list[str] = []
    every = [(spec.op, bound) for spec, (bound, _) in ops._bound.items()]
    every += [("headers", bound) for bound in ops._count.values()]
    usual = [bound._start for _, bound in every]

    def noting(name: str, start: Callable[[], None]) -> Callable[[], None]:
        return lambda: (seen.append(name), start())[1]

    for (name, bound), start in zip(every, usual, strict=True):
        bound._start = noting(name, start)
    try:
        return call(), seen
    finally:
        for (_, bound), start in zip(every, usual, strict=True):
            bound._start = start


def test_nothing_is_launched_for_nothing(device: str) -> None:
    """Rank 0 alone has tokens, and only for rank 1."""

    def work(world: Any) -> None:
        with make(world, device, "collective", exchange="exact") as layer:
            ids = torch.full((5 if world.rank == 0 else 0, TOPK), EXPERTS // 3 + 1, dtype=torch.int32, device=device)
            payload = torch.ones(len(ids), 16, device=device)
            layer.combine(outputs_of(layer.dispatch(ids, [payload])), layer.dispatch(ids, [payload]).handle)
            received, seen = launched(layer, lambda: layer.dispatch(ids, [payload]))
            came, sends = world.rank == 1, world.rank == 0
            assert seen == ["headers", "open", *["pack"] * sends, *["move"] * came]
            y = outputs_of(received)
            combined, seen = launched(layer, lambda: layer.combine(y, received.handle))
            assert seen == [*["move"] * came, *["sum"] * sends]
            assert torch.equal(combined, torch.ones(len(ids), HIDDEN, dtype=torch.bfloat16, device=device))

    moegen.LocalWorld(3, device).run(work)


def outputs_of(received: moegen.DispatchedPayloads) -> torch.Tensor:
    ranks, slots, _ = received.payloads[0].shape
    return torch.ones(ranks, slots, HIDDEN, dtype=torch.bfloat16, device=received.counts.device)


def test_handles_that_mean_nothing_here(device: str) -> None:
    def work(world: Any) -> None:
        ids, payloads = inputs(world.rank, world.size, 1, device)
        first = make(world, device, "collective")
        received = first.dispatch(ids, payloads)
        y = outputs(received, world.rank)
        with pytest.raises(errors.InputError, match=r"y is \[2, 23, 128\]"):
            first.combine(y[:, :5], received.handle)
        with make(world, device, "collective") as other, pytest.raises(errors.HandleError, match="another OneSided"):
            other.combine(y, received.handle)
        first.destroy()
        with pytest.raises(errors.DestroyedError, match="make a new one"):
            first.combine(y, received.handle)
        with make(world, device, "collective") as again:
            with pytest.raises(errors.HandleError, match="was destroyed; dispatch again"):
                again.combine(y, received.handle)
            fresh = again.dispatch(ids, payloads, max_tokens=MOST - 1)
            with pytest.raises(errors.InputError, match=r"y is \[2, 22, 128\]"):
                again.combine(y, fresh.handle)
            with pytest.raises(errors.HandleError, match="handle of a dispatch"):
                again.combine(y, received.handle.exchanged)  # type: ignore[arg-type]
            again.combine(y[:, 1:].contiguous(), fresh.handle)
            again.synchronize()

    moegen.LocalWorld(2, device).run(work)


PADDED_STAGES = ["dispatch_pack", "dispatch_collective", "dispatch_compact", "combine_collective", "combine_reduce"]
EXACT_STAGES = [
    "dispatch_counts", "dispatch_pack", "dispatch_collective", "dispatch_compact", "combine_pack", "combine_collective",
    "combine_reduce",
]  # fmt: skip


@pytest.mark.parametrize(("exchange", "stages"), [("padded", PADDED_STAGES), ("exact", EXACT_STAGES)])
def test_stages_are_timed_on_request(device: str, exchange: str, stages: list[str]) -> None:
    def work(world: Any) -> None:
        with make(world, device, "collective", exchange=exchange) as layer:
            ids, payloads = inputs(world.rank, world.size, 1, device)

            def call(times: int) -> None:
                for _ in range(times):
                    received = layer.dispatch(ids, payloads)
                    layer.combine(outputs(received, world.rank), received.handle)

            call(1)
            assert layer.stage_seconds() == {}
            layer.time_stages()
            call(3)
            seconds = layer.stage_seconds()
            assert list(seconds) == stages
            assert all(len(of_stage) == 3 and min(of_stage) >= 0 for of_stage in seconds.values())
            assert layer.stage_seconds() == {}
            layer.time_stages(False)
            call(1)
            assert layer.stage_seconds() == {}
        with make(world, device, "ipc") as layer, pytest.raises(errors.InputError, match="single launches"):
            layer.time_stages()

    moegen.LocalWorld(2, device).run(work)


def test_what_cannot_be(device: str) -> None:
    def work(world: Any) -> None:
        with pytest.raises(errors.InputError, match="exchange is one of auto, padded, exact; got 'some'"):
            make(world, device, "collective", exchange="some")
        with make(world, device, "collective") as layer:
            ids, payloads = inputs(world.rank, 2, 1, device)
            with pytest.raises(errors.InputError, match="all ranks take part"):
                layer.dispatch(ids, payloads, active_ranks=1 << world.rank)

    moegen.LocalWorld(2, device).run(work)


def test_ranks_that_ask_for_different_exchanges(device: str) -> None:
    def work(world: Any) -> None:
        with pytest.raises(errors.WorldError, match="different arguments"):
            make(world, device, "collective", exchange=("padded", "exact")[world.rank])

    moegen.LocalWorld(2, device).run(work)
