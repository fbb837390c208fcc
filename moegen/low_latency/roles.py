# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a launch of family `ll` do what."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.base.roles import Roles
from moegen.limits import ceil_div
from moegen.low_latency.spec import LowLatencySpec
from moegen.tuning.shares import (
    FEW_RANKS,
    LOW_LATENCY_BLOCKS_PER_TELLER,
    LOW_LATENCY_SEND_SHARE,
    LOW_LATENCY_SEND_SHARE_OF_MANY,
)


@dataclass(frozen=True)
class LowLatencyRoles(Roles):
    """Block 0 of a dispatch also tells the user how much has arrived.

    Attributes:
        tellers: first blocks, which broadcast expert ids ahead of the rows; of dispatch.
        shares: that a token's destinations are dealt out to, each a warp group's work; of dispatch.
    """

    tellers: int = 0
    shares: int = 1


def roles(spec: LowLatencySpec, max_tokens: int, resident_blocks: int) -> LowLatencyRoles:
    """Blocks to launch, never more than can run at the same time: one per row that may come, and one per row that may
    be sent (of dispatch, per share of a token's destinations), if there are so many; else a block's teams share them.
    """
    sends, receives = spec.phase != "receive", spec.phase != "send"
    if resident_blocks == 1:
        return LowLatencyRoles(1, (0, int(sends)), (0, int(receives)), int(sends))
    ranks = spec.num_ranks
    share, of = (LOW_LATENCY_SEND_SHARE if ranks <= FEW_RANKS else LOW_LATENCY_SEND_SHARE_OF_MANY)[spec.op]
    shares = 1
    if spec.op == "dispatch":
        most = max(1, resident_blocks // LOW_LATENCY_BLOCKS_PER_TELLER)
        tell = min(ceil_div(max_tokens, spec.block_threads), most) if sends else 1
        room = resident_blocks - tell
        may_send = room * share // of if receives else room
        shares = max(1, min(ranks - receives, may_send // max_tokens))
        out, come = max_tokens * shares, ranks * max_tokens
    else:
        tell, room = 0, resident_blocks
        out, come = max(1, (ranks - 1) * max_tokens) + (0 if receives else max_tokens), max_tokens
    if not receives:
        out, come = min(out, room), 0
    elif not sends:
        out, come = 0, min(come, room)
    elif room == 1:
        return LowLatencyRoles(2, (0, 1), (1, 1), 1)
    elif out + come > room:
        out = max(1, min(out, room * share // of), room - come)
        come = room - out
    return LowLatencyRoles(tell + out + come, (tell, out), (tell + out, come), tell, shares)
