# SPDX-License-Identifier: Apache-2.0
"""What a run of `moegen bench a2a` measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegen.bench.config import LowLatencyConfig
from moegen.errors import InputError

EAGER_EXCHANGES = ("padded", "exact")


@dataclass(frozen=True)
class OneSidedConfig(LowLatencyConfig):
    """One run: bfloat16 tokens, int32 ids and float32 weights there, bfloat16 rows back. Each number of tokens is a
    capacity, too.

    Attributes:
        path: of the objects, as `OneSided`.
        exchanges: of path collective, those that calls from Python are measured with. What is recorded is padded: a
            graph cannot hold exact calls.
    """

    path: str = "ipc"
    exchanges: tuple[str, ...] = EAGER_EXCHANGES

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.exchanges or not set(self.exchanges) <= set(EAGER_EXCHANGES):
            raise InputError(f"exchange is padded, exact or both; got {', '.join(self.exchanges) or 'none'}")

    @property
    def ops_timed(self) -> tuple[str, ...]:
        """Names of ops: of path collective one that makes only the exchanges, of as many bytes as the routing needs."""
        both = ("dispatch", "combine", "pair")
        return (
            (*both, "pair_of_exchanges") if self.path == "collective" else (*both, "combine_in_place", "pair_in_place")
        )

    @property
    def payloads(self) -> tuple[tuple[int, torch.dtype], ...]:
        """(columns, dtype) of what a token brings: itself, ids and weights."""
        return (self.hidden, torch.bfloat16), (self.num_topk, torch.int32), (self.num_topk, torch.float32)

    @property
    def payload_widths(self) -> tuple[int, ...]:
        """Bytes of each."""
        return tuple(columns * dtype.itemsize for columns, dtype in self.payloads)

    @property
    def dispatch_row_bytes(self) -> int:
        return sum(self.payload_widths)

    @property
    def command(self) -> str:
        exchanges = f" --exchange {','.join(self.exchanges)}" if self.path == "collective" else ""
        return super().command.replace("moegen bench ll", f"moegen bench a2a --path {self.path}{exchanges}")
