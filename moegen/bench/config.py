# SPDX-License-Identifier: Apache-2.0
"""What a run of `moegen bench ll` measures. Equal on every rank; made once by the command line."""

from __future__ import annotations

from dataclasses import dataclass

from moegen.bench.routing import ROUTINGS
from moegen.checks import MAX_SLOTS
from moegen.errors import InputError
from moegen.kernels.ll import QUANTIZED, scale_words


@dataclass(frozen=True)
class LinkConfig:
    """How the link's limit is measured.

    Attributes:
        bytes: that each rank sends, to all others together.
        blocks: of a launch.
        threads: per block.
        in_flight: 16-byte accesses that a thread has under way.
        ops: pushes in a graph.
        replays: of that graph.
    """

    bytes: int
    blocks: int
    threads: int
    in_flight: int
    ops: int
    replays: int


GPU_LINK = LinkConfig(bytes=256 << 20, blocks=132, threads=512, in_flight=8, ops=10, replays=20)
HOST_LINK = LinkConfig(bytes=48 << 10, blocks=2, threads=64, in_flight=8, ops=1, replays=3)


@dataclass(frozen=True)
class LowLatencyConfig:
    """One run.

    Attributes:
        ranks: how many.
        device: "cuda" or "cpu".
        processes: one process per rank (and GPU); else virtual ranks in one process.
        preset: name of the model, or "" if the shape was given in numbers.
        hidden, num_experts, num_topk: the layer.
        tokens: tokens per rank, one case each.
        max_tokens: capacity; 0: each case's tokens.
        routings: names of `moegen.bench.routing`.
        ops: ops in a graph.
        replays: timed replays of each graph.
        calls: calls in each eager loop.
        link: how the link is measured.
        timeout: seconds that a kernel may wait for a rank.
        seed: of all random inputs.
        quantize: as ExpertParallel takes it; "": tokens are sent as they are.
        halves: sends in a recording, each with a slot of its own; their receives are the next recording. 0: none.
    """

    ranks: int
    device: str
    processes: bool
    preset: str
    hidden: int
    num_experts: int
    num_topk: int
    tokens: tuple[int, ...]
    max_tokens: int
    routings: tuple[str, ...]
    ops: int
    replays: int
    calls: int
    link: LinkConfig
    timeout: float = 30.0
    seed: int = 1
    quantize: str = ""
    halves: int = 0

    def __post_init__(self) -> None:
        for routing in self.routings:
            if routing not in ROUTINGS:
                raise InputError(f"routing is one of {', '.join(ROUTINGS)}; got {routing!r}")
        if self.quantize and self.quantize not in QUANTIZED:
            raise InputError(f"quantize is one of {', '.join(QUANTIZED)}; got {self.quantize!r}")
        for name, numbers in (("tokens", self.tokens), ("ops", (self.ops,)), ("calls", (self.calls,))):
            if not numbers or min(numbers) < 1:
                raise InputError(f"{name} are 1 or more; got {', '.join(map(str, numbers)) or 'none'}")
        if self.halves and not 2 <= self.halves <= MAX_SLOTS:
            raise InputError(f"halves are 0 (not timed) or 2..{MAX_SLOTS}: each takes a slot; got {self.halves}")
        if self.replays < 1 or not self.routings:
            raise InputError("a benchmark needs at least one replay and one routing")
        if self.max_tokens and self.max_tokens < max(self.tokens):
            raise InputError(f"max_tokens {self.max_tokens} is less than the {max(self.tokens)} tokens to be measured")

    @property
    def row_bytes(self) -> int:
        """Payload of one token and of one partial sum: bf16."""
        return 2 * self.hidden

    @property
    def combine_row_bytes(self) -> int:
        """Payload of one row as combine sends it."""
        return self.row_bytes

    @property
    def dispatch_row_bytes(self) -> int:
        """Payload of one token as dispatch sends it, its scales included."""
        if not self.quantize:
            return self.row_bytes
        return self.hidden + 4 * scale_words(self.hidden, QUANTIZED[self.quantize])

    @property
    def virtual(self) -> bool:
        """Whether several ranks share one device, so that nothing here is a measurement of a link."""
        return not self.processes

    @property
    def shape_word(self) -> str:
        """The layer in a file name."""
        return self.preset or f"h{self.hidden}_k{self.num_topk}_e{self.num_experts}"

    @property
    def command(self) -> str:
        """The command line that measures the same again."""
        shape = (
            f"--preset {self.preset}"
            if self.preset
            else f"--hidden {self.hidden} --experts {self.num_experts} --topk {self.num_topk}"
        )
        capacity = f" --max-tokens {self.max_tokens}" if self.max_tokens else ""
        quantize = f" --quantize {self.quantize}" if self.quantize else ""
        halves = f" --halves {self.halves}" if self.halves else ""
        return (
            f"moegen bench ll --ranks {self.ranks} --device {self.device} "
            f"--world {'processes' if self.processes else 'local'} --tokens {','.join(map(str, self.tokens))} {shape} "
            f"--routing {','.join(self.routings)}{capacity}{quantize}{halves} --ops {self.ops} "
            f"--replays {self.replays} --calls {self.calls} --seed {self.seed}"
        )
