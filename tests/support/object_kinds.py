# SPDX-License-Identifier: Apache-2.0
"""Every kind of object that users hold, each with a round trip in which experts change nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import moegen
from moegen import functional
from moegen.compat import deep_ep, flashinfer, mooncake, mscclpp
from moegen.runtime.worlds import RankWorld
from support.flashinfer_cases import in_step

MAX_TOKENS = 8
TOKENS = 5
PAYLOAD_BYTES = 64
"""Room for a token's payloads beside the token itself."""


class Data:
    """One rank's tokens: distinct experts, weights that are exact in bfloat16."""

    def __init__(self, kind: Kind, world: RankWorld) -> None:
        generator = torch.Generator(device="cpu").manual_seed(world.rank)
        cpu: dict[str, Any] = {"generator": generator, "device": "cpu"}
        x = torch.randn(TOKENS, kind.hidden, dtype=torch.float32, **cpu).bfloat16()
        ids = torch.rand(TOKENS, kind.experts, dtype=torch.float32, **cpu).topk(kind.topk, dim=1).indices
        weights = torch.full(ids.shape, 0.25, dtype=torch.float32, device="cpu")
        factors = torch.full((TOKENS, 1), 0.25 * kind.topk, dtype=torch.float32, device="cpu")
        if not kind.weighted:
            ranges = moegen.reference.expert_ranges(kind.experts, kind.ranks)
            holders = [((ids >= held.start) & (ids < held.stop)).any(dim=1) for held in ranges]
            factors = torch.stack(holders).sum(dim=0).float()[:, None]
        self.want = x.float() * factors
        self.kind, self.device = kind, world.device
        self.x, self.ids, self.weights = (part.to(world.device) for part in (x, ids, weights))
        self.payloads = [self.x, self.ids.int(), self.weights]
        if kind.topk > 2:  # the set of `collective_cases`, whose kernels are compiled anyway
            small = torch.zeros(TOKENS, 3, dtype=torch.uint8, device=world.device)
            self.payloads += [small, self.payloads[1][:, :3].contiguous()]
        self.active = torch.ones(kind.ranks, dtype=torch.int32, device=world.device)


@dataclass(frozen=True)
class Kind:
    """What it is made for, and its calls.

    Attributes:
        make: an object of a rank.
        dispatch: returns what `combine` needs, which returns the sums.
        weighted: whether sums are weighted; else each rank that holds a token's experts adds its row once.
    """

    name: str
    ranks: int
    experts: int
    topk: int
    hidden: int
    make: Callable[[Kind, RankWorld], Any]
    dispatch: Callable[[Any, Data], Any]
    combine: Callable[[Any, Data, Any], torch.Tensor]
    weighted: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def sizes(self) -> dict[str, int]:
        return {
            "num_experts": self.experts,
            "num_topk": self.topk,
            "hidden": self.hidden,
            "max_tokens_per_rank": MAX_TOKENS,
        }

    def round_trip(self, made: Any, world: RankWorld) -> None:
        """In step: what torch does on a GPU must not queue up behind a kernel that waits."""
        data = Data(self, world)
        in_step(world)
        kept = self.dispatch(made, data)
        in_step(world)
        self.check(self.combine(made, data, kept), data)

    def check(self, sums: torch.Tensor, data: Data) -> None:
        assert sums.dtype == torch.bfloat16
        assert (sums.cpu().float() - data.want).abs().max() <= data.want.abs().max() / 64


def _experts(path: str) -> dict[str, Callable[..., Any]]:
    return {
        "make": lambda kind, world: moegen.ExpertParallel(world, path=path, **kind.sizes),
        "dispatch": lambda made, data: made.dispatch(data.x, data.ids, data.weights),
        "combine": lambda made, data, kept: made.combine(kept.tokens, kept.handle),
    }


def _rows(path: str, layout: str, mode: str) -> dict[str, Any]:
    how = {"path": path, "layout": layout, "mode": mode}
    return {
        "make": lambda kind, world: moegen.HighThroughput(world, **how, **kind.sizes),
        "dispatch": lambda made, data: made.dispatch(data.x, data.ids, data.weights),
        "combine": lambda made, data, kept: made.combine(kept.tokens, kept.handle)[0],
        "weighted": layout == "packed",
    }


def _payloads(path: str, **how: Any) -> dict[str, Any]:
    return {
        "make": lambda kind, world: moegen.OneSided(
            world, path=path, payload_bytes=PAYLOAD_BYTES + 2 * kind.hidden, **how, **kind.sizes
        ),
        "dispatch": _dispatch_payloads,
        "combine": lambda made, data, kept: made.combine(kept[1], kept[0].handle),
        "weighted": False,
    }


def _dispatch_payloads(made: moegen.OneSided, data: Data) -> tuple[moegen.DispatchedPayloads, torch.Tensor]:
    received = made.dispatch(data.ids, data.payloads)
    return received, received.payloads[0].clone()  # when combine begins, the others may dispatch again


def _dispatch_moe(made: flashinfer.MoeAlltoAll, data: Data) -> tuple[list[torch.Tensor], torch.Tensor]:
    received = made.dispatch(data.payloads[1], data.payloads, MAX_TOKENS)
    return received, received[0].clone()


def _low_latency(made: deep_ep.Buffer, data: Data) -> Any:
    return made.low_latency_dispatch(data.x, data.ids, MAX_TOKENS, data.kind.experts, use_fp8=False)


def _low_latency_back(made: deep_ep.Buffer, data: Data, kept: Any) -> torch.Tensor:
    return made.low_latency_combine(kept[0], data.ids, data.weights, kept[2])[0]


def _normal(made: deep_ep.Buffer, data: Data) -> Any:
    per_rank, _, per_expert, in_rank, _ = made.get_dispatch_layout(data.ids, data.kind.experts)
    routing = (data.ids, data.weights)
    return made.dispatch(data.x, None, per_rank, None, in_rank, per_expert, *routing, config=deep_ep.Config(4))


def _intranode(made: mscclpp.Buffer, data: Data) -> Any:
    streams, config = (None, False, False), mscclpp.Config(4)
    per_rank, _, per_expert, in_rank, _ = made.get_dispatch_layout(data.ids, data.kind.experts, *streams)
    given = (data.x, None, data.ids, data.weights, per_rank, in_rank, per_expert, 0, None, None, 1)
    return made.intranode_dispatch(*given, config, *streams)


def _intranode_back(made: mscclpp.Buffer, data: Data, kept: Any) -> torch.Tensor:
    rows, _, _, _, _, prefix, _, received, src_idx, head, _ = kept
    streams, config = (None, False, False), mscclpp.Config(4)
    return made.intranode_combine(rows, None, src_idx, prefix, received, head, config, *streams)[0]


def _moe_alltoall(kind: Kind, world: RankWorld) -> flashinfer.MoeAlltoAll:
    mapping = flashinfer.Mapping(world.size, world.rank, tp_size=world.size, moe_ep_size=world.size)
    config = flashinfer.MnnvlConfig(comm_backend=world)
    made = flashinfer.MoeAlltoAll(
        mapping, MAX_TOKENS, kind.topk, kind.experts, hidden_size=kind.hidden, mnnvl_config=config
    )
    return made


KINDS = (
    Kind("ExpertParallel", 2, 4, 2, 64, **_experts("ipc")),
    Kind("ExpertParallel-collective", 1, 4, 2, 8, **_experts("collective")),
    Kind("HighThroughput-packed", 2, 6, 2, 64, **_rows("ipc", "packed", "capacity")),
    Kind("HighThroughput-token-exact", 2, 6, 2, 64, **_rows("ipc", "token", "exact")),
    Kind("HighThroughput-collective", 3, 10, 3, 24, **_rows("collective", "packed", "exact")),
    Kind(
        "functional", 2, 6, 2, 64,
        make=lambda kind, world: moegen.HighThroughput(world, layout="packed", **kind.sizes),
        dispatch=lambda made, data: functional.dispatch(made, data.x, data.ids, data.weights),
        combine=lambda made, data, kept: functional.combine(made, kept.rows, kept.handle),
    ),
    Kind("OneSided", 2, 4, 2, 64, **_payloads("ipc")),
    Kind("OneSided-collective", 2, 21, 4, 128, **_payloads("collective", exchange="padded")),
    Kind(
        "deep_ep.Buffer-low-latency", 2, 4, 2, 512,
        make=lambda kind, world: deep_ep.Buffer(world, 0, 4096, low_latency_mode=True, enable_shrink=True),
        dispatch=_low_latency, combine=_low_latency_back,
    ),
    Kind(
        "deep_ep.Buffer-normal", 2, 8, 4, 512, weighted=False,
        make=lambda kind, world: deep_ep.Buffer(world, 4096), dispatch=_normal,
        combine=lambda made, data, kept: made.combine(kept[0], kept[4], config=deep_ep.Config(4))[0],
    ),
    Kind(
        "deep_ep.ElasticBuffer", 2, 8, 4, 512, weighted=False,
        make=lambda kind, world: deep_ep.ElasticBuffer(world, num_max_tokens_per_rank=MAX_TOKENS, hidden=kind.hidden),
        dispatch=lambda made, data: made.dispatch(data.x, data.ids, data.weights, num_experts=data.kind.experts),
        combine=lambda made, data, kept: made.combine(kept[0], kept[3])[0],
    ),
    Kind(
        "mooncake.Buffer", 2, 4, 2, 512,
        make=lambda kind, world: mooncake.Buffer(world),
        dispatch=lambda made, data: made.dispatch(data.x, data.ids, data.active, MAX_TOKENS, 4, -1, use_fp8=False),
        combine=lambda made, data, kept: made.combine(kept[0], data.ids, data.weights, data.active, -1, kept[2])[0],
    ),
    Kind(
        "mscclpp.Buffer-low-latency", 2, 8, 4, 512,
        make=lambda kind, world: mscclpp.Buffer(world),
        dispatch=lambda made, data: made.low_latency_dispatch(data.x, data.ids, MAX_TOKENS, 8, False, False, False),
        combine=lambda made, data, kept: made.low_latency_combine(
            kept[0], data.ids, data.weights, kept[3], kept[4], MAX_TOKENS, 8, False, False, False
        )[0],
    ),
    Kind(
        "mscclpp.Buffer-intranode", 2, 8, 4, 512, weighted=False,
        make=lambda kind, world: mscclpp.Buffer(world), dispatch=_intranode, combine=_intranode_back,
    ),
    Kind(
        "flashinfer.MoeAlltoAll", 2, 4, 2, 64, weighted=False,
        make=_moe_alltoall, dispatch=_dispatch_moe,
        combine=lambda made, data, kept: made.combine(kept[1], MAX_TOKENS),
    ),
)  # fmt: skip
