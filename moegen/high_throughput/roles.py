# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a launch of family `ht` send and which receive."""

from __future__ import annotations

from moegen.base.roles import Roles
from moegen.codegen.row_spec import RowSpec
from moegen.tuning.shares import FEW_RANKS, ROW_SEND_SHARES, ROW_SEND_SHARES_OF_MANY


def roles(spec: RowSpec, blocks: int) -> Roles:
    """Senders first, so that rows leave at once."""
    if blocks == 1:
        return Roles(1, (0, 1), (0, 1))
    shares = ROW_SEND_SHARES if spec.num_ranks <= FEW_RANKS else ROW_SEND_SHARES_OF_MANY
    share = shares["quantising dispatch" if spec.quantizes else spec.op, spec.layout]
    send = max(1, min(blocks - 1, round(blocks * share)))
    return Roles(blocks, (0, send), (send, blocks - send))
