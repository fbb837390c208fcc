# SPDX-License-Identifier: Apache-2.0
"""Path collective: whether it pays to exchange counts first, so that only rows that are needed cross.

Without, every rank sends every rank as many rows as the call has room for: what nobody needs is padding. With, each
dispatch takes one more exchange of counts, for which the host waits before it enqueues the rest; combine knows them.

The rule takes what all ranks know before any count is known, so that they decide alike: the layer, the capacity of the
call and its bytes per token. It expects all tokens to be there, each with experts chosen uniformly: fewer tokens would
make exact better still.
"""

from __future__ import annotations

from math import comb

from moegen.codegen.problem import Problem
from moegen.tuning import exchange

EXCHANGES = ("auto", "padded", "exact")


def share_of_tokens(problem: Problem) -> float:
    """Of a rank's tokens, how many go to another rank on average, if each selects different experts uniformly: the
    average over the ranks, whose numbers of experts may differ by one.
    """
    experts = problem.num_experts
    topk = min(problem.num_topk, experts)  # more is refused by the Specs, which say why
    misses = (comb(experts - len(problem.local_experts(rank)), topk) for rank in range(problem.num_ranks))
    return 1 - sum(misses) / comb(experts, topk) / problem.num_ranks


class ExchangeRule:
    """Which calls exchange counts first.

    Args:
        wanted: one of EXCHANGES.
    """

    def __init__(self, problem: Problem, wanted: str) -> None:
        link = exchange.GLOO if problem.on_host else exchange.NCCL
        self._exchange = wanted if problem.path == "collective" else "padded"
        self._padding = (problem.num_ranks - 1) * (1 - share_of_tokens(problem))
        self._worth_a_round_trip = link.bytes_per_second * link.round_trip

    def padding_bytes(self, slots: int, row_bytes: int) -> float:
        """Bytes that a rank is expected to send to the others for nothing in a padded dispatch and its combine.

        Args:
            slots: rows that a source may send to a rank.
            row_bytes: of a token in both directions together.
        """
        return self._padding * slots * row_bytes

    def is_exact(self, slots: int, row_bytes: int) -> bool:
        """Whether a dispatch, and hence its combine, is to be exact. More slots or bytes never make it padded."""
        if self._exchange == "auto":
            return self.padding_bytes(slots, row_bytes) > self._worth_a_round_trip
        return self._exchange == "exact"
