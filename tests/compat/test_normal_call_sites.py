# SPDX-License-Identifier: Apache-2.0
"""The high-throughput calls as vLLM 0.33, SGLang 0.5, Megatron-LM and torchtitan make them, between processes of a gloo
group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from support.processes import Processes

from moegen.compat import deep_ep
from moegen.compat.deep_ep.utils import EventHandle, EventOverlap

RANKS, EXPERTS, TOPK, HIDDEN = 2, 8, 4, 512
MAX_TOKENS = 32

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def group() -> Iterator[Processes]:
    processes = Processes(RANKS, "cpu")
    yield processes
    processes.stop()


def routed(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rank 1 has no token."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(13 - 13 * rank, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(len(x), EXPERTS, generator=generator).topk(TOPK, dim=1).indices
    return x, ids, torch.rand(len(x), TOPK, generator=generator)


def close(got: torch.Tensor, want: torch.Tensor) -> str:
    return "ok" if bool(((got.float() - want).abs() <= want.abs() / 8 + 0.05).all()) else "wrong"


def weighted(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What experts that change nothing give for rows of a token that selects several of this rank's experts."""
    return (rows.float() * weights.sum(dim=1, keepdim=True)).bfloat16()


def plain_buffer(num_sms: int) -> deep_ep.Buffer:
    """Sized by both configurations, as SGLang and Megatron do."""
    sizes = [0, 0]
    for config in (deep_ep.Buffer.get_dispatch_config(RANKS), deep_ep.Buffer.get_combine_config(RANKS)):
        sizes[0] = max(sizes[0], config.get_nvl_buffer_size_hint(2 * HIDDEN, RANKS))
        sizes[1] = max(sizes[1], config.get_rdma_buffer_size_hint(2 * HIDDEN, RANKS))
    deep_ep.Buffer.set_num_sms(num_sms)
    return deep_ep.Buffer(torch.distributed.group.WORLD, *sizes)


def vllm(rank: int, device: str) -> str:
    """Its high-throughput manager and prepare/finalize: FP8 with scales per block, calls behind a captured event."""
    buffer = deep_ep.Buffer(
        group=torch.distributed.group.WORLD,
        num_nvl_bytes=1 << 20,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=1,
        explicitly_destroy=True,
    )
    deep_ep.Buffer.set_num_sms(4)
    x, ids, weights = routed(rank)
    scales = x.float().reshape(len(x), HIDDEN // 128, 128).abs().amax(dim=2).clamp(min=1e-4) / 448
    quantised = (x.float() / scales.repeat_interleave(128, dim=1)).to(torch.float8_e4m3fn)
    previous = buffer.capture()
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        topk_idx=ids, num_experts=EXPERTS, previous_event=previous, async_finish=True, allocate_on_comm_stream=False
    )
    (tokens, token_scales), expert_ids, expert_weights, counts, handle, event = buffer.dispatch(  # type: ignore[misc]
        x=(quantised, scales),
        handle=None,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=ids,
        topk_weights=weights,
        expert_alignment=1,
        config=deep_ep.Buffer.get_dispatch_config(RANKS),
        previous_event=event,
        async_finish=True,
        allocate_on_comm_stream=False,
    )
    if event.event is not None:
        event.current_stream_wait()
    assert isinstance(counts, list) and sum(counts) == int((expert_ids >= 0).sum())  # type: ignore[operator, union-attr]
    rows = (tokens.float() * token_scales.repeat_interleave(128, dim=1)).bfloat16()
    combined, _, event = buffer.combine(
        x=weighted(rows, expert_weights),  # type: ignore[arg-type]
        handle=handle,  # type: ignore[arg-type]
        topk_weights=None,
        config=deep_ep.Buffer.get_combine_config(RANKS),
        previous_event=buffer.capture(),
        async_finish=True,
        allocate_on_comm_stream=False,
    )
    if event.event is not None:
        event.current_stream_wait()
    torch.distributed.barrier()
    buffer.destroy()
    return close(combined, x.float() * weights.sum(dim=1, keepdim=True))


def sglang(rank: int, device: str) -> str:
    """Its normal dispatcher: positional buffer, numbers of rows rounded up for the grouped GEMM."""
    buffer = plain_buffer(4)
    assert (buffer.low_latency_mode, buffer.group_size) == (False, RANKS)
    x, ids, weights = routed(rank)
    previous = deep_ep.Buffer.capture()
    per_rank, per_node, per_expert, in_rank, previous = buffer.get_dispatch_layout(
        ids, EXPERTS, previous_event=previous, async_finish=True, allocate_on_comm_stream=True
    )
    rows, expert_ids, expert_weights, counts, handle, event = buffer.dispatch(
        x,
        topk_idx=ids,
        topk_weights=weights,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        previous_event=previous,
        async_finish=True,
        allocate_on_comm_stream=True,
        expert_alignment=128,
        config=deep_ep.Config(num_sms=4, num_max_nvl_chunked_send_tokens=6, num_max_nvl_chunked_recv_tokens=256),
    )
    event.current_stream_wait()
    assert all(count % 128 == 0 for count in counts or [])
    assert expert_ids is not None and expert_weights is not None and handle is not None
    combined, _, event = buffer.combine(
        weighted(rows, expert_weights),  # type: ignore[arg-type]
        handle,
        async_finish=True,
        previous_event=deep_ep.Buffer.capture(),
        allocate_on_comm_stream=True,
    )
    event.current_stream_wait()
    torch.distributed.barrier()
    buffer.destroy()
    return close(combined, x.float() * weights.sum(dim=1, keepdim=True))


def megatron(rank: int, device: str) -> str:
    """Its fused dispatch and combine, forward and backward: combine of gradients, dispatch by a handle."""
    buffer = plain_buffer(4)
    assert buffer.num_nvl_bytes > 0 and buffer.group is torch.distributed.group.WORLD
    x, ids, weights = routed(rank)
    previous = EventOverlap(EventHandle())
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        ids, EXPERTS, previous_event=previous, async_finish=False, allocate_on_comm_stream=False
    )
    rows, _, expert_weights, _, handle, event = buffer.dispatch(
        x, topk_idx=ids, topk_weights=weights.float(), num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, previous_event=event, async_finish=False,
        allocate_on_comm_stream=False,
    )  # fmt: skip
    assert handle is not None
    gradient, weight_gradient, event = buffer.combine(
        rows.contiguous(), handle, topk_weights=expert_weights.float(), previous_event=previous, async_finish=False,  # type: ignore[union-attr]
        allocate_on_comm_stream=False,
    )  # fmt: skip
    back, *_, event = buffer.dispatch(
        x, handle=handle, previous_event=previous, async_finish=False, allocate_on_comm_stream=False
    )
    ranks = in_rank.sum(dim=1, keepdim=True)
    assert torch.equal(back, rows)  # type: ignore[arg-type]
    assert torch.equal(weight_gradient, weights)  # type: ignore[arg-type]
    torch.distributed.barrier()
    buffer.destroy()
    return close(gradient, x.float() * ranks)


def elastic(rank: int, device: str, expand: bool) -> str:
    """What vLLM's V2 does: prefill with expansion and exact counts, decode without either; then torchtitan's backward:
    gradients by the handle, with weights.
    """
    buffer = deep_ep.ElasticBuffer(
        group=torch.distributed.group.WORLD,
        num_max_tokens_per_rank=MAX_TOKENS,
        hidden=HIDDEN,
        num_topk=TOPK,
        use_fp8_dispatch=False,
        allow_hybrid_mode=True,
        prefer_overlap_with_compute=True,
        allow_multiple_reduction=True,
        explicitly_destroy=True,
    )
    assert buffer.num_bytes >= 1 << 20
    sms = buffer.get_theoretical_num_sms(num_experts=EXPERTS, num_topk=TOPK)
    x, ids, weights = routed(rank)
    rows, expert_ids, expert_weights, handle, _ = buffer.dispatch(
        x=x,
        topk_idx=ids,
        topk_weights=weights,
        num_experts=EXPERTS,
        num_max_tokens_per_rank=MAX_TOKENS,
        do_expand=expand,
        do_cpu_sync=expand,
        async_with_compute_stream=False,
    )
    arrived = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
    assert expert_weights is not None
    if expand:
        assert expert_ids is None and sum(handle.num_recv_tokens_per_expert_list) == len(rows)
        y = (rows.float() * expert_weights[:, None]).bfloat16()  # type: ignore[union-attr]
    else:
        assert expert_ids is not None and bool((expert_ids[arrived:] == -1).all())
        assert len(rows) == RANKS * MAX_TOKENS
        y = weighted(rows, expert_weights.masked_fill(expert_ids < 0, 0))  # type: ignore[arg-type]
    combined, _, _ = buffer.combine(
        x=y, handle=handle, topk_weights=None, async_with_compute_stream=False, allocate_on_comm_stream=False
    )
    again, _, back, same, _ = buffer.dispatch(
        x, handle=handle, topk_weights=weights, num_sms=handle.num_sms, do_cpu_sync=False
    )
    assert same is handle and handle.num_sms == sms
    used = len(rows) if expand else arrived
    assert torch.equal(again[:used], rows[:used]) and torch.equal(back[:used], expert_weights[:used])  # type: ignore[index]
    _, weight_gradient, _ = buffer.combine(rows, handle=handle, topk_weights=expert_weights)  # type: ignore[arg-type]
    assert torch.equal(weight_gradient, weights)  # type: ignore[arg-type]
    torch.distributed.barrier()
    buffer.destroy()
    return close(combined, x.float() * weights.sum(dim=1, keepdim=True))


SITES: dict[str, Callable[..., str]] = {
    "vllm": vllm,
    "sglang": sglang,
    "megatron": megatron,
    "elastic-prefill": partial(elastic, expand=True),
    "elastic-decode": partial(elastic, expand=False),
}


@pytest.mark.parametrize("site", SITES.values(), ids=SITES)
def test_call_site(group: Processes, site: Any) -> None:
    assert group.call(site) == ["ok"] * RANKS
