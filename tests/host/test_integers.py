# SPDX-License-Identifier: Apache-2.0
"""Integers are integers, numpy's too; a float or a bool that equals one is refused and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.call_arguments import Maker, experts, in_world, payloads, rows

import moegen
from moegen.compat import deep_ep, flashinfer, mooncake, mscclpp
from moegen.errors import InputError

SHAPE = {"num_experts": 4, "num_topk": 2, "hidden": 64, "max_tokens_per_rank": 8}
CONSTRUCTORS: dict[Any, dict[str, int]] = {
    moegen.ExpertParallel: {**SHAPE, "slots": 1, "num_sms": 4, "first_epoch": 2},
    moegen.HighThroughput: {**SHAPE, "alignment": 1, "num_sms": 4, "first_epoch": 2},
    moegen.OneSided: {**SHAPE, "hidden": 128, "payload_bytes": 272, "num_sms": 4, "first_epoch": 2},
}
EACH = [(cls, name) for cls, shape in CONSTRUCTORS.items() for name in shape]


@pytest.mark.parametrize(("cls", "name"), EACH, ids=lambda value: getattr(value, "__name__", value))
def test_constructors(cls: Any, name: str) -> None:
    """Also where the wrong one comes first."""
    right = CONSTRUCTORS[cls]

    def work(world: Any) -> None:
        for wrong in (float(right[name]), True, np.bool_(True), str(right[name])):
            with pytest.raises(InputError, match=f"{name} (is|must be) an integer"):
                cls(world, **{**right, name: wrong})

    in_world("cpu", work)


@pytest.mark.parametrize("cls", CONSTRUCTORS)
def test_numpys_integers(cls: Any) -> None:
    def work(world: Any) -> None:
        with cls(world, **{name: np.int32(value) for name, value in CONSTRUCTORS[cls].items()}) as made:
            made.warmup()
            assert all(type(getattr(made.problem, name)) is int for name in ("num_experts", "num_topk", "hidden"))

    in_world("cpu", work)
    assert moegen.LocalWorld(np.int64(1)).size == 1  # type: ignore[arg-type]


def test_worlds() -> None:
    for wrong in (1.0, True, "1", None, 0, 1025, 2**62):
        with pytest.raises(InputError, match="num_ranks is an integer"):
            moegen.LocalWorld(wrong)  # type: ignore[arg-type]


def test_calls() -> None:
    def work(world: Any) -> None:
        new = Maker("cpu")
        x, ids, parts = new(3, 128), new.ids(), [new(3, 128), new.zeros(3, 2), new.zeros(3, 2)]
        many, one = rows(world), payloads(world)
        received = many.dispatch(x, ids, max_rows=np.int64(8), num_sms=np.int32(4))
        assert many.handle_of(received.handle.memory, np.int64(3), np.int64(8)).rows == 8
        sent = one.dispatch(ids, parts, max_tokens=np.int64(8), unused_ids=(np.int64(1), np.int64(-1)), active_ranks=1)
        assert sent.payloads[1][0, 3:].eq(-1).all()
        for wrong in (8.0, True):
            calls: list[Callable[[], object]] = [
                lambda wrong=wrong: many.dispatch(x, ids, max_rows=wrong),  # type: ignore[misc]
                lambda wrong=wrong: many.dispatch(x, ids, num_sms=wrong),  # type: ignore[misc]
                lambda wrong=wrong: many.combine(received.tokens, received.handle, num_sms=wrong),  # type: ignore[misc]
                lambda wrong=wrong: many.handle_of(received.handle.memory, wrong, 8),  # type: ignore[misc]
                lambda wrong=wrong: many.handle_of(received.handle.memory, 3, wrong),  # type: ignore[misc]
                lambda wrong=wrong: one.dispatch(ids, parts, max_tokens=wrong),  # type: ignore[misc]
                lambda wrong=wrong: one.dispatch(ids, parts, unused_ids=(wrong, 0)),  # type: ignore[misc]
                lambda wrong=wrong: one.dispatch(ids, parts, unused_ids=(1, wrong)),  # type: ignore[misc]
                lambda wrong=wrong: one.dispatch(ids, parts, active_ranks=wrong),  # type: ignore[misc]
                lambda wrong=wrong: one.expert_rows(wrong),  # type: ignore[misc]
                lambda wrong=wrong: payloads(world, payloads=[(wrong, torch.uint8)]),  # type: ignore[misc]
            ]
            for call in calls:
                with pytest.raises(InputError, match="an integer"):
                    call()
        with pytest.raises(InputError, match="timeout is a number of seconds"):
            experts(world, timeout=True)

    in_world("cpu", work)


def test_what_stands_in_for_other_libraries() -> None:
    def work(world: Any) -> None:
        x, ids = torch.zeros(3, 64, dtype=torch.bfloat16), torch.tensor([[0, 1]] * 3)
        first = torch.ones(1, dtype=torch.int32)
        low, mooncakes, elastic = deep_ep.Buffer(world), mooncake.Buffer(world), deep_ep.ElasticBuffer(world)
        other = mscclpp.Buffer(world)
        mapping = flashinfer.Mapping(1, 0)
        for wrong in (8.0, True):
            calls: list[Callable[[Any], object]] = [
                lambda n: deep_ep.Buffer(world, num_nvl_bytes=n),
                lambda n: deep_ep.Buffer(world, num_rdma_bytes=n),
                lambda n: deep_ep.Buffer.set_num_sms(n),
                lambda n: deep_ep.Config(n),
                lambda n: deep_ep.ElasticBuffer(world, num_max_tokens_per_rank=n),
                lambda n: low.low_latency_dispatch(x, ids, n, 8),
                lambda n: low.low_latency_dispatch(x, ids, 8, n),
                lambda n: low.get_dispatch_layout(ids, n),
                lambda n: elastic.dispatch(x, ids, num_experts=n, num_max_tokens_per_rank=8),
                lambda n: elastic.dispatch(x, ids, num_experts=8, num_max_tokens_per_rank=n),
                lambda n: mooncakes.dispatch(x, ids, first, n, 8, -1),
                lambda n: mooncakes.dispatch(x, ids, first, 8, n, -1),
                lambda n: mooncakes.dispatch(x, ids, first, 8, 8, n),
                lambda n: mscclpp.Buffer(world, num_nvl_bytes=n),
                lambda n: other.low_latency_dispatch(x, ids, n, 8, False, False, False),
                lambda n: flashinfer.MoeAlltoAll(mapping, n, 2, 8, hidden_size=64),
                lambda n: flashinfer.MoeAlltoAll(mapping, 8, n, 8, hidden_size=64),
                lambda n: flashinfer.MoeAlltoAll(mapping, 8, 2, n, hidden_size=64),
                lambda n: flashinfer.MoeAlltoAll(mapping, 8, 2, 8, hidden_size=n),
            ]
            for call in calls:
                with pytest.raises(InputError, match="an integer"):
                    call(wrong)

    in_world("cpu", work)
