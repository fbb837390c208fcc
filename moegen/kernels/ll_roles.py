# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a launch of family `ll` do what."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.kernels.ll import LowLatencySpec, ceil_div


@dataclass(frozen=True)
class Roles:
    """Which blocks of a launch do what; block 0 of a dispatch also tells the user how much has come.

    Attributes:
        blocks: of the launch.
        tellers: first blocks, which tell the routes.
        shares: that a token's destinations are dealt out to, each a team's work; of dispatch.
        senders, receivers: (first block, number of blocks).
    """

    blocks: int
    senders: tuple[int, int]
    receivers: tuple[int, int]
    tellers: int = 0
    shares: int = 1


SEND_SHARE = {"dispatch": (1, 3), "combine": (1, 2)}
"""Of the blocks, where there are not enough for a team per row. Dispatch receives more than it sends: rows fan out."""

SEND_SHARE_OF_MANY = SEND_SHARE | {"combine": (7, 10)}
"""The same with more than two ranks, each of which returns a row of most tokens: of 512 tokens, four ranks' combine
takes 74.6 us in place of 78.6 (bench/results/sweeps)."""


def roles(spec: LowLatencySpec, max_tokens: int, resident_blocks: int) -> Roles:
    """Blocks to launch, never more than can run at the same time: one per row that may come, and one per row that may
    be sent (of dispatch, per share of a token's destinations), if there are so many; else a block's teams share them.
    """
    sends, receives = spec.phase != "receive", spec.phase != "send"
    if resident_blocks == 1:
        return Roles(1, (0, int(sends)), (0, int(receives)), int(sends))
    ranks = spec.num_ranks
    share, of = (SEND_SHARE if ranks <= 2 else SEND_SHARE_OF_MANY)[spec.op]
    shares = 1
    if spec.op == "dispatch":
        tell = min(ceil_div(max_tokens, spec.block_threads), max(1, resident_blocks // 8)) if sends else 1
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
        return Roles(2, (0, 1), (1, 1), 1)
    elif out + come > room:
        out = max(1, min(out, room * share // of), room - come)
        come = room - out
    return Roles(tell + out + come, (tell, out), (tell + out, come), tell, shares)
