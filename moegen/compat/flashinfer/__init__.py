# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's one-sided MoE all-to-all (`flashinfer.comm`) on moegen: `MoeAlltoAll`, the functional `moe_a2a_*` with
their workspaces, `Mapping` and the communicator hooks.

`from moegen.compat.flashinfer import MoeAlltoAll`, or by the modules' names there: `mapping`, `mnnvl`,
`trtllm_moe_alltoall`.
"""

from moegen.compat.flashinfer.checks import CallError
from moegen.compat.flashinfer.mapping import Mapping
from moegen.compat.flashinfer.mnnvl import CommBackend, MnnvlConfig, MnnvlMemory, TorchDistBackend
from moegen.compat.flashinfer.trtllm_moe_alltoall import (
    MoeAlltoAll,
    moe_a2a_active_rank_mask,
    moe_a2a_combine,
    moe_a2a_dispatch,
    moe_a2a_get_workspace_size_per_rank,
    moe_a2a_initialize,
    moe_a2a_sanitize_expert_ids,
    moe_a2a_wrap_payload_tensor_in_workspace,
)

__all__ = [
    "CallError",
    "CommBackend",
    "Mapping",
    "MnnvlConfig",
    "MnnvlMemory",
    "MoeAlltoAll",
    "TorchDistBackend",
    "moe_a2a_active_rank_mask",
    "moe_a2a_combine",
    "moe_a2a_dispatch",
    "moe_a2a_get_workspace_size_per_rank",
    "moe_a2a_initialize",
    "moe_a2a_sanitize_expert_ids",
    "moe_a2a_wrap_payload_tensor_in_workspace",
]
