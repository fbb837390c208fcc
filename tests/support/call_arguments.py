# SPDX-License-Identifier: Apache-2.0
"""Every public call with every tensor that it reads or writes, by name, on one virtual rank of each kind of object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import moegen
from moegen import functional

Tensors = dict[str, torch.Tensor]
BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
FP8 = torch.float8_e4m3fn
TOKENS = 3


@dataclass
class Call:
    """Call it with all of its tensors, or with others in the place of some; it returns what came of it.

    Attributes:
        reads, writes: tensors that fit.
    """

    make: Callable[[Tensors], Any]
    reads: Tensors
    writes: Tensors

    def __call__(self, **others: Any) -> Any:
        return self.make({**self.reads, **self.writes, **others})

    def without_outputs(self, **others: Any) -> Any:
        return self.make({**self.reads, **others})


def in_world(device: str, work: Callable[[Any], None]) -> None:
    moegen.LocalWorld(1, device).run(work)


class Maker:
    """Makes tensors of reproducible numbers."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(1)

    def __call__(self, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        if dtype.is_complex:
            return torch.complex(self(*shape, dtype=F32), self(*shape, dtype=F32))
        return torch.randn(shape, generator=self._generator).to(self.device, dtype)

    def ids(self, tokens: int = TOKENS, topk: int = 2) -> torch.Tensor:
        return torch.stack([torch.randperm(4, generator=self._generator)[:topk] for _ in range(tokens)]).to(self.device)

    def zeros(self, *shape: int, dtype: torch.dtype = I32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def one(self, number: int) -> torch.Tensor:
        return torch.full((1,), number, dtype=I32, device=self.device)


def experts(world: Any, path: str = "ipc", **options: Any) -> moegen.ExpertParallel:
    hidden = 64 if path == "ipc" else 8
    shape = {"num_experts": 4, "num_topk": 2, "hidden": hidden, "max_tokens_per_rank": 8}
    return moegen.ExpertParallel(world, **shape, path=path, slots=2, **options)


def rows(world: Any, path: str = "ipc", **options: Any) -> moegen.HighThroughput:
    shape = {"num_experts": 4, "num_topk": 2, "hidden": 128, "max_tokens_per_rank": 8}
    if path == "collective":
        shape |= {"num_experts": 5, "num_topk": 3, "hidden": 24}
    return moegen.HighThroughput(world, **{**shape, **options}, path=path)


def packed_rows(world: Any) -> moegen.HighThroughput:
    return rows(world, layout="packed", hidden=64)


def payloads(world: Any, path: str = "ipc", **options: Any) -> moegen.OneSided:
    shape = {"num_experts": 4, "num_topk": 2, "hidden": 128, "max_tokens_per_rank": 8, "payload_bytes": 272}
    return moegen.OneSided(world, **shape, path=path, **options)


def of_experts(made: moegen.ExpertParallel) -> dict[str, Call]:
    new, hidden = Maker(made.device), made.problem.hidden
    x, ids, weights = new(TOKENS, hidden), new.ids(), new(TOKENS, 2, dtype=F32)

    def dispatch(given: Tensors) -> Any:
        received = made.dispatch(given.pop("x"), given.pop("topk_idx"), given.pop("topk_weights"), **given)
        made.synchronize()
        return first_rows(received), made.combine(received.tokens.clone(), received.handle)

    received = made.dispatch(x, ids, weights)

    def combine(given: Tensors) -> Any:
        return made.combine(given.pop("y"), received.handle, given.pop("topk_weights"), **given)

    out = new.zeros(4, 8, hidden, dtype=BF16)
    reads = {"x": x, "topk_idx": ids, "topk_weights": weights, "num_tokens": new.one(TOKENS)}
    y, sums = received.tokens.clone(), new.zeros(TOKENS, hidden, dtype=BF16)
    return {
        "dispatch": Call(dispatch, reads, {"out": out, "total_counts": new.zeros(4)}),
        "combine": Call(combine, {"y": y, "topk_weights": weights}, {"out": sums}),
    }


def first_rows(received: moegen.Dispatched) -> list[torch.Tensor]:
    return [received.tokens[expert, :number] for expert, number in enumerate(received.counts.tolist())]


def of_rows(made: moegen.HighThroughput) -> dict[str, Call]:
    new, hidden, topk = Maker(made.device), made.problem.hidden, made.problem.num_topk
    x, ids, weights = new(TOKENS, hidden), new.ids(topk=topk), new(TOKENS, topk, dtype=F32)

    def dispatch(given: Tensors) -> Any:
        received = made.dispatch(given.pop("x"), given.pop("topk_idx"), given.pop("topk_weights"), **given)
        assert received.topk_weights is not None
        return received.tokens[:TOKENS], received.topk_weights[:TOKENS]

    received = made.dispatch(x, ids, weights)

    def again(given: Tensors) -> Any:
        return made.dispatch(given.pop("x"), handle=received.handle, **given).tokens[:TOKENS]

    def combine(given: Tensors) -> Any:
        return made.combine(given.pop("y"), received.handle, given.pop("topk_weights"), **given)

    y = received.tokens.masked_fill(torch.arange(made.max_rows, device=made.device)[:, None] >= TOKENS, 0)
    out, sums = new.zeros(made.max_rows, hidden, dtype=BF16), new.zeros(TOKENS, hidden, dtype=BF16)
    reads = {"x": x, "topk_idx": ids, "topk_weights": weights, "num_tokens": new.one(TOKENS)}
    of_combine = {"y": y, "topk_weights": new(made.max_rows, topk, dtype=F32), "bias": new(TOKENS, hidden)}
    return {
        "dispatch": Call(dispatch, reads, {"out": out, "total_counts": new.zeros(len(made.local_experts))}),
        "again": Call(again, {"x": x}, {"out": out}),
        "combine": Call(combine, of_combine, {"out": sums}),
        "layout": Call(lambda given: made.layout(given["topk_idx"]).token_in_rank, {"topk_idx": ids}, {}),
    }


def of_payloads(made: moegen.OneSided) -> dict[str, Call]:
    """Its payloads have as many bytes as those of other tests, whose kernels are theirs then."""
    new = Maker(made.device)
    parts = {"first": new(TOKENS, 32, dtype=torch.complex64), "second": new(TOKENS, 2, dtype=I32)}
    reads = {"topk_idx": new.ids(), **parts, "third": new(TOKENS, 2, dtype=F32), "num_tokens": new.one(TOKENS)}

    def dispatch(given: Tensors) -> Any:
        moved = [given.pop(name) for name in ("first", "second", "third")]
        received = made.dispatch(given.pop("topk_idx"), moved, **given)
        made.synchronize()
        return [plane[0, :TOKENS].clone() for plane in received.payloads], received.stats

    handle = made.dispatch(reads["topk_idx"], [reads[name] for name in ("first", "second", "third")]).handle

    def combine(given: Tensors) -> Any:
        return made.combine(given.pop("y"), handle, **given)

    sums = new.zeros(TOKENS, 128, dtype=BF16)
    return {
        "dispatch": Call(dispatch, {**reads, "stats": new(5, dtype=I32)}, {}),
        "combine": Call(combine, {"y": new(1, 8, 128)}, {"out": sums}),
    }


def of_functional(made: moegen.HighThroughput) -> dict[str, Call]:
    new, hidden = Maker(made.device), made.problem.hidden
    x, ids, weights = new(TOKENS, hidden), new.ids(), new(TOKENS, 2, dtype=F32)

    def dispatch(given: Tensors) -> Any:
        routed = functional.dispatch(made, given["x"], given["topk_idx"], given["topk_weights"])
        return routed.rows, routed.row_weights

    routed = functional.dispatch(made, x, ids, weights)
    return {
        "dispatch": Call(dispatch, {"x": x, "topk_idx": ids, "topk_weights": weights}, {}),
        "combine": Call(lambda given: functional.combine(made, given["y"], routed.handle), {"y": routed.rows}, {}),
    }


OBJECTS: dict[str, tuple[Callable[..., Any], Callable[[Any], dict[str, Call]]]] = {
    "experts": (experts, of_experts),
    "rows": (rows, of_rows),
    "payloads": (payloads, of_payloads),
    "functional": (rows, of_functional),
}


def calls_of(world: Any, name: str) -> dict[str, Call]:
    make, calls = OBJECTS[name]
    return calls(make(world))


def flat(results: Any) -> list[torch.Tensor]:
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for each in results if each is not None for tensor in flat(each)]


def assert_equal(one: Any, other: Any) -> None:
    for got, want in zip(flat(one), flat(other), strict=True):
        assert torch.equal(got, want)
