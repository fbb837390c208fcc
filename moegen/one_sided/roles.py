# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a launch of family `a2a` send and which receive."""

from __future__ import annotations

from moegen.base.roles import Roles
from moegen.limits import MAX_SENDERS, ceil_div
from moegen.one_sided.spec import OneSidedCombine, OneSidedDispatch
from moegen.tuning.shares import ONE_SIDED_COMBINE_SEND_SHARE


def roles(spec: OneSidedDispatch | OneSidedCombine, max_tokens: int, resident: int) -> Roles:
    """Senders first, so that rows leave at once. `resident`: blocks that fit on the device together."""
    if resident == 1:
        return Roles(1, (0, 1), (0, 1))
    rows = ceil_div(max_tokens * max(1, spec.num_ranks - 1), spec.teams)
    tokens = ceil_div(max_tokens, spec.teams)
    if isinstance(spec, OneSidedDispatch):
        senders = min(tokens, resident - 1, MAX_SENDERS)
        return Roles(senders + 1, (0, senders), (senders, 1))
    if spec.pulls:
        blocks = min(tokens, resident)
        return Roles(blocks, (0, 0), (0, blocks))
    senders, receivers = rows, tokens
    if senders + receivers > resident:
        senders = min(senders, max(1, round(resident * ONE_SIDED_COMBINE_SEND_SHARE)))
        receivers = min(receivers, resident - senders)
    return Roles(senders + receivers, (0, senders), (senders, receivers))
