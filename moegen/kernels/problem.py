# SPDX-License-Identifier: Apache-2.0
"""`Problem`: what a user asked for, in values that are equal on every rank."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.errors import InputError
from moegen.kernels.integers import settle_integers


@dataclass(frozen=True)
class Problem:
    """One MoE layer's communication. Never holds a rank's own number of tokens.

    Attributes:
        num_ranks, num_experts, num_topk, hidden: the layer.
        max_tokens: capacity, tokens per rank.
        dtype: of the tokens as they travel, a word of `moegen.kernels.ll.SCALES_PER_WORD`.
        layout: of what dispatch returns, e.g. "expert".
        path: "ipc".
        on_host: the ranks run on CPUs, where a thread costs a switch and not a lane.
        hooks: whether an op may be launched in two halves.
        masked: whether ranks may be missing.
        borrowed: whether dispatch leaves rows where they were received.
        wire, copy, warp_groups: the user's choice in place of the tables', or "auto" and None.
    """

    num_ranks: int
    num_experts: int
    num_topk: int
    hidden: int
    max_tokens: int
    dtype: str = "bf16"
    layout: str = "expert"
    path: str = "ipc"
    on_host: bool = False
    hooks: bool = False
    masked: bool = False
    borrowed: bool = False
    wire: str = "auto"
    copy: str = "auto"
    warp_groups: str | None = None

    def __post_init__(self) -> None:
        settle_integers(self, InputError)

    @property
    def every_rank(self) -> int:
        """The mask of active ranks with all of them in it: bit r is rank r."""
        return (1 << self.num_ranks) - 1

    def local_experts(self, rank: int) -> range:
        """The experts of a rank: a contiguous share; the first `num_experts % num_ranks` ranks hold one more."""
        share, larger = divmod(self.num_experts, self.num_ranks)
        first = rank * share + min(rank, larger)
        return range(first, first + share + (rank < larger))
