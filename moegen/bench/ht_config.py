# SPDX-License-Identifier: Apache-2.0
"""What a run of `moegen bench ht` measures."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegen.bench.config import LowLatencyConfig
from moegen.errors import InputError
from moegen.kernels.ht import FORMATS
from moegen.kernels.ll import FP8_GROUP

LAYOUTS = ("token", "packed")
DTYPES = {"bf16": "bf16", "fp8": "fp8", "fp8_given": "e4m3"}
"""How dispatch's tokens are given and travel: bfloat16; quantised on the way; quantised by the caller."""

OPS = ("dispatch", "cached", "combine")
"""Dispatch of a new routing; of the same routing again, by its handle; combine, always of bfloat16."""


@dataclass(frozen=True)
class HighThroughputConfig(LowLatencyConfig):
    """One run. Each number of tokens is a capacity too.

    Attributes:
        layouts: words of LAYOUTS.
        dtypes: words of DTYPES.
        num_sms: blocks per launch, for the first number of tokens and the first routing only; 0: all. The others are
            measured with all.
        alignment: of layout packed.
    """

    layouts: tuple[str, ...] = LAYOUTS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    num_sms: tuple[int, ...] = (0,)
    alignment: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, given, known in (("layouts", self.layouts, LAYOUTS), ("dtypes", self.dtypes, tuple(DTYPES))):
            if not given or not set(given) <= set(known):
                raise InputError(f"{name} are of {', '.join(known)}; got {', '.join(given) or 'none'}")
        if not self.num_sms or min(self.num_sms) < 0:
            raise InputError("give at least one of --num-sms, which is 0 (all) or more")
        if any(FORMATS[DTYPES[dtype]].scales_per_word for dtype in self.dtypes) and self.hidden % FP8_GROUP:
            raise InputError(f"hidden is a multiple of {FP8_GROUP} in FP8; got {self.hidden}")

    def moved_bytes(self, dtype: str) -> int:
        """Of one token as dispatch sends it, its scales included."""
        form = FORMATS[DTYPES[dtype]]
        scales = 4 * (self.hidden // FP8_GROUP) if form.scales_per_word else 0
        return self.hidden * form.element_bytes + scales

    @staticmethod
    def options(dtype: str) -> dict[str, object]:
        """Of `HighThroughput`."""
        if dtype == "fp8_given":
            return {"dtype": torch.float8_e4m3fn}
        return {"quantize": dtype} if dtype == "fp8" else {}

    @property
    def command(self) -> str:
        """The command line that measures the same again."""
        shape = f"--hidden {self.hidden} --experts {self.num_experts} --topk {self.num_topk}"
        return (
            f"moegen bench ht --ranks {self.ranks} --device {self.device} "
            f"--world {'processes' if self.processes else 'local'} --tokens {','.join(map(str, self.tokens))} {shape} "
            f"--routing {','.join(self.routings)} --layouts {','.join(self.layouts)} --dtypes {','.join(self.dtypes)} "
            f"--num-sms {','.join(map(str, self.num_sms))} --alignment {self.alignment} --ops {self.ops} "
            f"--replays {self.replays} --calls {self.calls} --seed {self.seed}"
        )
