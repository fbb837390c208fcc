# SPDX-License-Identifier: Apache-2.0
"""What a `group` of other libraries' constructors may be: a torch process group, or a rank_world."""

from __future__ import annotations

from typing import Any

import torch

from moegen.runtime.worlds import RankWorld


def rank_and_size(group: Any) -> tuple[int, int]:
    if isinstance(group, RankWorld):
        return group.rank, group.size
    import torch.distributed as dist

    return dist.get_rank(group), dist.get_world_size(group)


def usual_device(group: Any) -> torch.device:
    """Where tensors are that are made before any call."""
    if isinstance(group, RankWorld):
        return group.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
