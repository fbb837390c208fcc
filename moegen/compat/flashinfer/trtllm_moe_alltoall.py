# SPDX-License-Identifier: Apache-2.0
"""All names under which `flashinfer.comm.trtllm_moe_alltoall` is imported."""

from moegen.compat.flashinfer.functional import (
    MOE_A2A_RANK_MASK_WORDS,
    get_moe_alltoall_module,
    moe_a2a_active_rank_mask,
    moe_a2a_combine,
    moe_a2a_dispatch,
    moe_a2a_get_workspace_size_per_rank,
    moe_a2a_initialize,
    moe_a2a_sanitize_expert_ids,
    moe_a2a_wrap_payload_tensor_in_workspace,
)
from moegen.compat.flashinfer.moe_alltoall import MoeAlltoAll

__all__ = [
    "MOE_A2A_RANK_MASK_WORDS",
    "MoeAlltoAll",
    "get_moe_alltoall_module",
    "moe_a2a_active_rank_mask",
    "moe_a2a_combine",
    "moe_a2a_dispatch",
    "moe_a2a_get_workspace_size_per_rank",
    "moe_a2a_initialize",
    "moe_a2a_sanitize_expert_ids",
    "moe_a2a_wrap_payload_tensor_in_workspace",
]
