# SPDX-License-Identifier: Apache-2.0
"""Bad input to `HighThroughput` is an exception that says what is allowed, before anything is launched, on every
device; zero tokens is not bad input.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import moegen
from moegen import errors
from support.ht_layer import RowsLayer, RowsShape, make
from support.layer import random_routing

SHAPES = {
    "token": RowsShape(1, 4, 2, 128, "token", max_tokens=8),
    "exact": RowsShape(1, 4, 2, 128, "token", max_tokens=8, mode="exact"),
    "packed": RowsShape(1, 4, 2, 128, "packed", "fp8", max_tokens=8, alignment=4),
    "given": RowsShape(1, 4, 2, 512, "token", "given", max_tokens=8),
    "ue8m0": RowsShape(1, 4, 2, 512, "token", "given_ue8m0", max_tokens=8),
}
FP8 = torch.float8_e4m3fn


class Rank:
    """One object of one rank, tensors to give it, and what it was given for three tokens."""

    def __init__(self, layer: RowsLayer) -> None:
        self.layer = layer
        self.object = layer.ranks[0]
        self.received = self.dispatch(self.x(), self.ids())
        self.y = self.zeros(self.received.tokens.shape[0], layer.shape.hidden)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.layer.device)

    def x(self, tokens: int = 3) -> Any:
        hidden = self.layer.shape.hidden
        if self.layer.shape.format == "given":
            return self.zeros(tokens, hidden, dtype=FP8), self.zeros(tokens, hidden // 128, dtype=torch.float32)
        if self.layer.shape.format == "given_ue8m0":
            return self.zeros(tokens, hidden, dtype=FP8), self.zeros(tokens, hidden // 512, dtype=torch.int32)
        return self.zeros(tokens, hidden)

    def ids(self, tokens: int = 3, fill: int = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self.zeros(tokens, 2, dtype=dtype) + fill

    def dispatch(self, *args: Any, **options: Any) -> moegen.DispatchedRows:
        return self.object.dispatch(*args, **options)

    def again(self, tokens: int = 3, **options: Any) -> moegen.DispatchedRows:
        return self.object.dispatch(self.x(tokens), handle=self.received.handle, **options)

    def combine(self, y: torch.Tensor | None = None, **options: Any) -> Any:
        return self.object.combine(self.y if y is None else y, self.received.handle, **options)


@pytest.fixture(scope="module")
def ranks(device: str) -> Iterator[dict[str, Rank]]:
    layers = {name: RowsLayer(shape, device) for name, shape in SHAPES.items()}
    yield {name: Rank(layer) for name, layer in layers.items()}
    for layer in layers.values():
        layer.destroy()


def int32(r: Rank, *shape: int) -> torch.Tensor:
    return r.zeros(*shape, dtype=torch.int32)


DISPATCHES: list[tuple[str, Callable[[Rank], object], type[Exception], str]] = [
    ("token", lambda r: r.dispatch([1], r.ids()), errors.InputError, "x is a torch tensor"),
    ("token", lambda r: r.dispatch(r.x().float(), r.ids()), errors.InputError, "x is torch.bfloat16"),
    ("token", lambda r: r.dispatch(r.x()[:, :64], r.ids()), errors.InputError, r"x is \[tokens, 128\]"),
    ("token", lambda r: r.dispatch(r.x().to("meta"), r.ids()), errors.InputError, "x is on meta"),
    ("token", lambda r: r.dispatch(r.x(9), r.ids(9)), errors.CapacityError, "max_tokens_per_rank=9"),
    ("token", lambda r: r.dispatch((r.x(), r.x()), r.ids()), errors.InputError, "takes bfloat16 tokens"),
    ("packed", lambda r: r.dispatch((r.x(), r.x()), r.ids()), errors.InputError, "takes bfloat16 tokens"),
    ("given", lambda r: r.dispatch(r.x()[0], r.ids()), errors.InputError, r"x is \(tokens, scales\)"),
    ("given", lambda r: r.dispatch((*r.x(), 1), r.ids()), errors.InputError, r"x is \(tokens, scales\)"),
    (
        "given",
        lambda r: r.dispatch((r.zeros(3, 512), r.x()[1]), r.ids()),
        errors.InputError,
        "x is torch.float8_e4m3fn",
    ),
    (
        "given",
        lambda r: r.dispatch((r.x()[0], r.x()[1].double()), r.ids()),
        errors.InputError,
        "scales is torch.float32",
    ),
    ("given", lambda r: r.dispatch((r.x()[0], r.x()[1][:2]), r.ids()), errors.InputError, r"scales is \[3, 4\]"),
    ("ue8m0", lambda r: r.dispatch((r.x()[0], r.x()[1].float()), r.ids()), errors.InputError, "scales is torch.int32"),
    ("ue8m0", lambda r: r.dispatch((r.x()[0], int32(r, 3, 4)), r.ids()), errors.InputError, r"scales is \[3, 1\]"),
    ("token", lambda r: r.dispatch(r.x()), errors.InputError, "topk_idx, or the handle"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(2)), errors.InputError, r"topk_idx is \[3, 2\]"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(dtype=torch.int16)), errors.InputError, "int64 or torch.int32"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), r.zeros(3, 1).float()), errors.InputError, r"weights is \[3, 2\]"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), r.zeros(3, 2)), errors.InputError, "torch.float32"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), num_tokens=int32(r, 2)), errors.InputError, "one int32"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), total_counts=int32(r, 3)), errors.InputError, r"counts is \[4\]"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), timeout=0), errors.InputError, "timeout is a number of seconds"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), max_rows=-1), errors.InputError, r"max_rows is an integer in 0\.\."),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), max_rows=3, out=r.x(2)), errors.InputError, "give one of them"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), out=r.x().float()), errors.InputError, "out is torch.bfloat16"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), out=r.zeros(3, 64)), errors.InputError, r"out is \[3, 128\]"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), out=r.zeros(3, 256)[:, ::2]), errors.InputError, "contiguous"),
    ("token", lambda r: r.dispatch(r.x(), r.ids(), out_scales=r.zeros(8, 1)), errors.InputError, "no scales"),
    ("packed", lambda r: r.dispatch(r.x(), r.ids(), out=r.x()), errors.InputError, "out is torch.float8_e4m3fn"),
    (
        "packed",
        lambda r: r.dispatch(r.x(), r.ids(), max_rows=5, out_scales=r.zeros(5, 1)),
        errors.InputError,
        "out_scales is torch.float32",
    ),
    (
        "packed",
        lambda r: r.dispatch(r.x(), r.ids(), max_rows=5, out_scales=r.zeros(4, 1).float()),
        errors.InputError,
        r"out_scales is \[5, 1\]",
    ),
    ("exact", lambda r: r.dispatch(r.x(), r.ids(), max_rows=3), errors.InputError, "exact.*makes its own"),
    ("exact", lambda r: r.dispatch(r.x(), r.ids(), out=r.x()), errors.InputError, "exact.*makes its own"),
    ("exact", lambda r: r.dispatch(r.x(), r.ids(), out_scales=r.x()), errors.InputError, "exact.*makes its own"),
]

BY_HANDLES: list[tuple[str, Callable[[Rank], object], type[Exception], str]] = [
    ("token", lambda r: r.dispatch(r.x(), handle="handle"), errors.HandleError, "got str"),
    ("token", lambda r: r.again(topk_idx=r.ids()), errors.InputError, "a handle or topk_idx"),
    ("token", lambda r: r.again(topk_weights=r.zeros(3, 2).float()), errors.InputError, "a handle or topk_weights"),
    ("token", lambda r: r.again(num_tokens=int32(r, 1)), errors.InputError, "a handle or num_tokens"),
    ("token", lambda r: r.again(total_counts=int32(r, 4)), errors.InputError, "a handle or total_counts"),
    ("token", lambda r: r.again(max_rows=3), errors.InputError, "a handle or max_rows"),
    ("token", lambda r: r.again(2), errors.InputError, "the handle is of 3 tokens; got 2"),
    ("token", lambda r: r.again(out=r.x()), errors.InputError, r"out is \[8, 128\]"),
    ("exact", lambda r: r.again(out=r.x(2)), errors.InputError, r"out is \[3, 128\]"),
    ("exact", lambda r: r.again(out_scales=r.x()), errors.InputError, "no scales"),
    ("packed", lambda r: r.again(out_scales=r.zeros(3, 1).float()), errors.InputError, "out_scales is"),
]

COMBINES: list[tuple[str, Callable[[Rank], object], type[Exception], str]] = [
    ("token", lambda r: r.object.combine(r.y, "handle"), errors.HandleError, "got str"),
    ("token", lambda r: r.object.combine(r.y, r.received), errors.HandleError, "got DispatchedRows"),
    ("token", lambda r: r.combine("y"), errors.InputError, "y is a torch tensor"),
    ("token", lambda r: r.combine(r.y.float()), errors.InputError, "y is torch.bfloat16"),
    ("token", lambda r: r.combine(r.y[:3]), errors.InputError, r"y is \[8, 128\]"),
    ("exact", lambda r: r.combine(r.zeros(8, 128)), errors.InputError, r"y is \[3, 128\]"),
    ("packed", lambda r: r.combine(r.y.to(FP8)), errors.InputError, "y is torch.bfloat16"),
    ("packed", lambda r: r.combine(topk_weights=r.zeros(3, 2).float()), errors.InputError, r"weights is \[28\]"),
    ("token", lambda r: r.combine(topk_weights=r.zeros(8, 2)), errors.InputError, "weights is torch.float32"),
    ("token", lambda r: r.combine(topk_weights=r.zeros(3, 2).float()), errors.InputError, r"weights is \[8, 2\]"),
    ("token", lambda r: r.combine(bias=[r.x()] * 3), errors.InputError, "at most 2 biases; got 3"),
    ("token", lambda r: r.combine(bias=r.x().float()), errors.InputError, "bias is torch.bfloat16"),
    ("token", lambda r: r.combine(bias=[r.x(), r.x(2)]), errors.InputError, r"bias is \[3, 128\]"),
    ("token", lambda r: r.combine(out=r.x().float()), errors.InputError, "out is torch.bfloat16"),
    ("token", lambda r: r.combine(out=r.x(2)), errors.InputError, r"out is \[3, 128\]"),
    ("token", lambda r: r.combine(out=r.zeros(3, 256)[:, ::2]), errors.InputError, "out is contiguous"),
    ("token", lambda r: r.combine(timeout=-1.0), errors.InputError, "timeout is a number of seconds"),
]


@pytest.mark.parametrize(("name", "call", "error", "says"), [*DISPATCHES, *BY_HANDLES, *COMBINES])
def test_call(
    ranks: dict[str, Rank], name: str, call: Callable[[Rank], object], error: type[Exception], says: str
) -> None:
    rank = ranks[name]
    with pytest.raises(error, match=says):
        call(rank)
    received = rank.dispatch(rank.x(), rank.ids())  # nothing was launched and nothing is broken
    assert received.counts.tolist() == [3, 0, 0, 0]


CONSTRUCTORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"layout": "expert"}, errors.InputError, "layout is one of token, packed"),
    ({"mode": "both"}, errors.InputError, "mode is one of capacity, exact"),
    ({"alignment": 0}, errors.InputError, r"alignment is an integer in 1\.\."),
    ({"num_sms": 0}, errors.InputError, r"num_sms is an integer in 1\.\."),
    ({"timeout": 0.0}, errors.InputError, "timeout is a number of seconds"),
    ({"first_epoch": 1}, errors.InputError, r"first_epoch is an integer in 2\.\."),
    ({"dtype": torch.float32}, errors.InputError, "dtype is one of torch.bfloat16, torch.float8_e4m3fn"),
    ({"scale_dtype": torch.int64}, errors.InputError, "scale_dtype is one of torch.float32, torch.int32"),
    ({"quantize": "int8"}, errors.InputError, "quantize is one of None, fp8"),
    ({"dtype": FP8, "quantize": "fp8"}, errors.InputError, "quantised already"),
    ({"max_tokens_per_rank": 0}, errors.InputError, r"max_tokens_per_rank is an integer in 1\.\."),
    ({"num_experts": 0}, errors.SpecError, "num_experts is num_ranks"),
    ({"num_topk": 5}, errors.SpecError, r"at most num_experts \(4\)"),
    ({"hidden": 12}, errors.SpecError, "multiple of 16 bytes"),
    ({"hidden": 65536}, errors.SpecError, "up to 65536"),
    ({"hidden": 64, "quantize": "fp8"}, errors.SpecError, "hidden is a multiple of 128"),
    ({"quantize": "fp8_ue8m0"}, errors.SpecError, "hidden is a multiple of 512"),
]


@pytest.mark.parametrize(("change", "error", "says"), CONSTRUCTORS)
def test_constructor(device: str, change: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments: dict[str, Any] = {
        "num_experts": 4,
        "num_topk": 2,
        "hidden": 128,
        "max_tokens_per_rank": 8,
        "layout": "token",
    }
    world = moegen.LocalWorld(1, device)
    with pytest.raises(error, match=says):
        world.run(lambda rank: moegen.HighThroughput(rank, **{**arguments, **change}))


@pytest.mark.parametrize(
    "change",
    [{"mode": "exact"}, {"alignment": 2}, {"max_tokens_per_rank": 9}, {"timeout": 3.0}, {"layout": "packed"}],
    ids=str,
)
def test_ranks_that_disagree(device: str, change: dict[str, Any]) -> None:
    """Each rank hears of it, and none hangs."""
    heard = []

    def work(world: Any) -> None:
        arguments: dict[str, Any] = {
            "num_experts": 4,
            "num_topk": 2,
            "hidden": 64,
            "max_tokens_per_rank": 8,
            **(change if world.rank else {}),
        }
        try:
            moegen.HighThroughput(world, **arguments)
        except errors.WorldError as error:
            heard.append(error)

    moegen.LocalWorld(2, device).run(work)
    assert len(heard) == 2


def test_handles_are_their_objects_own(device: str, ranks: dict[str, Rank]) -> None:
    mine, other = ranks["token"], RowsLayer(SHAPES["token"], device)
    with pytest.raises(errors.HandleError, match="another object"):
        other.ranks[0].combine(mine.y, mine.received.handle)
    with pytest.raises(errors.HandleError, match="another object"):
        other.ranks[0].dispatch(mine.x(), handle=mine.received.handle)
    for stolen in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            stolen(mine.received.handle)
    other.destroy()
    other.destroy()
    with pytest.raises(errors.DestroyedError):
        other.ranks[0].dispatch(mine.x(), mine.ids())
    with pytest.raises(errors.DestroyedError):
        other.ranks[0].combine(mine.y, mine.received.handle)


@pytest.mark.parametrize("name", SHAPES)
def test_zero_tokens(ranks: dict[str, Rank], name: str) -> None:
    rank = ranks[name]
    received = rank.dispatch(rank.x(0), rank.ids(0))
    assert received.counts.tolist() == [0] * 4
    combined, _ = rank.object.combine(rank.zeros(*received.tokens.shape), received.handle)
    assert combined.shape == (0, rank.layer.shape.hidden)


@pytest.mark.parametrize("fill", [4, -2])
@pytest.mark.parametrize("name", ["token", "packed", "exact"])
def test_ids_that_name_no_expert(ranks: dict[str, Rank], device: str, name: str, fill: int) -> None:
    """On a CPU they are seen before the launch; on a GPU the kernel reports them and leaves them out."""
    rank = ranks[name]
    ids = rank.ids()
    ids[1, 0] = fill
    if device == "cpu":
        with pytest.raises(errors.InputError, match=r"0\.\.3, or -1"):
            rank.dispatch(rank.x(), ids)
        return
    with pytest.raises(errors.InvalidRoutingError, match="token 1 selected"):  # noqa: PT012
        rank.dispatch(rank.x(), ids)
        rank.object.synchronize()
    rank.object.check()
    assert rank.dispatch(rank.x(), rank.ids()).counts.tolist() == [3, 0, 0, 0]


@pytest.mark.parametrize("mode", ["capacity", "exact"])
def test_a_rank_whose_id_names_no_expert_stays_in_step(device: str, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Only the kernel looks here, as on a GPU. The call is made whole; it is the next check that says so, once."""
    monkeypatch.setattr("moegen.checks.topk_idx", lambda owner, ids, *_: ids)
    layer = RowsLayer(RowsShape(2, 4, 2, 64, "token", max_tokens=8, mode=mode), device)
    good = random_routing(layer.shape, (5, 6), 1)  # type: ignore[arg-type]
    bad = random_routing(layer.shape, (5, 6), 1)  # type: ignore[arg-type]
    bad.ids[0][3, 1] = 4

    def work(world: Any) -> None:
        rank, inputs = layer.ranks[world.rank], layer.inputs(bad, world.rank)
        layer.step(world)
        received = rank.dispatch(inputs.x, inputs.ids, inputs.weights)
        if world.rank == 0:
            with pytest.raises(errors.InvalidRoutingError, match="token 3 selected"):
                rank.synchronize()
        layer.finish(world, received)

    layer.world.run(work)
    layer.verify(good, layer.round_trip(good))
    layer.destroy()


def test_ids_beyond_num_tokens_are_not_looked_at(ranks: dict[str, Rank]) -> None:
    rank = ranks["token"]
    ids = rank.ids()
    ids[2] = 1 << 40
    received = rank.dispatch(rank.x(), ids, num_tokens=int32(rank, 1) + 2)
    rank.object.synchronize()
    assert received.counts.tolist() == [2, 0, 0, 0]


def test_used_as_a_context(device: str) -> None:
    shape = SHAPES["packed"]

    def work(world: Any) -> list[int]:
        routing = random_routing(shape, (5,), 1, kind="one")  # type: ignore[arg-type]
        with make(world, shape) as layer:
            received = layer.dispatch(routing.x[0].to(device), routing.ids[0].to(device))
            layer.synchronize()
            counts: list[int] = received.counts.tolist()
        with pytest.raises(errors.DestroyedError):
            layer.check()
        return counts

    assert moegen.LocalWorld(1, device).run(work) == [[0, 5, 0, 0]]
