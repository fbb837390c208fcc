# SPDX-License-Identifier: Apache-2.0
"""Path collective: whether it pays to exchange counts first, so that only rows that are needed cross.

Without, every rank sends every rank as many rows as the call has room for: what nobody needs is padding. With, each
dispatch takes one more exchange of counts, for which the host waits before it enqueues the rest; combine knows them.

The rule takes what all ranks know before any count is known, so that they decide alike: the layer, the capacity of the
call and its bytes per token. It expects all tokens to be there, each with experts chosen uniformly: fewer tokens would
make exact better still.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from moegen.kernels.problem import Problem

EXCHANGES = ("auto", "padded", "exact")


@dataclass(frozen=True)
class Link:
    """What an all-to-all of torch.distributed takes.

    Attributes:
        bytes_per_second: of large ones, what a rank sends to the others.
        round_trip: seconds that an exchange of counts delays a dispatch, the host's waiting included.
    """

    bytes_per_second: float
    round_trip: float


NCCL = Link(280e9, 450e-6)
"""Two H200: 256 MiB per rank, half of it to the other, in 482 us; and a pair of 64 tokens called from Python in 387 us
padded, in 846 us exact (bench/results/coll_h200_processes_r2_h7168_k4_e16).
"""

GLOO = Link(0.6e9, 2.5e-3)
"""Four processes on two cores: 16 MiB to each other rank in 85 ms, a few bytes in 2.5 ms; two processes: 25 and 0.4."""


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
        exchange: one of EXCHANGES.
    """

    def __init__(self, problem: Problem, exchange: str) -> None:
        link = GLOO if problem.on_host else NCCL
        self._exchange = exchange if problem.path == "collective" else "padded"
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
