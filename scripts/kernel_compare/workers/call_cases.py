# SPDX-License-Identifier: Apache-2.0
"""Calls of each of moegen's objects, in each of their ways, by the public API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import moegen

EXPERTS, TOPK, HIDDEN = 5, 2, 512
"""Experts that two ranks cannot share evenly, and a row that each format can quantize."""
SHAPE: dict[str, Any] = {"num_experts": EXPERTS, "num_topk": TOPK, "hidden": HIDDEN, "max_tokens_per_rank": 12}

Case = Callable[[Any, Any, torch.Generator], None]


def cases() -> Iterator[tuple[str, Case]]:
    """(name, what each rank does, given what records its calls, its world, and its random numbers)."""
    yield from _low_latency()
    yield from _high_throughput()
    yield from _one_sided()


def _low_latency() -> Iterator[tuple[str, Case]]:
    masked = {"active_ranks": True}
    ways: tuple[tuple[str, dict[str, Any]], ...] = (
        ("ll", {}),
        ("ll inline", {"wire": "inline"}),
        ("ll fp8", {"quantize": "fp8"}),
        ("ll ue8m0", {"quantize": "fp8_ue8m0"}),
        ("ll masked", masked),
        ("ll masked fp8", {**masked, "quantize": "fp8"}),
        ("ll collective", {"path": "collective"}),
        ("ll collective fp8", {"path": "collective", "quantize": "fp8"}),
    )
    for name, options in ways:
        yield name, partial(_experts, options, masked=options.get("active_ranks", False))
        yield f"{name} hooks", partial(_experts_by_halves, options)


def _experts(options: dict[str, Any], call: Any, world: Any, generator: torch.Generator, *, masked: bool) -> None:
    """Dispatches and combines with weights given at dispatch, at combine, and with everything that a call may have."""
    with moegen.ExpertParallel(world, **SHAPE, **options) as layer:
        x, ids, weights = _routed(generator, 7 + world.rank)
        received = call(layer.dispatch, x, ids, weights)
        call(layer.combine, _outputs(received.tokens), received.handle)
        more = {"num_tokens": torch.tensor([5], dtype=torch.int32)}
        more["total_counts"] = torch.zeros(received.counts.shape, dtype=torch.int32)
        waited = {"waited_ns": torch.zeros(world.size, dtype=torch.int64)} if masked else {}
        received = call(layer.dispatch, x, ids.int(), out=received, timeout=20.0, **more, **waited)
        again = {**waited, "renormalize": True} if masked else {}
        call(layer.combine, _outputs(received.tokens), received.handle, weights, out=torch.empty_like(x), **again)
        call(layer.synchronize)


def _experts_by_halves(options: dict[str, Any], call: Any, world: Any, generator: torch.Generator) -> None:
    """Two calls at a time, each in two halves."""
    with moegen.ExpertParallel(world, **SHAPE, slots=2, **options) as layer:
        batches = [_routed(generator, 7 + world.rank), _routed(generator, 4)]
        sent = [call(layer.dispatch, *batch, return_recv_hook=True) for batch in batches]
        for _, receive in sent:
            call(receive)
        y = [_outputs(received.tokens) for received, _ in sent]
        given = (None, batches[1][2])
        back = [
            call(layer.combine, rows, received.handle, weights, return_recv_hook=True)
            for rows, (received, _), weights in zip(y, sent, given, strict=True)
        ]
        for _, receive in back:
            call(receive)
        call(layer.synchronize)


def _high_throughput() -> Iterator[tuple[str, Case]]:
    for layout in ("token", "packed"):
        for path in ("ipc", "collective"):
            for quantize in (None, "fp8", "fp8_ue8m0"):
                for mode in ("capacity", "exact"):
                    options = {"layout": layout, "path": path, "quantize": quantize, "mode": mode}
                    yield " ".join(["ht", layout, path, quantize or "bf16", mode]), partial(_rows, options)
    yield "ht token borrowed", partial(_rows, {"layout": "token", "borrow": True})
    yield "ht token borrowed fp8", partial(_rows, {"layout": "token", "borrow": True, "quantize": "fp8"})
    yield "ht packed aligned", partial(_rows, {"layout": "packed", "alignment": 8})


def _rows(options: dict[str, Any], call: Any, world: Any, generator: torch.Generator) -> None:
    """A round trip, one by its handle, and one with everything that a combine may have; and `layout`."""
    with moegen.HighThroughput(world, **SHAPE, **options) as layer:
        x, ids, weights = _routed(generator, 7 + world.rank)
        call(layer.layout, ids)
        received = call(layer.dispatch, x, ids, weights)
        y = torch.ones(received.handle.rows, HIDDEN, dtype=torch.bfloat16)
        call(layer.combine, y, received.handle)
        call(layer.dispatch, x, handle=received.handle)
        given = torch.ones(len(y), TOPK) if options["layout"] == "token" else torch.ones(len(y))
        call(layer.combine, y, received.handle, given, bias=(x, x), out=torch.empty_like(x))
        call(layer.synchronize)


def _one_sided() -> Iterator[tuple[str, Case]]:
    for name, options in (
        ("a2a", {}),
        ("a2a pulled", {"expert_rows": True}),
        ("a2a collective padded", {"path": "collective", "exchange": "padded"}),
        ("a2a collective exact", {"path": "collective", "exchange": "exact"}),
    ):
        yield name, partial(_payloads, options)


def _payloads(options: dict[str, Any], call: Any, world: Any, generator: torch.Generator) -> None:
    """Round trips of one payload and of four, with rows where they are read in place if the object has such memory."""
    with moegen.OneSided(world, **SHAPE, payload_bytes=2 * HIDDEN + 64, **options) as layer:
        x, ids, weights = _routed(generator, 7 + world.rank)
        scales = torch.ones(len(x), 3, dtype=torch.uint8)
        stats = torch.tensor([3, world.rank], dtype=torch.int32)
        more: dict[str, Any] = {"stats": stats, "unused_ids": (1, -1), "max_tokens": 10}
        for payloads, told in (([x], {}), ([x, ids.int(), weights, scales], more)):
            received = call(layer.dispatch, ids, payloads, **told)
            y = _outputs(received.payloads[0])
            call(layer.combine, y, received.handle)
            call(layer.combine, y, received.handle, out_dtype=torch.float32)
            call(layer.combine, y, received.handle, quantize="nvfp4", output_scale=torch.ones(1))
            if options.get("expert_rows"):
                rows = layer.expert_rows(received.handle.max_tokens).copy_(y)
                call(layer.combine, rows, received.handle)
        call(layer.synchronize)


def _routed(generator: torch.Generator, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, experts, weights."""
    x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOPK, dim=1).indices
    return x, ids, torch.rand(tokens, TOPK, generator=generator)


def _outputs(tokens: torch.Tensor) -> torch.Tensor:
    """What stands in for experts; rows that nothing came for may hold anything, and stay finite."""
    return torch.ones(tokens.shape, dtype=torch.bfloat16)
