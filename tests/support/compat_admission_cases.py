# SPDX-License-Identifier: Apache-2.0
"""Tensors that compat's calls read by torch's operators, before kernels or in place of them: torch trusts them too."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import moegen
from moegen.compat import deep_ep, mooncake
from moegen.errors import HandleError, InputError
from support.object_kinds import KINDS, Data, Kind

BY_NAME = {kind.name: kind for kind in KINDS}


def freed(tensor: torch.Tensor) -> torch.Tensor:
    made = tensor.clone()
    made.untyped_storage().resize_(0)
    return made


def in_ranks(device: str, kind: Kind, work: Any) -> None:
    """Behind what was refused a round trip is right."""

    def rank(world: Any) -> None:
        made = kind.make(kind, world)
        work(made, Data(kind, world))
        kind.round_trip(made, world)

    moegen.LocalWorld(kind.ranks, device).run(rank)


def test_a_mask_of_mooncake_whose_memory_was_freed(device: str) -> None:
    def work(made: mooncake.Buffer, data: Data) -> None:
        zeros = torch._efficientzerotensor(data.active.shape, dtype=torch.int32, device=data.device)
        for active in (freed(data.active), zeros):
            with pytest.raises(InputError, match="active_ranks"):
                made.dispatch(data.x, data.ids, active, 8, data.kind.experts, -1, use_fp8=False)

    in_ranks(device, BY_NAME["mooncake.Buffer"], work)


def test_ids_and_weights_of_a_low_latency_combine_whose_memory_was_freed(device: str) -> None:
    kind = BY_NAME["deep_ep.Buffer-low-latency"]

    def work(made: deep_ep.Buffer, data: Data) -> None:
        rows, _, handle, _, _ = kind.dispatch(made, data)
        for name, given in (
            ("topk_idx", (freed(data.ids), data.weights)),
            ("topk_weights", (data.ids, freed(data.weights))),
        ):
            with pytest.raises(InputError, match=f"the memory of {name} was freed"):
                made.low_latency_combine(rows, *given, handle)
        kind.check(made.low_latency_combine(rows, data.ids, data.weights, handle)[0], data)

    in_ranks(device, kind, work)


def test_a_layout_of_the_normal_mode_whose_memory_was_freed(device: str) -> None:
    def work(made: deep_ep.Buffer, data: Data) -> None:
        per_rank, _, per_expert, in_rank, _ = made.get_dispatch_layout(data.ids, data.kind.experts)
        given = {"num_tokens_per_rank": per_rank, "topk_idx": data.ids, "topk_weights": data.weights}
        for other in ((freed(in_rank), per_expert), (in_rank, freed(per_expert)), (in_rank.int(), per_expert)):
            with pytest.raises(InputError, match=r"is_token_in_rank|num_tokens_per_expert"):
                made.dispatch(data.x, is_token_in_rank=other[0], num_tokens_per_expert=other[1], **given)

    in_ranks(device, BY_NAME["deep_ep.Buffer-normal"], work)


def test_a_handle_of_another_buffer(device: str) -> None:
    kind = BY_NAME["deep_ep.Buffer-normal"]

    def work(made: deep_ep.Buffer, data: Data) -> None:
        rows, _, _, _, handle, _ = kind.dispatch(made, data)
        other = deep_ep.Buffer(made.group, 4096)
        for call in (lambda: other.combine(rows, handle), lambda: other.dispatch(data.x, handle)):
            with pytest.raises(HandleError, match="another buffer"):
                call()
        other.destroy()

    in_ranks(device, kind, work)


def test_a_low_latency_handle_of_another_buffer(device: str) -> None:
    kind = BY_NAME["deep_ep.Buffer-low-latency"]

    def work(made: deep_ep.Buffer, data: Data) -> None:
        received, _, handle, _, _ = made.low_latency_dispatch(data.x, data.ids, 8, data.kind.experts, use_fp8=False)
        other = deep_ep.Buffer(made.group, low_latency_mode=True)
        with pytest.raises(HandleError, match="another Buffer"):
            other.low_latency_combine(received, data.ids, data.weights, handle)  # type: ignore[arg-type]
        other.destroy()

    in_ranks(device, kind, work)


@pytest.mark.parametrize("name", ["HighThroughput-packed", "functional"])
@pytest.mark.parametrize("weighted", [None, "yes", 1, torch.ones(1)])
def test_flags_are_flags(device: str, name: str, weighted: Any) -> None:
    kind = BY_NAME[name]

    def work(made: Any, data: Data) -> None:
        kept = kind.dispatch(made, data)
        combine = partial(moegen.functional.combine, made) if name == "functional" else made.combine
        with pytest.raises(InputError, match="weighted must be True or False"):
            combine(kept[0] if name == "functional" else kept.tokens, kept.handle, weighted=weighted)
        kind.check(kind.combine(made, data, kept), data)

    in_ranks(device, kind, work)
