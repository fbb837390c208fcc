# SPDX-License-Identifier: Apache-2.0
"""Starts the ranks of a benchmark: threads, one process each, or those that torchrun has started."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from moegen import env, leftovers
from moegen.bench.failure import BenchError
from moegen.errors import InputError
from moegen.runtime.worlds import GroupWorld, LocalWorld, RankWorld

Json = dict[str, Any]


class Placed(Protocol):
    """What of a configuration says where the ranks are."""

    @property
    def ranks(self) -> int: ...

    @property
    def device(self) -> str: ...

    @property
    def processes(self) -> bool: ...


Config = TypeVar("Config", bound=Placed)
Measure = Callable[[RankWorld, Config], Json]

_RESULT = "result.json"
_LONGEST_WAIT = timedelta(minutes=5)
"""For a rank that computes or compiles while the others wait; a rank that waits longer gives up."""


def under_torchrun() -> bool:
    """Whether this process is a rank already."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def world_size() -> int:
    """How many processes torchrun has started."""
    return int(os.environ["WORLD_SIZE"])


def run(measure: Measure[Config], config: Config) -> Json | None:
    """What rank 0's `measure` returned; None in the other processes of torchrun.

    Args:
        measure: a function of a module: other processes import it.

    Raises:
        BenchError: a rank's process failed; the text has its error.
        InputError: there are too few GPUs.
    """
    needed = config.ranks if config.processes and not under_torchrun() else 1
    if config.device == "cuda" and torch.cuda.device_count() < needed:
        raise InputError(f"{needed} GPUs are needed, and torch sees {torch.cuda.device_count()}")
    if under_torchrun():
        result = _run_rank(measure, config, int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0")), "env://")
        return result if os.environ["RANK"] == "0" else None
    if config.processes:
        return _run_processes(measure, config)
    return LocalWorld(config.ranks, config.device).run(_prepared, measure, config)[0]


def _run_processes(measure: Measure[Config], config: Config) -> Json:
    from torch.multiprocessing.spawn import ProcessException, spawn

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all on this machine, whatever its name resolves to
    with leftovers.folder("bench") as folder:
        try:
            spawn(_process, args=(measure, config, str(folder)), nprocs=config.ranks)
        except ProcessException as error:
            raise BenchError(f"a rank failed: {error}") from None
        result: Json = json.loads((folder / _RESULT).read_text())
    return result


def _process(rank: int, measure: Measure[Config], config: Config, folder: str) -> None:
    env.configure_logging()
    torch.set_num_threads(1)  # of ranks that share the cores; more threads each wait for one another
    result = _run_rank(measure, config, rank, rank, f"file://{folder}/store")
    if rank == 0:
        (Path(folder) / _RESULT).write_text(json.dumps(result))


def _run_rank(measure: Measure[Config], config: Config, rank: int, local_rank: int, store: str) -> Json:
    import torch.distributed as dist

    cuda = config.device == "cuda"
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # Object collectives go by the CPU's backend; tensors are exchanged by that of their device.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        init_method=store,
        rank=rank,
        world_size=config.ranks,
        timeout=_LONGEST_WAIT,
    )
    # Graphs cannot be captured on the default stream.
    with torch.cuda.stream(torch.cuda.Stream(device)) if cuda else nullcontext():
        result = _prepared(GroupWorld(None, device), measure, config)
    if cuda:
        torch.cuda.synchronize(device)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _prepared(world: RankWorld, measure: Measure[Config], config: Config) -> Json:
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        torch.zeros(1, dtype=torch.int32, device=world.device).add_(1)  # makes the GPU's context current in this thread
        torch.cuda.current_stream(world.device).synchronize()
    with torch.no_grad():
        return measure(world, config)
