# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's `Mapping`: which part of the model a rank has. Only what expert parallelism needs of it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

from moegen.compat.flashinfer.checks import CallError


@dataclass
class Mapping:
    """Ranks are numbered with tensor parallelism innermost, then context, then pipeline; the experts' ranks are
    innermost among those of tensor parallelism.

    Args:
        world_size, rank: of the whole model.
        gpus_per_node: kept as an attribute.
        tp_size, cp_size, pp_size: their product is world_size.
        moe_ep_size, moe_tp_size, moe_cluster_size: their product is tp_size. -1: what the others leave; without any,
            experts are not spread over ranks (moe_ep_size is 1).
        cp_config, attn_tp_size, attn_cp_size, auto_parallel, enable_attention_dp: kept as attributes.

    Raises:
        ValueError: sizes that do not multiply to what they should.
    """

    world_size: int = 1
    rank: int = 0
    gpus_per_node: int = 8
    _: KW_ONLY
    cp_size: int = 1
    cp_config: Any = None
    tp_size: int = 1
    pp_size: int = 1
    moe_cluster_size: int = -1
    moe_tp_size: int = -1
    moe_ep_size: int = -1
    attn_tp_size: int = -1
    attn_cp_size: int = -1
    auto_parallel: bool = False
    enable_attention_dp: bool = False

    def __post_init__(self) -> None:
        self.moe_cluster_size = max(self.moe_cluster_size, 1)
        if self.moe_ep_size == -1:
            self.moe_ep_size = 1 if self.moe_tp_size == -1 else self._share(self.moe_tp_size)
        if self.moe_tp_size == -1:
            self.moe_tp_size = self._share(self.moe_ep_size)
        model = self.tp_size * self.cp_size * self.pp_size
        if model != self.world_size and not self.auto_parallel:
            raise CallError(
                f"world_size is tp_size * cp_size * pp_size; got {self.world_size} and "
                f"{self.tp_size} * {self.cp_size} * {self.pp_size}"
            )
        if self.moe_tp_size * self.moe_ep_size * self.moe_cluster_size != self.tp_size:
            raise CallError(
                f"tp_size is moe_tp_size * moe_ep_size * moe_cluster_size; got {self.tp_size} and "
                f"{self.moe_tp_size} * {self.moe_ep_size} * {self.moe_cluster_size}"
            )
        if not 0 <= self.rank < self.world_size and not self.enable_attention_dp:
            raise CallError(f"rank is 0..{self.world_size - 1}; got {self.rank}")

    def _share(self, other: int) -> int:
        return self.tp_size // (other * self.moe_cluster_size)

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp_size % self.cp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp_size * self.cp_size)

    @property
    def moe_ep_rank(self) -> int:
        return self.tp_rank % self.moe_ep_size

    @property
    def moe_cluster_rank(self) -> int:
        return self.tp_rank % self.moe_cluster_size

    @property
    def moe_tp_rank(self) -> int:
        return self.tp_rank // (self.moe_ep_size * self.moe_cluster_size)

    @property
    def local_rank(self) -> int:
        return self.rank % self.gpus_per_node

    @property
    def node_rank(self) -> int:
        return self.rank // self.gpus_per_node

    def has_moe_ep(self) -> bool:
        return self.moe_ep_size > 1
