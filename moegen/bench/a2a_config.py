# SPDX-License-Identifier: Apache-2.0
"""What a run of `moegen bench a2a` measures."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.bench.config import LowLatencyConfig


@dataclass(frozen=True)
class OneSidedConfig(LowLatencyConfig):
    """One run: bfloat16 tokens, int32 ids and float32 weights there, bfloat16 rows back. Each number of tokens is a
    capacity, too.
    """

    @property
    def dispatch_row_bytes(self) -> int:
        return self.row_bytes + 8 * self.num_topk

    @property
    def command(self) -> str:
        return super().command.replace("moegen bench ll", "moegen bench a2a")
