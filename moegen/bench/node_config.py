# SPDX-License-Identifier: Apache-2.0
"""What a run of `moegen bench --suite node` measures: all families over the GPUs of one host, part after part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moegen.bench import a2a, ht, ll
from moegen.bench.a2a_config import OneSidedConfig
from moegen.bench.case import OPS as LL_OPS
from moegen.bench.config import LowLatencyConfig
from moegen.bench.ht_config import OPS as HT_OPS
from moegen.bench.ht_config import HighThroughputConfig
from moegen.bench.stems import specs_of
from moegen.errors import InputError
from moegen.kernels.spec import Spec

LL_TOKENS = (1, 128, 512)
HT_TOKENS = (4096,)
A2A_TOKENS = (1, 64, 128, 512, 4096)
COLL_TOKENS = (64,)
COLL_LAYER: dict[str, Any] = {"num_experts": 16, "num_topk": 4}
"""Of part `coll`: what Mooncake published for its exchange over collectives."""

HT_DTYPES = ("bf16", "fp8_given")

VIRTUAL_TOKENS, HOST_TOKENS = 64, 8
"""Tokens per rank at most, if nobody says: virtual ranks share a GPU's memory and the interpreter that verifies."""


@dataclass(frozen=True)
class Counts:
    """How much is timed on GPUs: ops in a recording, its replays, and calls from Python."""

    ops: int
    replays: int
    calls: int


COUNTS = {"ll": Counts(50, 40, 20), "ht": Counts(10, 40, 5), "a2a": Counts(20, 40, 20)}
"""By family. Ops of few tokens need many in a recording to rotate through L2; those of thousands are long enough."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one case on GPUs of their own, verification included.

    Attributes:
        case: whatever its size.
        token: more for each of a rank's tokens: the reference of `ll` runs on the CPU.
        everyone: more for each token of all ranks: every rank draws all routings and computes what the others hold.
    """

    case: float
    token: float
    everyone: float


COSTS: dict[type[LowLatencyConfig], Cost] = {
    LowLatencyConfig: Cost(0.06, 5e-4, 9.3e-4),
    HighThroughputConfig: Cost(0.02, 0.0, 3.2e-5),
    OneSidedConfig: Cost(0.05, 0.0, 6.8e-5),
}
"""By family, fitted to the seconds that the parts took with two, four and eight GPUs (61, 119 and 226 s in all; 90 with
two others, see bench/results): nearly all of it is verification, of which every rank has more with more ranks.
"""

START_SECONDS = 20.0
"""Processes, CUDA and NCCL."""


@dataclass(frozen=True)
class Part:
    """One family with one configuration.

    Attributes:
        name: in results and on the command line.
        measure: of the family, a function of a module: other processes import it.
        config: its configuration.
    """

    name: str
    measure: Callable[..., dict[str, Any]]
    config: LowLatencyConfig


@dataclass(frozen=True)
class NodeConfig:
    """One run; equal on every rank.

    Attributes:
        base: the layer, the ranks and the seed; parts have tokens and counts of their own.
        parts: what is measured, in this order.
        folder: where rank 0 keeps the JSON after every part.
        command: the command line that measures the same again.
    """

    base: LowLatencyConfig
    parts: tuple[Part, ...]
    folder: str
    command: str

    @property
    def ranks(self) -> int:
        return self.base.ranks

    @property
    def device(self) -> str:
        return self.base.device

    @property
    def processes(self) -> bool:
        return self.base.processes

    @property
    def specs(self) -> list[Spec]:
        """Every kernel of the run, each once."""
        return list(dict.fromkeys(spec for part in self.parts for spec in specs_of(part.config)))

    @property
    def estimate_seconds(self) -> float | None:
        """About how long it takes on GPUs, without compiling; None on a CPU, whose speed nothing is known of."""
        if self.device != "cuda":
            return None
        return START_SECONDS + sum(map(_seconds, self.parts))


def parts_of(
    base: LowLatencyConfig, counts: tuple[int, int, int], most_tokens: int, names: tuple[str, ...]
) -> tuple[Part, ...]:
    """The parts of the suite.

    Args:
        base: with the routings that are wanted.
        counts: ops, replays and calls of every part; 0: what fits the family and the device.
        most_tokens: cases with more tokens per rank are measured with so many; 0: what fits the device.
        names: of parts; empty: all that this world can have.

    Raises:
        InputError: a name that is none, or a shape that a family does not have.
    """
    most = most_tokens or (HOST_TOKENS if base.device == "cpu" else VIRTUAL_TOKENS if base.virtual else max(HT_TOKENS))
    low, high, sided = (_sized(base, family, counts) for family in ("ll", "ht", "a2a"))
    few, many = replace(low, tokens=_capped(LL_TOKENS, most)), _capped(HT_TOKENS, most)
    # Chunks of full capacity are exchanged over collectives, whatever the routing.
    exchanged = replace(sided, routings=base.routings[:1], tokens=many)
    as_published = replace(exchanged, tokens=_capped(COLL_TOKENS, most), preset="", **COLL_LAYER)
    parts = [
        Part("ll", ll.measure, few),
        Part("ll_fp8", ll.measure, replace(few, quantize="fp8")),
        Part("ht", ht.measure, HighThroughputConfig(**vars(replace(high, tokens=many)), dtypes=HT_DTYPES)),
        Part("a2a", a2a.measure, OneSidedConfig(**vars(replace(sided, tokens=_capped(A2A_TOKENS, most))))),
        Part("coll", a2a.measure, OneSidedConfig(**vars(as_published), path="collective")),
        Part("coll_many", a2a.measure, OneSidedConfig(**vars(exchanged), path="collective")),
    ]
    if base.virtual and base.device == "cuda":
        parts = [part for part in parts if not part.name.startswith("coll")]  # threads of one GPU have no nccl
    known = [part.name for part in parts]
    if not set(names) <= set(known):
        raise InputError(f"parts of this world are {', '.join(known)}; got {', '.join(names)}")
    return tuple(part for part in parts if not names or part.name in names)


def cases_of(config: LowLatencyConfig) -> int:
    """How many ops are timed for each number of tokens."""
    if isinstance(config, HighThroughputConfig):
        ops = sum(len(HT_OPS) if dtype == "bf16" else len(HT_OPS) - 1 for dtype in config.dtypes)
        return len(config.layouts) * ops * len(config.routings)
    ops = len(config.ops_timed) if isinstance(config, OneSidedConfig) else len(LL_OPS)
    return ops * len(config.routings)


def _seconds(part: Part) -> float:
    config, cost = part.config, COSTS[type(part.config)]
    shared = config.ranks if config.virtual else 1  # virtual ranks verify one after the other
    return shared * sum(
        cases_of(config) * (cost.case + tokens * (cost.token + config.ranks * cost.everyone))
        for tokens in config.tokens
    )


def _sized(base: LowLatencyConfig, family: str, counts: tuple[int, int, int]) -> LowLatencyConfig:
    usual = COUNTS[family] if base.device == "cuda" else base
    ops, replays, calls = counts
    return replace(base, ops=ops or usual.ops, replays=replays or usual.replays, calls=calls or usual.calls)


def _capped(tokens: tuple[int, ...], most: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(min(number, most) for number in tokens))
