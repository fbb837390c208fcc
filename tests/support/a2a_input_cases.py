# SPDX-License-Identifier: Apache-2.0
"""Bad input to `OneSided` is an exception that says what is allowed, before anything is launched, on every device; zero
tokens is not bad input.
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
from support.a2a_data import PayloadShape, random_batch
from support.a2a_layer import PayloadLayer, arguments, make

SHAPE = PayloadShape(1, 4, 2, 128, "layer", max_tokens=8)
"""Payloads of 256, 8 and 8 bytes."""
FP8 = torch.float8_e4m3fn


class Rank:
    """One object of one rank, tensors to give it, and the handle of three tokens."""

    def __init__(self, layer: PayloadLayer) -> None:
        self.layer = layer
        self.object = layer.ranks[0]
        self.handle = self.dispatch().handle

    def zeros(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.layer.device)

    def ids(self, tokens: int = 3, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return self.zeros(tokens, 2, dtype=dtype)

    def payloads(self, tokens: int = 3) -> list[torch.Tensor]:
        return [self.zeros(tokens, width, dtype=dtype) for width, dtype in SHAPE.columns]

    def dispatch(self, ids: Any = None, payloads: Any = None, **options: Any) -> moegen.DispatchedPayloads:
        ids = self.ids() if ids is None else ids
        return self.object.dispatch(ids, self.payloads() if payloads is None else payloads, **options)

    def y(self, slots: int = 8, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return self.zeros(1, slots, SHAPE.hidden, dtype=dtype)

    def combine(self, y: Any = None, handle: Any = None, **options: Any) -> torch.Tensor:
        return self.object.combine(self.y() if y is None else y, handle or self.handle, **options)


@pytest.fixture(scope="module")
def rank(device: str) -> Iterator[Rank]:
    layer = PayloadLayer(SHAPE, device)
    yield Rank(layer)
    layer.destroy()


def int32(r: Rank, *shape: int) -> torch.Tensor:
    return r.zeros(*shape, dtype=torch.int32)


Case = tuple[Callable[[Rank], object], type[Exception], str]
LIST = r"payloads is a list of 1 to 16 tensors \[tokens, columns\]"

DISPATCHES: list[Case] = [
    (lambda r: r.dispatch([[0, 1]]), errors.InputError, "topk_idx is a torch tensor"),
    (lambda r: r.dispatch(r.ids(2)), errors.InputError, r"topk_idx is \[3, 2\]"),
    (lambda r: r.dispatch(r.ids()[:, :1]), errors.InputError, r"topk_idx is \[3, 2\]"),
    (lambda r: r.dispatch(r.ids(dtype=torch.int16)), errors.InputError, "int64 or torch.int32"),
    (lambda r: r.dispatch(r.ids().to("meta")), errors.InputError, "topk_idx is on meta"),
    (lambda r: r.dispatch(None, []), errors.InputError, LIST),
    (lambda r: r.dispatch(None, [r.zeros(3, 1)] * 17), errors.InputError, LIST),
    (lambda r: r.dispatch(None, r.zeros(3, 128)), errors.InputError, LIST),
    (lambda r: r.dispatch(None, 7), errors.InputError, LIST),
    (lambda r: r.dispatch(None, [[1]]), errors.InputError, r"payloads\[0\] is a torch tensor"),
    (lambda r: r.dispatch(None, [r.zeros(3, 1), None]), errors.InputError, r"payloads\[1\] is a torch tensor"),
    (lambda r: r.dispatch(None, [r.zeros(3)]), errors.InputError, r"payloads\[0\] is \[3 tokens, 1 or more columns\]"),
    (lambda r: r.dispatch(None, [r.zeros(3, 1, 1)]), errors.InputError, r"payloads\[0\] is \[3 tokens, 1 or more"),
    (lambda r: r.dispatch(None, [r.zeros(3, 0)]), errors.InputError, r"payloads\[0\] is \[3 tokens, 1 or more"),
    (lambda r: r.dispatch(None, [r.zeros(3, 1), r.zeros(2, 1)]), errors.InputError, r"payloads\[1\] is \[3 tokens"),
    (lambda r: r.dispatch(None, [r.zeros()]), errors.InputError, r"payloads\[0\] is \["),
    (lambda r: r.dispatch(None, [r.zeros(3, 1).to("meta")]), errors.InputError, r"payloads\[0\] is on meta"),
    (lambda r: r.dispatch(None, [r.zeros(3, 137)]), errors.CapacityError, "274 bytes per token.*payload_bytes=274"),
    (lambda r: r.dispatch(r.ids(9), r.payloads(9)), errors.CapacityError, "9 tokens are more than max_tokens=8"),
    (lambda r: r.dispatch(max_tokens=2), errors.CapacityError, "3 tokens are more than max_tokens=2"),
    (lambda r: r.dispatch(max_tokens=0), errors.InputError, r"max_tokens is an integer in 1\.\.8"),
    (lambda r: r.dispatch(max_tokens=9), errors.InputError, r"max_tokens is an integer in 1\.\.8"),
    (lambda r: r.dispatch(max_tokens=3.0), errors.InputError, r"max_tokens is an integer in 1\.\.8"),
    (lambda r: r.dispatch(num_tokens=int32(r, 2)), errors.InputError, "one int32"),
    (lambda r: r.dispatch(num_tokens=r.ids(1)), errors.InputError, "num_tokens is torch.int32"),
    (lambda r: r.dispatch(num_tokens=3), errors.InputError, "num_tokens is a torch tensor"),
    (lambda r: r.dispatch(unused_ids=(3, -1)), errors.InputError, r"the index of unused_ids is an integer in 0\.\.2"),
    (lambda r: r.dispatch(unused_ids=(-1, -1)), errors.InputError, r"the index of unused_ids is an integer in 0\.\.2"),
    (lambda r: r.dispatch(unused_ids=(1, 2**31)), errors.InputError, "the value of unused_ids is an integer"),
    (
        lambda r: r.dispatch(unused_ids=(2, 0)),
        errors.InputError,
        r"payload of int32 ids; payloads\[2\] is torch.float32",
    ),
    (lambda r: r.dispatch(unused_ids=1), errors.InputError, "unused_ids is"),
    (lambda r: r.dispatch(stats=r.zeros(3)), errors.InputError, "stats is torch.int32"),
    (lambda r: r.dispatch(stats=int32(r, 3, 1)), errors.InputError, r"stats is a contiguous \[1\.\.1024\]"),
    (lambda r: r.dispatch(stats=int32(r, 0)), errors.InputError, r"stats is a contiguous \[1\.\.1024\]"),
    (lambda r: r.dispatch(stats=int32(r, 1025)), errors.InputError, r"stats is a contiguous \[1\.\.1024\]"),
    (lambda r: r.dispatch(stats=int32(r, 6)[::2]), errors.InputError, r"stats is a contiguous \[1\.\.1024\]"),
    (lambda r: r.dispatch(timeout=0), errors.InputError, "timeout is a number of seconds"),
    (lambda r: r.dispatch(active_ranks=2), errors.InputError, r"active_ranks is an integer in 1\.\.1"),
]

COMBINES: list[Case] = [
    (lambda r: r.combine(None, "handle"), errors.HandleError, "got str"),
    (lambda r: r.combine(None, r.dispatch()), errors.HandleError, "got DispatchedPayloads"),
    (lambda r: r.combine("y"), errors.InputError, "y is a torch tensor"),
    (lambda r: r.combine(r.y(dtype=torch.float64)), errors.InputError, "y is torch.bfloat16 or"),
    (lambda r: r.combine(r.y(7)), errors.InputError, r"y is \[1, 8, 128\]"),
    (lambda r: r.combine(r.y()[0]), errors.InputError, r"y is \[1, 8, 128\]"),
    (lambda r: r.combine(r.y().to("meta")), errors.InputError, "y is on meta"),
    (lambda r: r.combine(r.y(dtype=torch.float32)), errors.CapacityError, "512 bytes.*made for 256.*torch.float32"),
    (lambda r: r.combine(out_dtype=FP8), errors.InputError, "out_dtype is one of"),
    (lambda r: r.combine(out_dtype="float32"), errors.InputError, "out_dtype is one of"),
    (lambda r: r.combine(out=r.zeros(3, 128, dtype=FP8)), errors.InputError, "out is torch.bfloat16 or"),
    (
        lambda r: r.combine(out=r.zeros(3, 128), out_dtype=torch.float32),
        errors.InputError,
        "out is torch.float32; got torch.bfloat16",
    ),
    (lambda r: r.combine(out=r.zeros(2, 128)), errors.InputError, r"out is \[3, 128\]"),
    (lambda r: r.combine(out=r.zeros(3, 256)[:, ::2]), errors.InputError, "out is contiguous"),
    (lambda r: r.combine(out=r.zeros(385)[1:].view(3, 128)), errors.InputError, "out is contiguous and 16-byte"),
    (lambda r: r.object.expert_rows(), errors.InputError, "make it with expert_rows=True"),
    (lambda r: r.object.expert_rows(9), errors.InputError, r"max_tokens is an integer in 1\.\.8"),
    (lambda r: r.combine(timeout=-1.0), errors.InputError, "timeout is a number of seconds"),
]


@pytest.mark.parametrize(("call", "error", "says"), [*DISPATCHES, *COMBINES])
def test_call(rank: Rank, call: Callable[[Rank], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(rank)
    received = rank.dispatch()  # nothing was launched and nothing is broken
    assert received.counts.tolist() == [3]
    assert rank.combine(handle=received.handle).tolist() == [[0.0] * 128] * 3


CONSTRUCTORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_experts": 0}, errors.SpecError, "num_experts is num_ranks"),
    ({"num_topk": 5}, errors.SpecError, r"at most num_experts \(4\)"),
    ({"num_topk": 0}, errors.InputError, "num_topk is"),
    ({"max_tokens_per_rank": 0}, errors.InputError, r"max_tokens_per_rank is an integer in 1\.\."),
    ({"payload_bytes": 0}, errors.InputError, r"payload_bytes is an integer in 1\.\."),
    ({"payload_bytes": 271}, errors.CapacityError, "272 bytes per token.*payload_bytes=272"),
    ({"payloads": ((1, torch.int8),) * 17}, errors.MoegenError, "16 payloads"),
    ({"payloads": ((0, torch.int8),)}, errors.SpecError, r"1\.\.65536 bytes per token"),
    ({"payloads": ((65537, torch.int8),), "payload_bytes": 1 << 17}, errors.SpecError, r"1\.\.65536 bytes per token"),
    ({"hidden": 12}, errors.SpecError, "multiple of 16 bytes"),
    ({"hidden": 8, "dtype": FP8}, errors.SpecError, "multiple of 16 bytes"),
    ({"hidden": 65536}, errors.SpecError, "up to 65536"),
    ({"dtype": torch.float64}, errors.InputError, "dtype is one of torch.bfloat16, torch.float16, torch.float32"),
    ({"warp_groups": "1x64"}, errors.SpecError, "warp groups"),
    ({"num_sms": 0}, errors.InputError, r"num_sms is an integer in 1\.\."),
    ({"timeout": 0.0}, errors.InputError, "timeout is a number of seconds"),
    ({"first_epoch": 1}, errors.InputError, r"first_epoch is an integer in 2\.\."),
]


@pytest.mark.parametrize(("change", "error", "says"), CONSTRUCTORS)
def test_constructor(device: str, change: dict[str, Any], error: type[Exception], says: str) -> None:
    world = moegen.LocalWorld(1, device)
    with pytest.raises(error, match=says):
        world.run(lambda rank: moegen.OneSided(rank, **arguments(SHAPE, **change)))


DIFFERENT = [
    {"max_tokens_per_rank": 9},
    {"payload_bytes": 300},
    {"timeout": 3.0},
    {"hidden": 64},
    {"payloads": ((1, torch.int8),)},
    {"first_epoch": 7},
    {"expert_rows": True},
]


@pytest.mark.parametrize("change", DIFFERENT, ids=str)
def test_ranks_that_disagree(device: str, change: dict[str, Any]) -> None:
    """Each rank hears of it, and none hangs."""
    heard = []
    shape = PayloadShape(2, 4, 2, 128, "layer", max_tokens=8)

    def work(world: Any) -> None:
        try:
            make(world, shape, **(change if world.rank else {}))
        except errors.WorldError as error:
            heard.append(error)

    moegen.LocalWorld(2, device).run(work)
    assert len(heard) == 2


def test_ranks_whose_payloads_differ(device: str) -> None:
    """In the first dispatch of a set, when its kernel is loaded."""
    shape = PayloadShape(2, 4, 2, 128, "layer", max_tokens=8)
    layer = PayloadLayer(shape, device)
    heard = []

    def work(world: Any) -> None:
        batch = random_batch(shape, [1, 1], 1, columns=((3 + world.rank, torch.int8),))
        try:
            layer.ranks[world.rank].dispatch(batch.ids[0].to(device), [batch.payloads[0][0].to(device)])
        except errors.WorldError as error:
            heard.append(error)

    layer.world.run(work)
    assert len(heard) == 2
    layer.round_trip(random_batch(shape, [3, 2], 2))
    layer.destroy()


def test_handles_are_their_objects_own(device: str, rank: Rank) -> None:
    other = PayloadLayer(SHAPE, device)
    with pytest.raises(errors.HandleError, match="another OneSided"):
        other.ranks[0].combine(rank.y(), rank.handle)
    for stolen in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            stolen(rank.handle)
    other.destroy()
    other.destroy()
    with pytest.raises(errors.DestroyedError):
        other.ranks[0].dispatch(rank.ids(), rank.payloads())
    with pytest.raises(errors.DestroyedError):
        other.ranks[0].combine(rank.y(), rank.handle)


def test_memory_for_rows(device: str) -> None:
    """It is always the same, and has room for rows that are no longer than the object's."""
    layer = PayloadLayer(PayloadShape(1, 4, 2, 128, "layer", "pulled", max_tokens=8), device)
    rank = layer.ranks[0]
    whole, part = rank.expert_rows(), rank.expert_rows(3, FP8)
    assert (whole.shape, whole.dtype) == ((1, 8, 128), torch.bfloat16)
    assert (part.shape, part.dtype) == ((1, 3, 128), FP8)
    assert whole.data_ptr() == part.data_ptr() == rank.expert_rows().data_ptr()
    with pytest.raises(errors.InputError, match=r"torch.float32 are longer.*dtype=torch.float32"):
        rank.expert_rows(dtype=torch.float32)
    with pytest.raises(errors.InputError, match="dtype is one of"):
        rank.expert_rows(dtype=torch.int8)
    layer.destroy()
    with pytest.raises(errors.DestroyedError):
        rank.expert_rows()


def test_zero_tokens(rank: Rank) -> None:
    received = rank.dispatch(rank.ids(0), rank.payloads(0), max_tokens=1)
    assert received.counts.tolist() == [0]
    assert [plane.shape[:2] for plane in received.payloads] == [(1, 1)] * 3
    assert rank.combine(rank.y(1), received.handle).shape == (0, SHAPE.hidden)


@pytest.mark.parametrize("fill", [4, -2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_that_name_no_expert(rank: Rank, device: str, fill: int, dtype: torch.dtype) -> None:
    """On a CPU they are seen before the launch; on a GPU the kernel reports them and leaves them out."""
    ids = rank.ids(dtype=dtype)
    ids[1, 0] = fill
    if device == "cpu":
        with pytest.raises(errors.InputError, match=r"0\.\.3, or -1"):
            rank.dispatch(ids)
        return
    with pytest.raises(errors.InvalidRoutingError, match="token 1 selected"):  # noqa: PT012
        rank.dispatch(ids)
        rank.object.synchronize()
    rank.object.check()
    assert rank.dispatch().counts.tolist() == [3]


def test_a_rank_whose_id_names_no_expert_stays_in_step(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the kernel looks here, as on a GPU. The call is made whole; it is the next check that says so, once."""
    monkeypatch.setattr("moegen.checks.topk_idx", lambda owner, ids, *_: ids)
    shape = PayloadShape(2, 4, 2, 64, "layer", max_tokens=8)
    layer = PayloadLayer(shape, device)
    bad = random_batch(shape, (5, 6), 1)
    bad.ids[0][3] = torch.tensor([4, 1 << 40])

    def work(world: Any) -> torch.Tensor:
        rank, ids = layer.ranks[world.rank], bad.ids[world.rank].to(device)
        payloads = [part.to(device) for part in bad.payloads[world.rank]]
        y = torch.ones(2, 8, 64, dtype=torch.bfloat16, device=device)
        layer.step(world)
        received = rank.dispatch(ids, payloads)
        if world.rank == 0:
            with pytest.raises(errors.InvalidRoutingError, match="token 3 selected"):
                rank.synchronize()
        layer.step(world)
        combined = rank.combine(y, received.handle)
        rank.synchronize()
        return combined.cpu()

    combined = layer.world.run(work)[0]
    assert (combined[3] == 0).all()
    assert (combined[:3] > 0).all()
    layer.round_trip(random_batch(shape, (5, 6), 1))
    layer.destroy()


def test_ids_beyond_num_tokens_are_not_looked_at(rank: Rank) -> None:
    ids = rank.ids()
    ids[2] = 1 << 40
    received = rank.dispatch(ids, num_tokens=int32(rank, 1) + 2)
    rank.object.synchronize()
    assert received.counts.tolist() == [2]


def test_used_as_a_context(device: str) -> None:
    def work(world: Any) -> list[int]:
        batch = random_batch(SHAPE, (5,), 1, "one")
        with make(world, SHAPE) as layer:
            received = layer.dispatch(batch.ids[0].to(device), [part.to(device) for part in batch.payloads[0]])
            layer.synchronize()
            counts: list[int] = received.counts.tolist()
        with pytest.raises(errors.DestroyedError):
            layer.check()
        return counts

    assert moegen.LocalWorld(1, device).run(work) == [[5]]
