# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's one-sided calls as TensorRT-LLM, vLLM, SGLang and a user of the functional ones make them, between
processes of a gloo group.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.processes import Processes

from moegen.compat.flashinfer import mapping, mnnvl, trtllm_moe_alltoall
from moegen.compat.flashinfer.trtllm_moe_alltoall import MoeAlltoAll, moe_a2a_get_workspace_size_per_rank

RANKS, EXPERTS, TOPK, HIDDEN, MAX_TOKENS = 2, 8, 4, 512, 16

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def group() -> Iterator[Processes]:
    processes = Processes(RANKS, "cpu")
    yield processes
    processes.stop()


class Hooks(mnnvl.CommBackend):
    """As vLLM and SGLang write them around a group."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def Get_rank(self) -> int:  # noqa: N802
        return int(self._group.rank())

    def Get_size(self) -> int:  # noqa: N802
        return int(self._group.size())

    def allgather(self, data: Any) -> list[Any]:
        gathered = [None] * self.Get_size()
        torch.distributed.all_gather_object(gathered, data, group=self._group)
        return gathered

    def bcast(self, data: Any, root: int) -> Any:
        raise NotImplementedError

    def barrier(self) -> None:
        torch.distributed.barrier(group=self._group)

    def Split(self, color: int, key: int) -> Hooks:  # noqa: N802
        return self


def routed(rank: int, turn: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rank 1 has no tokens in turn 1."""
    generator = torch.Generator().manual_seed(10 * turn + rank)
    x = torch.randn((5 + 3 * rank) * (rank != turn), HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(len(x), EXPERTS, generator=generator).topk(TOPK, dim=1).indices.int()
    return x, ids, torch.rand(len(x), TOPK, generator=generator)


SLOTS = (8, 5)
"""Per turn: the most that any rank has."""


def weighted(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, rank: int) -> torch.Tensor:
    """What experts that change nothing give: a row for each of `x` [rows, hidden]."""
    local = EXPERTS // RANKS
    factor = (weights * (ids // local == rank)).sum(dim=1, keepdim=True)
    return torch.where(factor > 0, x.float() * factor, 0.0).bfloat16()


def close(combined: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> bool:
    want = x.float() * weights.sum(dim=1, keepdim=True)
    return combined.shape == x.shape and bool(((combined.float() - want).abs() <= want.abs() / 32 + 0.01).all())


def quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes and one scale per 16 elements, as NVFP4 has them (here a byte per element holds eight bits)."""
    scales = x.float().reshape(len(x), HIDDEN // 16, 16).abs().amax(dim=2).clamp(min=1e-4) / 448
    data = (x.float() / scales.repeat_interleave(16, dim=1)).to(torch.float8_e4m3fn)
    return data.view(torch.uint8), scales


def plain(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return data.view(torch.float8_e4m3fn).float() * scales.repeat_interleave(16, dim=1)


def vllm(rank: int, device: str) -> str:
    """Its one-sided manager and prepare/finalize: quantised tokens, a workspace of just that size, staged rows."""
    of = mapping.Mapping(RANKS, rank, 8, tp_size=RANKS, moe_ep_size=RANKS)
    size = moe_a2a_get_workspace_size_per_rank(
        ep_size=RANKS,
        max_num_tokens=MAX_TOKENS,
        total_dispatch_payload_size_per_token=HIDDEN + HIDDEN // 16 * 4 + TOPK * 4 + TOPK * 4,
        combine_payload_size_per_token=HIDDEN * 2,
    )
    a2a = MoeAlltoAll(
        mapping=of,
        max_num_tokens=MAX_TOKENS,
        top_k=TOPK,
        num_experts=EXPERTS,
        workspace_size_per_rank=size,
        mnnvl_config=mnnvl.MnnvlConfig(comm_backend=Hooks(torch.distributed.group.WORLD)),
    )
    good = []
    for turn in (0, 1):
        x, ids, weights = routed(rank, turn)
        a1q, scale = quantised(x)
        recv_payloads = a2a.dispatch(
            token_selected_experts=ids,
            input_payloads=[a1q, scale, ids, weights],
            runtime_max_tokens_per_rank=SLOTS[turn],
            invalid_token_expert_id=-1,
            expert_id_payload_index=2,
            output_payload_layouts=None,
        )
        a1q_recv, scale_recv, ids_recv, weights_recv = (recv.view(-1, recv.shape[-1]) for recv in recv_payloads)
        y = weighted(plain(a1q_recv, scale_recv), ids_recv, weights_recv, rank)
        output = torch.empty_like(x)
        combined = a2a.combine(
            payload=y.view(RANKS, SLOTS[turn], HIDDEN), runtime_max_tokens_per_rank=SLOTS[turn], output=output
        )
        assert combined is output
        good.append(close(output, plain(a1q, scale), weights))
    assert len(a2a._behind.layers.all()) == 1  # what was guessed of the rows was right
    torch.distributed.barrier()
    a2a.destroy()
    return "ok" if all(good) else "wrong"


def sglang(rank: int, device: str) -> str:
    """Its dispatcher: bfloat16 tokens, experts that write into the workspace, ids beyond the last expert."""
    of = mapping.Mapping(
        rank=rank, tp_size=RANKS, moe_ep_size=RANKS, world_size=RANKS, gpus_per_node=8, pp_size=1, cp_size=1
    )
    size = moe_a2a_get_workspace_size_per_rank(
        ep_size=RANKS,
        max_num_tokens=MAX_TOKENS,
        total_dispatch_payload_size_per_token=2 * HIDDEN + 8 * TOPK,
        combine_payload_size_per_token=2 * HIDDEN,
    )
    layers = [
        MoeAlltoAll(
            mapping=of, max_num_tokens=MAX_TOKENS, top_k=TOPK, num_experts=EXPERTS, workspace_size_per_rank=size,
            mnnvl_config=mnnvl.MnnvlConfig(comm_backend=Hooks(torch.distributed.group.WORLD)),
        )
        for _ in range(3)
    ]  # fmt: skip
    good = []
    for turn, a2a in zip((0, 1, 0), layers, strict=True):
        x, ids, weights = routed(rank, turn)
        received = a2a.dispatch(
            ids, [x, ids, weights], SLOTS[turn], invalid_token_expert_id=EXPERTS, expert_id_payload_index=1
        )
        x_recv, ids_recv, weights_recv = (part.view(-1, part.shape[-1]) for part in received)
        place = a2a.get_combine_payload_tensor_in_workspace(SLOTS[turn], HIDDEN, torch.bfloat16).view(-1, HIDDEN)
        place.copy_(weighted(x_recv, ids_recv, weights_recv, rank))
        combined = a2a.combine(place.view(RANKS, SLOTS[turn], HIDDEN), SLOTS[turn], payload_in_workspace=True)
        good.append(close(combined, x, weights))
    assert len(layers[2]._behind.layers.all()) == 1
    torch.distributed.barrier()
    layers[0].destroy()
    return "ok" if all(good) else "wrong"


def tensorrt_llm(rank: int, device: str) -> str:
    """What its one-sided communication does around the kernels: a workspace by the model's size, statistics for the
    balancer, tokens that are narrower than what it is sized for; the group itself as communicator.
    """
    of = mapping.Mapping(world_size=RANKS, rank=rank, tp_size=RANKS, moe_ep_size=RANKS, enable_attention_dp=True)
    size = MoeAlltoAll.get_moe_workspace_size_per_rank(
        RANKS, TOPK, MAX_TOKENS, HIDDEN, extra_payload_bytes_per_token=8, eplb_stats_num_experts=EXPERTS
    )
    a2a = MoeAlltoAll(
        of, MAX_TOKENS, TOPK, EXPERTS, size, mnnvl_config=mnnvl.MnnvlConfig(torch.distributed.group.WORLD),
        eplb_stats_num_experts=EXPERTS,
    )  # fmt: skip
    good = []
    for turn in (0, 1):
        x, ids, weights = routed(rank, turn)
        data, scales = quantised(x)
        stats = torch.bincount(ids.flatten(), minlength=EXPERTS).int()
        received = a2a.dispatch(
            ids, [data, scales, ids, weights], SLOTS[turn], invalid_token_expert_id=-1, expert_id_payload_index=2,
            eplb_local_stats=stats,
        )  # fmt: skip
        gathered = a2a.eplb_gathered_stats
        assert gathered is not None and torch.equal(gathered[rank], stats)
        data_recv, scales_recv, ids_recv, weights_recv = (part.flatten(0, 1) for part in received)
        moe_output = a2a.get_combine_payload_tensor_in_workspace(SLOTS[turn], HIDDEN, torch.bfloat16)
        moe_output.copy_(
            weighted(plain(data_recv, scales_recv), ids_recv, weights_recv, rank).view(RANKS, SLOTS[turn], HIDDEN)
        )
        combined = a2a.combine(moe_output, SLOTS[turn], payload_in_workspace=True)
        good.append(close(combined, plain(data, scales), weights))
    assert len(a2a._behind.layers.all()) == 1  # the wrong guess was given back
    torch.distributed.barrier()
    a2a.destroy()
    return "ok" if all(good) else "wrong"


def functional(rank: int, device: str) -> str:
    """A workspace that the caller owns, keyword by keyword; a mapping that says nothing of experts."""
    group = torch.distributed.group.WORLD
    size = moe_a2a_get_workspace_size_per_rank(
        ep_size=RANKS, max_num_tokens=MAX_TOKENS, total_dispatch_payload_size_per_token=2 * HIDDEN + 8 * TOPK,
        combine_payload_size_per_token=2 * HIDDEN, eplb_stats_num_experts=0,
    )  # fmt: skip
    of = SimpleNamespace(pp_rank=0, cp_rank=0, cp_size=1, tp_rank=rank)
    mnnvl.MnnvlMemory.initialize()
    backend = mnnvl.TorchDistBackend(group=group)
    assert backend.bcast(rank, 1) == 1 and backend.allgather(rank) == (0, 1)
    mnnvl.MnnvlMemory.set_comm_from_config(
        of, mnnvl.MnnvlConfig(comm_backend=backend, allocation_granularity=0, fabric_page_size=1 << 29)
    )
    memory = mnnvl.MnnvlMemory(of, size)
    workspace = memory.as_torch_strided_tensor(torch.uint8)
    metainfo = trtllm_moe_alltoall.moe_a2a_initialize(
        workspace=workspace, ep_rank=rank, ep_size=RANKS, max_num_tokens=MAX_TOKENS, eplb_stats_num_experts=0
    )
    good = []
    for turn in (0, 1):
        x, ids, weights = routed(rank, turn)
        shape: dict[str, Any] = {
            "workspace": workspace, "metainfo": metainfo, "runtime_max_tokens_per_rank": SLOTS[turn], "ep_rank": rank,
            "ep_size": RANKS, "top_k": TOPK, "enable_pdl": True, "enable_rank_mask": False, "active_rank_mask": None,
        }  # fmt: skip
        received, offset, _ = trtllm_moe_alltoall.moe_a2a_dispatch(
            token_selected_experts=ids, input_payloads=[ids, weights, x], num_experts=EXPERTS, eplb_local_stats=None,
            **shape,
        )  # fmt: skip
        elsewhere = (rank + 1) % RANKS * (EXPERTS // RANKS)
        trtllm_moe_alltoall.moe_a2a_sanitize_expert_ids(
            expert_ids=received[0], workspace=workspace, metainfo=metainfo, ep_rank=rank, invalid_expert_id=elsewhere,
            enable_pdl=True,
        )  # fmt: skip
        ids_recv, weights_recv, x_recv = (part.view(-1, part.shape[-1]) for part in received)
        combined = trtllm_moe_alltoall.moe_a2a_combine(
            payload=weighted(x_recv, ids_recv, weights_recv, rank).view(RANKS, SLOTS[turn], HIDDEN),
            local_num_tokens=len(x), combine_payload_offset=offset, payload_in_workspace=False,
            output_dtype=torch.bfloat16, output_scales=None, output_scalar_scale=1.0, sf_layout=2, output=None,
            use_low_precision=False, **shape,
        )  # fmt: skip
        good.append(close(combined, x, weights))
    torch.distributed.barrier()
    memory.destroy()
    return "ok" if all(good) else "wrong"


@pytest.mark.parametrize("site", [vllm, sglang, tensorrt_llm, functional])
def test_call_site(group: Processes, site: Any) -> None:
    assert group.call(site) == ["ok"] * RANKS
