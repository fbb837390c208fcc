# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's functional calls, `moe_a2a_*`. A workspace remembers its newest dispatch, to which combine belongs."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from moegen.compat.flashinfer import checks, sizes
from moegen.compat.flashinfer.checks import RANK_MASK_WORDS as MOE_A2A_RANK_MASK_WORDS
from moegen.compat.flashinfer.checks import CallError
from moegen.compat.flashinfer.layers import Routed
from moegen.compat.flashinfer.workspace import Sent, Workspace, find, initialized

__all__ = [
    "MOE_A2A_RANK_MASK_WORDS",
    "get_moe_alltoall_module",
    "moe_a2a_active_rank_mask",
    "moe_a2a_combine",
    "moe_a2a_dispatch",
    "moe_a2a_get_workspace_size_per_rank",
    "moe_a2a_initialize",
    "moe_a2a_sanitize_expert_ids",
    "moe_a2a_wrap_payload_tensor_in_workspace",
]

Tensor = torch.Tensor


def moe_a2a_active_rank_mask(active_ranks: Any, ep_size: int) -> Tensor:
    """uint64 [1] on the CPU: bit r says that rank r takes part. `active_ranks`: numbers, or a tensor [n] of them."""
    return checks.rank_mask(active_ranks, ep_size)


def moe_a2a_get_workspace_size_per_rank(
    ep_size: int,
    max_num_tokens: int,
    total_dispatch_payload_size_per_token: int,
    combine_payload_size_per_token: int,
    eplb_stats_num_experts: int = 0,
    *,
    backend: str = "trtllm",
) -> int:
    """Bytes of a rank's row, by FlashInfer's formula, from the bytes per token of all payloads and of combine's row."""
    checks.one_of_the_backends(backend)
    per_token = (total_dispatch_payload_size_per_token, combine_payload_size_per_token)
    return sizes.workspace_bytes(ep_size, max_num_tokens, *per_token, eplb_stats_num_experts)


def moe_a2a_initialize(
    workspace: Tensor,
    ep_rank: int,
    ep_size: int,
    max_num_tokens: int,
    eplb_stats_num_experts: int = 0,
    *,
    backend: str = "trtllm",
    comm_backend: Any = None,
) -> Tensor:
    """Says what a workspace is for and zeroes this rank's row. It may be called again, when no call is under way.

    Args:
        workspace: uint8 [ep_size, size_per_rank], of `MnnvlMemory`; or any tensor, which this call makes a workspace.
        max_num_tokens: the most that a rank may have.
        eplb_stats_num_experts: length of the statistics that dispatch gathers.
        comm_backend: not FlashInfer's: for any tensor, as `MnnvlConfig.comm_backend`.

    Returns:
        metainfo: int64 [10] on the CPU, offsets by `MoeAlltoAll._METAINFO_INDEX`. Keep it as long as the workspace: a
        workspace that no MnnvlMemory stands for ends with it.

    Raises:
        CallError: a workspace of another size or too small, or ranks that have no communicator.
    """
    checks.one_of_the_backends(backend)
    found = find(workspace, ep_rank)
    if workspace.shape[0] != ep_size or workspace.dtype != torch.uint8:
        raise CallError(f"workspace is uint8 [{ep_size}, bytes]; got {workspace.dtype} {list(workspace.shape)}")
    if found is None or comm_backend not in (None, found.communicator):
        found = Workspace(comm_backend, ep_rank, ep_size, workspace.shape[1], workspace)
    metainfo = found.lay_out(max_num_tokens, eplb_stats_num_experts)
    found.row.zero_()
    metainfo.moegen_workspace = found  # type: ignore[attr-defined]
    return metainfo


def moe_a2a_wrap_payload_tensor_in_workspace(
    workspace: Tensor, leading_shape: Sequence[int], slice_start: int, slice_end: int, dtype: torch.dtype
) -> Tensor:
    """A part of a workspace as `dtype` [*leading_shape, n].

    Args:
        workspace: [ep_size, size_per_rank], or one row of it.
        slice_start, slice_end: bytes from the beginning, all within one row.
    """
    rows = workspace.view(torch.uint8)
    rows = rows[None] if rows.dim() == 1 else rows
    length = rows.stride(0) or rows.shape[1]
    row, start = divmod(slice_start, length)
    end = start + slice_end - slice_start
    if rows.dim() != 2 or not 0 <= row < rows.shape[0] or not start <= end <= rows.shape[1]:
        raise CallError(
            f"bytes {slice_start}..{slice_end} are not in one row of a workspace {list(workspace.shape)}: a slice must "
            "belong to a single rank"
        )
    return rows[row, start:end].view(dtype).view(*leading_shape, -1)


def moe_a2a_dispatch(
    token_selected_experts: Tensor,
    input_payloads: Sequence[Tensor],
    workspace: Tensor,
    metainfo: Tensor,
    runtime_max_tokens_per_rank: int,
    ep_rank: int,
    ep_size: int,
    top_k: int,
    num_experts: int,
    enable_pdl: bool | None = None,
    eplb_local_stats: Tensor | None = None,
    enable_rank_mask: bool = False,
    active_rank_mask: Tensor | None = None,
    *,
    backend: str = "trtllm",
    recv_view_cache: dict[Any, Any] | None = None,
) -> tuple[list[Tensor], int, Tensor | None]:
    """Sends each token's payloads once to every rank that holds one of its experts.

    Args:
        token_selected_experts: int32 [T, top_k]; -1 selects nothing. T may be 0.
        input_payloads: 1..16 tensors [T, n], of any dtype.
        runtime_max_tokens_per_rank: slots per source, the same on all ranks, 1..max_num_tokens.
        eplb_local_stats: int32 [eplb_stats_num_experts], gathered from all ranks.
        active_rank_mask: of `moe_a2a_active_rank_mask`; ranks that it leaves out are neither sent to nor waited for.
        metainfo, enable_pdl, backend, recv_view_cache: change nothing here.

    Returns:
        For each payload [ep_size, runtime_max_tokens_per_rank, n], valid until the next dispatch: row (s, i) is the
        i-th token of rank s that selects an expert of this rank;
        the offset of combine's rows in this rank's row of the workspace;
        int32 [ep_size, eplb_stats_num_experts], or None.

    Raises:
        CallError: arguments that do not fit; nothing was launched.
    """
    checks.one_of_the_backends(backend)
    target = initialized(workspace, ep_rank, ep_size)
    sent = target.dispatch(
        Routed(num_experts, top_k),
        token_selected_experts,
        input_payloads,
        runtime_max_tokens_per_rank,
        stats=checks.eplb_stats(eplb_local_stats, target.eplb_stats_num_experts),
        active_ranks=checks.mask_bits(active_rank_mask, enable_rank_mask, ep_rank, ep_size),
    )
    return list(sent.received.payloads), sent.combine_offset, sent.received.stats


def moe_a2a_combine(
    payload: Tensor,
    local_num_tokens: int,
    workspace: Tensor,
    metainfo: Tensor,
    runtime_max_tokens_per_rank: int,
    ep_rank: int,
    ep_size: int,
    top_k: int,
    combine_payload_offset: int,
    payload_in_workspace: bool = False,
    output_dtype: torch.dtype | None = None,
    output_scales: Tensor | None = None,
    output_scalar_scale: float = 1.0,
    sf_layout: Any = None,
    output: Tensor | None = None,
    *,
    use_low_precision: bool = False,
    enable_pdl: bool | None = None,
    enable_rank_mask: bool = False,
    active_rank_mask: Tensor | None = None,
    backend: str = "trtllm",
) -> Tensor:
    """Brings rows back to their tokens' owners, who add them in fp32, in the order of the ranks, and round once.

    Args:
        payload: [ep_size, runtime_max_tokens_per_rank, hidden], where dispatch put the tokens; bfloat16, float16,
            float32 or float8_e4m3fn. Weights are applied already.
        local_num_tokens, runtime_max_tokens_per_rank, top_k, combine_payload_offset: the dispatch's.
        payload_in_workspace: `payload` lies in the workspace at that offset; saves nothing here.
        output_dtype: bfloat16, float16 or float32; None: the payload's, or bfloat16 if that is FP8.
        output: [local_num_tokens, hidden], contiguous, for the result.
        use_low_precision: rows travel as float8_e4m3fn without scales.
        output_scales, output_scalar_scale, sf_layout: of quantised results, which are not there.
        active_rank_mask: the dispatch's.

    Returns:
        [local_num_tokens, hidden]; a token that went nowhere is zero.

    Raises:
        CallError: arguments that do not fit; nothing was launched.
        NotImplementedError: quantised results.
    """
    checks.one_of_the_backends(backend)
    checks.output_dtype(output_dtype, output_scales)
    target = initialized(workspace, ep_rank, ep_size)
    sent = _of_the_dispatch(target, local_num_tokens, runtime_max_tokens_per_rank, top_k, combine_payload_offset)
    return target.combine(
        sent,
        payload,
        in_workspace=payload_in_workspace,
        output_dtype=output_dtype,
        output=output,
        low_precision=use_low_precision,
        active_ranks=checks.mask_bits(active_rank_mask, enable_rank_mask, ep_rank, ep_size),
    )


def moe_a2a_sanitize_expert_ids(
    expert_ids: Tensor,
    workspace: Tensor,
    metainfo: Tensor,
    ep_rank: int,
    invalid_expert_id: int,
    enable_pdl: bool | None = None,
    *,
    backend: str = "trtllm",
) -> None:
    """Writes `invalid_expert_id` into all slots that the newest dispatch put nothing into.

    Args:
        expert_ids: int32 [ep_size, runtime_max_tokens_per_rank, top_k], as received; changed in place.
    """
    checks.one_of_the_backends(backend)
    target = initialized(workspace, ep_rank, workspace.shape[0])
    sent = _newest(target, "moe_a2a_sanitize_expert_ids")
    checks.expert_ids(expert_ids, target.ep_size, sent.slots)
    slots = torch.arange(sent.slots, dtype=torch.int64, device=expert_ids.device)
    expert_ids.masked_fill_((slots >= sent.received.counts[:, None])[:, :, None], invalid_expert_id)


def get_moe_alltoall_module(backend: str = "trtllm") -> SimpleNamespace:
    """Of FlashInfer's compiled module, what its callers look up there: the size and the names of the offsets."""
    checks.one_of_the_backends(backend)
    index = sizes.METAINFO_INDEX
    pairs = [f"MOE_A2A_{name}" for name in index], list(index.values())
    return SimpleNamespace(moe_a2a_get_aux_data_size=sizes.aux_bytes, moe_a2a_get_metainfo_index_pairs=lambda: pairs)


def _newest(target: Workspace, call: str) -> Sent:
    if target.last is None:
        raise CallError(f"{call} called before successful dispatch into this workspace")
    return target.last


def _of_the_dispatch(target: Workspace, *said: int) -> Sent:
    sent = _newest(target, "moe_a2a_combine")
    names = ("local_num_tokens", "runtime_max_tokens_per_rank", "top_k", "combine_payload_offset")
    dispatched = (sent.num_tokens, sent.slots, sent.routed.top_k, sent.combine_offset)
    for name, value, was in zip(names, said, dispatched, strict=True):
        if value != was:
            raise CallError(f"combine has the {name} of its dispatch, {was}; got {value}")
    return sent
