# SPDX-License-Identifier: Apache-2.0
"""The layer across ranks: dispatch, experts, combine, on every rank and step."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from moegen import leftovers
from moegen.demo.layer import CONTEXT, Expert, make_embedding, make_expert, make_router
from moegen.demo.plan import Plan
from moegen.demo.progress import reported
from moegen.demo.text import piece, text
from moegen.expert_parallel import ExpertParallel
from moegen.runtime.worlds import GroupWorld, LocalWorld, RankWorld

OPS = ("dispatch", "experts", "combine")
TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class RankResult:
    """What one rank did, on the CPU. The first dimension of each tensor is the step.

    Attributes:
        x: [steps, tokens, hidden] bfloat16, what was dispatched.
        ids, weights: [steps, tokens, topk], the router's choice.
        out: [steps, tokens, hidden] bfloat16, what combine returned.
        seconds: [steps, 3] float64, of OPS.
        world: in words.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor
    seconds: torch.Tensor
    world: str


def run(plan: Plan) -> list[RankResult]:
    """Runs the plan in its world; results in rank order."""
    if plan.world == "local":
        return LocalWorld(plan.num_ranks, plan.device).run(_run_rank, plan)
    with leftovers.folder("demo") as folder:
        spawn(_process, (plan, str(folder)), nprocs=plan.num_ranks)
        files = [folder / f"{rank}.pt" for rank in range(plan.num_ranks)]
        return [RankResult(**torch.load(file, weights_only=True)) for file in files]


def _process(rank: int, plan: Plan, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (2 * plan.num_ranks)))
    device = torch.device("cpu")
    if plan.device == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=plan.num_ranks)
    try:
        result = _run_rank(GroupWorld(device=device), plan)
        torch.save(asdict(result), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _run_rank(world: RankWorld, plan: Plan) -> RankResult:
    layer = plan.preset
    ep = ExpertParallel(
        world,
        num_experts=layer.num_experts,
        num_topk=layer.num_topk,
        hidden=layer.hidden,
        max_tokens_per_rank=plan.tokens,
        timeout=TIMEOUT_SECONDS,
    )
    with ep:
        mine = reported(ep.local_experts, "experts made by rank 0", silent=world.rank != 0)
        experts = [make_expert(layer, expert, world.device) for expert in mine]
        ep.warmup()
        return _run_steps(ep, world, plan, experts)


def _run_steps(ep: ExpertParallel, world: RankWorld, plan: Plan, experts: list[Expert]) -> RankResult:
    embedding = make_embedding(plan.preset, world.device)
    router = make_router(plan.preset, world.device)
    content = text()
    steps = []
    for step in reported(range(plan.steps), "steps", silent=world.rank != 0):
        start = (step * world.size + world.rank) * plan.tokens
        x = embedding(piece(content, start, CONTEXT - 1 + plan.tokens))
        ids, weights = router(x)
        out, times = _run_step(ep, world, experts, x, ids, weights)
        steps.append(
            (x.cpu(), ids.cpu(), weights.cpu(), out.cpu(), torch.tensor(times, dtype=torch.float64, device="cpu"))
        )
    x, ids, weights, out, seconds = (torch.stack(parts) for parts in zip(*steps, strict=True))
    return RankResult(x, ids, weights, out, seconds, world.description)


def _run_step(
    ep: ExpertParallel,
    world: RankWorld,
    experts: list[Expert],
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, list[float]]:
    clock = _Clock(ep, world)
    received = clock(ep.dispatch, x, ids, weights)
    y = clock(run_experts, experts, received.tokens, received.counts)
    out = clock(ep.combine, y, received.handle)
    return out, clock.seconds


def run_experts(experts: list[Expert], tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Every local expert on its rows of [local experts, rows, hidden]; the rows beyond its count stay undefined."""
    y = torch.empty_like(tokens)
    for local, rows in enumerate(counts.tolist()):
        if rows:
            y[local, :rows] = experts[local](tokens[local, :rows])
    return y


class _Clock:
    """Times calls, launch to end; all ranks start each of them together."""

    def __init__(self, ep: ExpertParallel, world: RankWorld) -> None:
        self._ep = ep
        self._world = world
        self.seconds: list[float] = []

    def __call__(self, call: Any, *arguments: Any) -> Any:
        self._ep.synchronize()
        self._world.barrier()
        started = time.perf_counter()
        result = call(*arguments)
        self._ep.synchronize()
        self.seconds.append(time.perf_counter() - started)
        return result
