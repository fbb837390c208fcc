# SPDX-License-Identifier: Apache-2.0
"""The tables that metainfo points to, which FlashInfer's kernels keep and moegen's do not: for those who look."""

from __future__ import annotations

import torch

from moegen import reference
from moegen.compat.flashinfer import sizes
from moegen.compat.flashinfer.workspace import Sent, Workspace

Tensor = torch.Tensor


def write(workspace: Workspace, sent: Sent) -> None:
    """Counts and tables of a dispatch into the workspace's row, from the ids as they are now.

    Per token and selection the rank and the slot there, -1 for all but the first selection of a rank; nothing of that
    if a token has more selections than there is room for.
    """
    targets = _targets(workspace, sent)
    goes = torch.stack([(targets == rank).any(dim=1) for rank in range(workspace.ep_size)], dim=1).int()
    slots = (goes.cumsum(dim=0) - goes).gather(1, targets.clamp(min=0))
    _put(workspace, "SEND_COUNTERS", goes.sum(dim=0))
    _put(workspace, "RECV_COUNTERS", sent.received.counts)
    if sent.routed.top_k <= sizes.TABLE_TOPK:
        _put(workspace, "TOPK_TARGET_RANKS", targets)
        _put(workspace, "TOPK_SEND_INDICES", slots.masked_fill(targets < 0, -1))
    if sent.received.stats is not None:
        _put(workspace, "EPLB_GATHERED_STATS", sent.received.stats)


def _targets(workspace: Workspace, sent: Sent) -> Tensor:
    """int64 [T, top_k]."""
    ids = sent.ids.long()
    ranges = reference.expert_ranges(sent.routed.num_experts, workspace.ep_size)
    ends = torch.tensor([experts.stop for experts in ranges], dtype=torch.int64, device=ids.device)
    targets = torch.bucketize(ids, ends, right=True)
    targets = targets.masked_fill(ids < 0, -1)
    if sent.active is not None:
        for rank in range(workspace.ep_size):
            if not sent.active >> rank & 1:
                targets = targets.masked_fill(targets == rank, -1)
    earlier = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril(-1)
    again = ((targets[:, :, None] == targets[:, None, :]) & earlier).any(dim=2)
    return targets.masked_fill(again, -1)


def _put(workspace: Workspace, name: str, values: Tensor) -> None:
    at = workspace.offsets[sizes.METAINFO_INDEX[f"{name}_OFFSET_INDEX"]]
    workspace.row[at : at + 4 * values.numel()].view(torch.int32).copy_(values.reshape(-1))
