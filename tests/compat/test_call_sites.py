# SPDX-License-Identifier: Apache-2.0
"""The low-latency calls as vLLM 0.33 and SGLang 0.5 make them, word by word, between processes of a gloo group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.processes import Processes

from moegen.compat import deep_ep

RANKS, EXPERTS, TOPK, HIDDEN, MAX_TOKENS = 2, 8, 4, 2048, 16

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def group() -> Iterator[Processes]:
    processes = Processes(RANKS, "cpu")
    yield processes
    processes.stop()


def routed(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(5 + 3 * rank, HIDDEN, generator=generator).bfloat16()
    ids = torch.rand(len(x), EXPERTS, generator=generator).topk(TOPK, dim=1).indices
    return x, ids, torch.rand(len(x), TOPK, generator=generator)


def experts_of(received: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, scales = received
    return (tokens.float() * scales.repeat_interleave(128, dim=2)).bfloat16()


def is_weighted_sum(combined: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> bool:
    want = x.float() * weights.sum(dim=1, keepdim=True)
    return bool(((combined.float() - want).abs() <= want.abs() / 8 + 0.1).all())


def vllm(rank: int, device: str) -> str:
    """Its all2all manager and prepare/finalize: keyword arguments, receive hooks, an output tensor."""
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=MAX_TOKENS, hidden=HIDDEN, num_ranks=RANKS, num_experts=EXPERTS
    )
    buffer = deep_ep.Buffer(
        group=torch.distributed.group.WORLD,
        num_nvl_bytes=0,
        num_rdma_bytes=size,
        low_latency_mode=True,
        num_qps_per_rank=EXPERTS // RANKS,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=True,
        enable_shrink=False,
    )
    x, ids, weights = routed(rank)
    received, count, handle, _, hook = buffer.low_latency_dispatch(
        x, ids, MAX_TOKENS, EXPERTS, use_fp8=True, round_scale=False, use_ue8m0=False, async_finish=False,
        return_recv_hook=True,
    )  # fmt: skip
    assert hook is not None
    hook()
    assert int(count.sum()) > 0
    out = torch.empty_like(x)
    _, _, hook = buffer.low_latency_combine(
        experts_of(received),
        ids,
        weights,
        handle,
        async_finish=False,
        zero_copy=False,
        return_recv_hook=True,
        out=out,  # type: ignore[arg-type]
    )
    assert hook is not None
    hook()
    torch.distributed.barrier()
    buffer.destroy()
    return "ok" if is_weighted_sum(out, x, weights) else "wrong"


def sglang(rank: int, device: str) -> str:
    """Its dispatcher: positional sizes, one buffer cleaned before use, an event in place of the hook."""
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, RANKS, EXPERTS)
    group = torch.distributed.group.WORLD
    buffer = deep_ep.Buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=4, allow_mnnvl=False)
    assert buffer.low_latency_mode
    assert buffer.group_size == RANKS
    buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, EXPERTS)
    x, ids, weights = routed(rank)
    received, _, handle, event, hook = buffer.low_latency_dispatch(
        x, ids, MAX_TOKENS, EXPERTS, use_fp8=True, async_finish=True, return_recv_hook=False, round_scale=True,
        use_ue8m0=False,
    )  # fmt: skip
    assert hook is None
    event.current_stream_wait()
    combined, event, hook = buffer.low_latency_combine(
        x=experts_of(received), topk_idx=ids, topk_weights=weights, handle=handle, async_finish=True,  # type: ignore[arg-type]
        return_recv_hook=False,
    )  # fmt: skip
    event.current_stream_wait()
    torch.distributed.barrier()
    buffer.destroy()
    return "ok" if is_weighted_sum(combined, x, weights) else "wrong"


@pytest.mark.parametrize("framework", [vllm, sglang])
def test_call_site(group: Processes, framework: object) -> None:
    assert group.call(framework) == ["ok"] * RANKS  # type: ignore[arg-type]
