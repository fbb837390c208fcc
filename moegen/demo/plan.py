# SPDX-License-Identifier: Apache-2.0
"""What the demo runs: preset, ranks, device, and the world that fits this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from moegen.codegen.render import render
from moegen.compile import host
from moegen.compile.binary import obtain, obtain_many
from moegen.compile.target import Target
from moegen.errors import InputError, UnsupportedPlatformError
from moegen.kernels.presets import Preset, preset
from moegen.kernels.problem import Problem
from moegen.runtime.worlds import LocalWorld
from moegen.select import select

FULL_SIZE_BYTES = 40 * 2**30
"""GPU memory that deepseek-v3 with its 22.5 GB of expert weights runs in with room to spare."""

DEFAULT_RANKS = 4


@dataclass(frozen=True)
class Plan:
    """One run of the demo.

    Attributes:
        num_ranks, tokens: tokens is per rank and step, and the capacity.
        device: "cpu" or "cuda".
        world: "processes" (gloo; on GPUs one each) or "local" (virtual ranks in one process).
    """

    preset: Preset
    num_ranks: int
    tokens: int
    steps: int
    device: str
    world: Literal["processes", "local"]

    @property
    def problem(self) -> Problem:
        layer = self.preset
        return Problem(
            num_ranks=self.num_ranks,
            num_experts=layer.num_experts,
            num_topk=layer.num_topk,
            hidden=layer.hidden,
            max_tokens=self.tokens,
            on_host=self.device == "cpu",
        )


@dataclass(frozen=True)
class Built:
    """The kernels of a plan: where they came from."""

    target: Target
    stems: tuple[str, ...]
    compiled: int
    cached: int


def make_plan(ranks: int, device: str, preset_name: str, tokens: int, steps: int) -> Plan:
    """Fills in what the user left open (0 or "") from what this machine has.

    Raises:
        InputError: a value that cannot be.
        UnsupportedPlatformError: CUDA was asked for and there is none.
    """
    gpus = torch.cuda.device_count()
    device = device or ("cuda" if gpus else "cpu")
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device is cpu or cuda; got {device!r}")
    if device == "cuda" and not gpus:
        raise UnsupportedPlatformError("--device cuda, but torch sees no GPU; see `moegen doctor`, or use --device cpu")
    if min(ranks, tokens) < 0 or steps < 1:
        raise InputError("--ranks and --tokens are positive numbers, --steps is 1 or more")
    ranks = ranks or (gpus if device == "cuda" and gpus > 1 else DEFAULT_RANKS)
    local = device == "cuda" and (gpus == 1 or ranks > gpus)
    name = preset_name or _default_preset(device)
    return Plan(preset(name), ranks, tokens or 64, steps, device, "local" if local else "processes")


def _default_preset(device: str) -> str:
    if device == "cpu":
        return "tiny"
    LocalWorld(1, "cuda")  # asks for enough hardware queues before CUDA starts
    return "deepseek-v3" if torch.cuda.mem_get_info()[1] >= FULL_SIZE_BYTES else "tiny"


def build(plan: Plan) -> Built:
    """Makes every kernel of the plan beforehand, in parallel; the ranks then find them in the cache."""
    if plan.device == "cuda":
        LocalWorld(1, "cuda")
        target = Target.for_capability(*torch.cuda.get_device_capability())
    else:
        target = Target("host")
    specs = select(plan.problem).specs
    binaries = obtain_many([render(spec) for spec in specs], target)
    if target.is_host:
        binaries = [obtain(host.runtime_source(), target), *binaries]
    compiled = sum(binary.origin == "compiled" for binary in binaries)
    return Built(target, tuple(spec.stem for spec in specs), compiled, len(binaries) - compiled)
