# SPDX-License-Identifier: Apache-2.0
"""How much memory a run of the demo needs, and how much there is: a layer that does not fit is refused beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from moegen.demo.plan import Plan
from moegen.errors import CapacityError
from moegen.kernels.ll import regions
from moegen.kernels.presets import PRESETS
from moegen.select import select

PROCESS_BYTES = 300 * 10**6
"""Of one Python process with torch, on the CPU."""

_BF16, _FP32, _FP64 = 2, 4, 8


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs at its worst moment, in the memory that is shared by most of it.

    Attributes:
        weights: of the experts.
        buffers: symmetric memory.
        rows: what dispatch returns and combine takes, with room for all that may come.
        working: float32 weights of the expert that is computed, or the dense layer's sums, whichever is more.
        processes: the programs themselves.
    """

    weights: int
    buffers: int
    rows: int
    working: int
    processes: int

    @property
    def total(self) -> int:
        return sum(astuple(self))

    def __str__(self) -> str:
        parts = zip(("weights", "buffers", "rows", "working memory", "processes"), astuple(self), strict=True)
        named = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts if size)
        return f"{gigabytes(self.total)} ({named})"


def needed(plan: Plan) -> Need:
    """Of all ranks together, or of one GPU where each has its own."""
    layer, problem = plan.preset, plan.problem
    own_gpu = plan.device == "cuda" and plan.world == "processes"
    sharing = 1 if own_gpu else plan.num_ranks
    experts = len(problem.local_experts(0)) if own_gpu else layer.num_experts
    matrix = layer.hidden * layer.ffn
    selection = select(problem)
    dispatch = regions(selection.dispatch, plan.tokens, 0)
    rows = experts * plan.num_ranks * plan.tokens * layer.hidden * _BF16
    on_cpu = plan.device == "cpu" and plan.world == "processes"
    return Need(
        weights=experts * 3 * matrix * _BF16,
        buffers=sharing * regions(selection.combine, plan.tokens, dispatch.end).end,
        rows=2 * rows,
        working=max(sharing * 2 * matrix * _FP32, _dense(plan)),
        processes=(plan.num_ranks + 1) * PROCESS_BYTES if on_cpu else 0,
    )


def _dense(plan: Plan) -> int:
    """Of the dense layer, which is computed behind the ranks: sums over each rank's experts and six more of that size,
    an expert's weights twice.
    """
    layer = plan.preset
    numbers = plan.num_ranks * plan.steps * plan.tokens * layer.hidden
    return ((plan.num_ranks + 6) * numbers + 6 * layer.hidden * layer.ffn) * _FP64


def available(plan: Plan) -> int:
    """Bytes that are free: on the fullest of the GPUs that take part; on the CPU for all processes together."""
    if plan.device == "cuda":
        gpus = plan.num_ranks if plan.world == "processes" else 1
        return min(torch.cuda.mem_get_info(gpu)[0] for gpu in range(gpus))
    return min([_free_memory(), *_left_in_groups()])


def check(plan: Plan) -> tuple[Need, int]:
    """What a run needs and what there is.

    Raises:
        CapacityError: it does not fit; the text names both numbers and what does fit.
    """
    need, there = needed(plan), available(plan)
    if need.total > there:
        raise CapacityError(
            f"{plan.preset.name} with {plan.num_ranks} ranks on {plan.device} needs {need}, and {gigabytes(there)} are "
            f"free: use {_advice(plan, there)}"
        )
    return need, there


def _advice(plan: Plan, there: int) -> str:
    """The largest smaller layer that fits, or fewer ranks and tokens of the smallest one."""
    others = sorted((needed(replace(plan, preset=layer)).total, name) for name, layer in PRESETS.items())
    fitting = [name for total, name in others if total <= there]
    if fitting:
        return f"--preset {fitting[-1]}"
    fewer = f"--ranks {max(1, plan.num_ranks // 2)} or --tokens {max(1, plan.tokens // 2)}"
    return f"--preset {others[0][1]} with fewer, e.g. {fewer}"


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"


def _free_memory() -> int:
    """What the machine says can be had without swapping; without /proc, no bound."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 2**63


def _left_in_groups(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What the memory limits of this process's control groups leave, its own and those around it."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        if controllers not in ("", "memory"):
            continue
        base = root if controllers == "" else root / "memory"
        names = ("memory.max", "memory.current") if controllers == "" else _FIRST_VERSION
        inside = base / path.lstrip("/")
        for folder in (inside, *(parent for parent in inside.parents if parent.is_relative_to(base))):
            left = _left(folder, *names)
            if left is not None:
                yield left


_FIRST_VERSION = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _left(folder: Path, limit: str, usage: str) -> int | None:
    """Cached files are given back when memory is short."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = int(numbers.get("total_inactive_file", numbers.get("inactive_file", 0)))
        return max(0, int(most) - int((folder / usage).read_text()) + cached)
    except (OSError, ValueError):
        return None
