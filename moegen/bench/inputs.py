# SPDX-License-Identifier: Apache-2.0
"""What ops are fed with. Everything follows from seeds, so every rank can compute what the others hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegen.bench.config import LowLatencyConfig
from moegen.bench.routing import draw
from moegen.reference import expert_ranges
from moegen.runtime.worlds import RankWorld

TABLE_ROWS = 251
"""Different rows that expert outputs are made of."""

_L2_TIMES = 2
"""Buffers rotate over at least this many times the L2 cache, where memory and the number of ops allow."""

_MEMORY_SHARE = 0.3
"""Of the device's memory, for the rotating buffers of all its ranks."""

_HOST_BUFFERS = 2


@dataclass(frozen=True)
class Rotation:
    """How many buffers the ops of a recording rotate over, and what that means for the L2 cache.

    Attributes:
        tokens: buffers of tokens and of combine's results.
        rows: buffers of dispatch's results and of expert outputs.
        token_bytes: that one rank's rotating token buffers hold.
        row_bytes: the same for expert outputs, only rows that are in use, on average over ranks.
        l2_bytes: the device's L2 cache; 0 on a CPU.
    """

    tokens: int
    rows: int
    token_bytes: int
    row_bytes: int
    l2_bytes: int

    @property
    def note(self) -> str:
        """Which inputs lie in L2 although they rotate, or ""."""
        small = [
            name
            for name, size in (("tokens", self.token_bytes), ("expert outputs", self.row_bytes))
            if size < self.l2_bytes
        ]
        return f"{' and '.join(small)} fit into L2 although they rotate" if small else ""


def plan_rotation(
    config: LowLatencyConfig, tokens: int, max_tokens: int, *, l2_bytes: int, memory_bytes: int, ranks_per_device: int
) -> Rotation:
    """How many buffers to make; a pure function of what is equal on all ranks.

    Args:
        memory_bytes: of the device, 0 on a CPU.
        ranks_per_device: ranks that share it.
    """
    token_bytes = tokens * config.row_bytes
    used = tokens * config.num_topk * config.row_bytes
    least = max(1, config.halves)  # calls whose hooks are open write into buffers of their own
    if not memory_bytes:
        count = max(min(_HOST_BUFFERS, config.ops), least)
        return Rotation(count, count, count * token_bytes, count * used, 0)
    local_experts = -(-config.num_experts // config.ranks)
    both = 2 * local_experts * config.ranks * max_tokens * config.row_bytes  # one for dispatch, one for combine
    room = int(memory_bytes * _MEMORY_SHARE) // ranks_per_device // both
    wanted = -(-_L2_TIMES * l2_bytes // token_bytes), -(-_L2_TIMES * l2_bytes // used)
    token_buffers = max(min(config.ops, wanted[0]), least)
    row_buffers = max(min(config.ops, wanted[1], room), least)
    return Rotation(token_buffers, row_buffers, token_buffers * token_bytes, row_buffers * used, l2_bytes)


class Buffers:
    """One rank's inputs and outputs for a number of tokens.

    Attributes:
        x: rotating tokens, [tokens, hidden] each.
        quantize: as in the configuration.
        out: rotating tokens of dispatch's results, [local experts, ranks * max_tokens, hidden].
        y: rotating expert outputs, same shape.
        combined: rotating results of combine, [tokens, hidden].
    """

    def __init__(self, world: RankWorld, config: LowLatencyConfig, tokens: int, max_tokens: int) -> None:
        self.rotation = rotation_here(world, config, tokens, max_tokens)
        self.tokens = tokens
        self.expert_rows = config.ranks * max_tokens
        self._config = config
        self._experts = expert_ranges(config.num_experts, config.ranks)
        device, dtype = world.device, torch.bfloat16
        count, rows = self.rotation.tokens, self.rotation.rows
        self._tokens_of_all = [self._make_tokens(rank, tokens + count).to(device) for rank in range(config.ranks)]
        generator = torch.Generator(device="cpu").manual_seed(config.seed)
        self.table = torch.randn(TABLE_ROWS, config.hidden, generator=generator, device="cpu", dtype=torch.float32).to(
            dtype
        )
        table = self.table.to(device)
        shape = (len(self._experts[world.rank]), self.expert_rows, config.hidden)
        self.x = [self.x_of(world.rank, index).clone() for index in range(count)]
        self.combined = [torch.empty(tokens, config.hidden, dtype=dtype, device=device) for _ in range(count)]
        self.quantize = config.quantize
        received = torch.float8_e4m3fn if config.quantize else dtype
        self.out = [torch.empty(shape, dtype=received, device=device) for _ in range(rows)]
        self.y = [table[self.table_rows(world.rank, index).to(device)] for index in range(rows)]

    def x_of(self, rank: int, index: int) -> torch.Tensor:
        """The tokens of any rank in the index-th buffer."""
        return self._tokens_of_all[rank][index : index + self.tokens]

    def table_rows(self, rank: int, index: int) -> torch.Tensor:
        """Which row of the table each row of a rank's index-th expert output is: int64 [local experts, rows]."""
        local = torch.arange(len(self._experts[rank]), dtype=torch.int64, device="cpu").unsqueeze(1)
        row = torch.arange(self.expert_rows, dtype=torch.int64, device="cpu").unsqueeze(0)
        return (rank * 101 + local * 37 + row * 5 + index * 3) % TABLE_ROWS

    def _make_tokens(self, rank: int, rows: int) -> torch.Tensor:
        generator = torch.Generator(device="cpu").manual_seed(self._config.seed * 1_000_003 + rank)
        return torch.randn(rows, self._config.hidden, generator=generator, device="cpu", dtype=torch.float32).to(
            torch.bfloat16
        )


@dataclass(frozen=True)
class Batch:
    """A routing, drawn anew for every recording.

    Attributes:
        ids, weights: of every rank, on the CPU: int64 and float32 [tokens, topk].
        own_ids, own_weights: this rank's, on its device.
    """

    ids: list[torch.Tensor]
    weights: list[torch.Tensor]
    own_ids: torch.Tensor
    own_weights: torch.Tensor

    @staticmethod
    def draw(world: RankWorld, config: LowLatencyConfig, tokens: int, routing: str, seed: int) -> Batch:
        ids = draw(routing, config.ranks, tokens, config.num_experts, config.num_topk, seed)
        generator = torch.Generator(device="cpu").manual_seed(seed + 1)
        weights = (
            torch.rand(config.ranks, tokens, config.num_topk, generator=generator, device="cpu", dtype=torch.float32)
            + 0.1
        )
        weights /= weights.sum(dim=2, keepdim=True)
        own = ids[world.rank].contiguous().to(world.device), weights[world.rank].contiguous().to(world.device)
        return Batch(ids, list(weights.unbind(0)), *own)


def rotation_here(world: RankWorld, config: LowLatencyConfig, tokens: int, max_tokens: int) -> Rotation:
    """The plan for this rank's device; all devices of a run are alike."""
    l2_bytes = memory_bytes = 0
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        l2_bytes, memory_bytes = int(properties.L2_cache_size), int(properties.total_memory)
    return plan_rotation(
        config,
        tokens,
        max_tokens,
        l2_bytes=l2_bytes,
        memory_bytes=memory_bytes,
        ranks_per_device=world.ranks_per_device,
    )
