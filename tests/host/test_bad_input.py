# SPDX-License-Identifier: Apache-2.0
"""Bad input is an exception that says what is allowed, before anything is launched; zero tokens is not bad input."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.layer import Layer, Shape

import moegen
from moegen import errors

SHAPE = Shape(1, 4, 2, 64, 8)
ARGUMENTS: dict[str, Any] = {"num_experts": 4, "num_topk": 2, "hidden": 64, "max_tokens_per_rank": 8}


@pytest.fixture(scope="module")
def layer() -> Iterator[moegen.ExpertParallel]:
    made = Layer(SHAPE, "cpu")
    yield made.ranks[0]
    made.destroy()


def x(tokens: int = 3, hidden: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(tokens, hidden, dtype=dtype)


def ids(tokens: int = 3, fill: int = 0, topk: int = 2, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.full((tokens, topk), fill, dtype=dtype)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda e: e.dispatch(x(dtype=torch.float32), ids()), errors.InputError, "x is torch.bfloat16"),
        (lambda e: e.dispatch(x(hidden=32), ids()), errors.InputError, r"x is \[tokens, 64\]"),
        (lambda e: e.dispatch(x(9), ids(9)), errors.CapacityError, "max_tokens_per_rank=9"),
        (lambda e: e.dispatch(x(), ids(2)), errors.InputError, r"topk_idx is \[3, 2\]"),
        (lambda e: e.dispatch(x(), ids(topk=3)), errors.InputError, r"topk_idx is \[3, 2\]"),
        (lambda e: e.dispatch(x(), ids(fill=4)), errors.InputError, r"0\.\.3, or -1"),
        (lambda e: e.dispatch(x(), ids(fill=-2)), errors.InputError, r"0\.\.3, or -1"),
        (lambda e: e.dispatch(x(), ids(dtype=torch.int16)), errors.InputError, "int64 or torch.int32"),
        (lambda e: e.dispatch(x(), ids(), torch.ones(3, 1)), errors.InputError, r"topk_weights is \[3, 2\]"),
        (lambda e: e.dispatch(x(), ids(), torch.ones(3, 2).double()), errors.InputError, "torch.float32"),
        (lambda e: e.dispatch(x().to("meta"), ids()), errors.InputError, "x is on meta"),
        (lambda e: e.dispatch([1], ids()), errors.InputError, "x is a torch tensor"),
        (lambda e: e.dispatch(x(), ids(), num_tokens=torch.tensor([1, 2]).int()), errors.InputError, "one int32"),
        (lambda e: e.dispatch(x(), ids(), out=x()), errors.InputError, r"out is \[4, 8, 64\]"),
        (lambda e: e.combine(x(), "handle"), errors.HandleError, "takes the handle"),
    ],
)
def test_call(layer: moegen.ExpertParallel, call: Callable[[Any], None], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        call(layer)
    received = layer.dispatch(x(), ids())  # nothing was launched and nothing is broken
    assert received.counts.tolist() == [3, 0, 0, 0]
    with pytest.raises(errors.InputError, match=r"y is \[4, 8, 64\]"):
        layer.combine(x(), received.handle)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"num_experts": 0}, errors.SpecError, "num_experts is num_ranks"),
        ({"num_experts": 2000}, errors.SpecError, r"num_experts is .*\.\.1024"),
        ({"num_topk": 0}, errors.SpecError, r"num_topk is 1\.\.32"),
        ({"num_topk": 5}, errors.SpecError, r"at most num_experts \(4\)"),
        ({"hidden": 12}, errors.SpecError, "multiple of 16 bytes"),
        ({"hidden": 65536}, errors.SpecError, "up to 65536"),
        ({"max_tokens_per_rank": 0}, errors.InputError, r"max_tokens_per_rank is an integer in 1\.\."),
        ({"max_tokens_per_rank": 2**20 + 1}, errors.InputError, r"1\.\.1048576"),
        (
            {"max_tokens_per_rank": 2**20, "hidden": 32768, "num_experts": 1024, "num_topk": 32},
            errors.CapacityError,
            "no room",
        ),
        ({"dtype": torch.float16}, errors.InputError, "dtype is one of torch.bfloat16"),
        ({"layout": "packed"}, errors.InputError, "layout is one of expert"),
        ({"mode": "exact"}, errors.InputError, "mode is one of capacity"),
        ({"family": "ht"}, errors.InputError, "family is one of auto, ll"),
        ({"path": "rdma"}, errors.InputError, "path is one of auto, ipc"),
        ({"wire": "chunk"}, errors.InputError, "wire is one of"),
        ({"warp_groups": "many"}, errors.SpecError, "GROUPSxWARPS"),
        ({"warp_groups": "16x2"}, errors.SpecError, "at most 15 warp groups"),
        ({"warp_groups": "9x4"}, errors.SpecError, r"is 1\.\.32"),
        ({"num_sms": 0}, errors.InputError, "num_sms is an integer"),
        ({"timeout": 0}, errors.InputError, "timeout is a number of seconds"),
        ({"timeout": float("inf")}, errors.InputError, "timeout is a number of seconds"),
    ],
)
def test_constructor(change: dict[str, Any], error: type, says: str) -> None:
    world = moegen.LocalWorld(1)
    with pytest.raises(error, match=says):
        world.run(lambda rank: moegen.ExpertParallel(rank, **{**ARGUMENTS, **change}))


def test_teams_that_do_not_fit_into_shared_memory() -> None:
    from moegen.kernels.ll import MAX_SHARED_BYTES
    from moegen.kernels.problem import Problem
    from moegen.select import select

    with pytest.raises(errors.SpecError, match="fewer groups"):
        select(Problem(1, 1024, 32, 8, 2, warp_groups="32x1"))
    assert select(Problem(1, 1024, 32, 8, 2)).dispatch.shared_bytes <= MAX_SHARED_BYTES


def test_the_host_runs_no_more_blocks_than_it_can() -> None:
    world = moegen.LocalWorld(1)
    made = world.run(
        lambda rank: moegen.ExpertParallel(rank, **{**ARGUMENTS, "max_tokens_per_rank": 600}, num_sms=1024)
    )
    assert made[0].dispatch(x(), ids()).counts.tolist() == [3, 0, 0, 0]
    made[0].destroy()


def test_a_world_is_not_a_rank() -> None:
    with pytest.raises(errors.InputError, match="rank_world"):
        moegen.ExpertParallel(moegen.LocalWorld(2), **ARGUMENTS)
    with pytest.raises(errors.InputError, match="process group"):
        moegen.ExpertParallel("nccl", **ARGUMENTS)
    with pytest.raises(errors.InputError, match="init_process_group"):
        moegen.ExpertParallel(None, **ARGUMENTS)


def test_ranks_that_disagree() -> None:
    def work(rank: moegen.runtime.worlds.RankWorld) -> None:
        moegen.ExpertParallel(rank, **{**ARGUMENTS, "hidden": 64 + 8 * rank.rank})

    with pytest.raises(errors.WorldError, match="different arguments"):
        moegen.LocalWorld(2).run(work)


def test_zero_tokens_everywhere(layer: moegen.ExpertParallel) -> None:
    received = layer.dispatch(x(0), ids(0))
    assert received.counts.tolist() == [0, 0, 0, 0]
    assert layer.combine(received.tokens, received.handle).shape == (0, 64)


def test_a_rank_that_cannot_load_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from moegen.runtime import agreement

    load = agreement.load

    def load_on_rank_0(spec: Any, device: torch.device) -> Any:
        if threading.current_thread().name == "moegen-rank-1":
            raise OSError("the cache is on a file system without execution")
        return load(spec, device)

    said: dict[int, BaseException] = {}

    def work(rank: moegen.runtime.worlds.RankWorld) -> None:
        try:
            moegen.ExpertParallel(rank, **ARGUMENTS)
        except Exception as error:
            said[rank.rank] = error

    monkeypatch.setattr(agreement, "load", load_on_rank_0)
    moegen.LocalWorld(2).run(work)
    assert isinstance(said[1], OSError)
    assert isinstance(said[0], errors.WorldError)
    assert "rank 1 could not load its kernels: OSError" in str(said[0])


def test_ids_of_tokens_that_do_not_count(layer: moegen.ExpertParallel) -> None:
    padded = ids(3)
    padded[2] = 12345
    received = layer.dispatch(x(3), padded, num_tokens=torch.tensor([2], dtype=torch.int32))
    assert received.counts.tolist() == [2, 0, 0, 0]


def test_the_cpu_has_no_index() -> None:
    assert moegen.LocalWorld(1, "cpu:0").device == torch.device("cpu")


def test_handles_are_not_copied(layer: moegen.ExpertParallel) -> None:
    import copy

    with pytest.raises(TypeError, match="cannot be pickled"):
        copy.copy(layer.dispatch(x(), ids()).handle)
