# SPDX-License-Identifier: Apache-2.0
"""Objects that a case makes for itself: constructors with hostile arguments, and calls in an order that cannot be."""

from __future__ import annotations

import copy
import pickle
import random
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import moegen
from moegen.compat import deep_ep, flashinfer, mooncake, mscclpp
from support import fuzz_values
from support.fuzz_cases import FATAL, FaultError, Stage, clean_trip
from support.fuzz_modes import around_call, around_case
from support.fuzz_surfaces import TIMEOUT, Surface

SHAPE = {
    "num_experts": ("number", 4), "num_topk": ("number", 2), "hidden": ("number", 64),
    "max_tokens_per_rank": ("number", 8), "num_sms": ("number", 2), "timeout": ("seconds", TIMEOUT),
    "path": ("word", "ipc"), "device": ("word", None), "first_epoch": ("number", 2),
}  # fmt: skip


def _moe_alltoall(world: Any, **given: Any) -> Any:
    mapping = flashinfer.Mapping(world.size, world.rank, tp_size=world.size, moe_ep_size=world.size)
    return flashinfer.MoeAlltoAll(mapping, **given, mnnvl_config=flashinfer.MnnvlConfig(comm_backend=world))


@dataclass(frozen=True)
class Making:
    """A constructor.

    Attributes:
        arguments: by name, the kind of `fuzz_values` and a value that fits.
        needed: those that it is always given.
        surface: whose round trip an object of its makes; None: it is only made and destroyed.
    """

    make: Callable[..., Any]
    arguments: dict[str, tuple[str, Any]]
    needed: tuple[str, ...]
    surface: str | None = None


_FOUR = ("num_experts", "num_topk", "hidden", "max_tokens_per_rank")
BYTES = {"num_nvl_bytes": ("number", 4096), "num_rdma_bytes": ("number", 0)}
MAKINGS = {
    "ExpertParallel": Making(
        moegen.ExpertParallel,
        {
            **SHAPE, "slots": ("number", 2), "wire": ("word", "auto"), "warp_groups": ("word", None),
            "quantize": ("word", None), "layout": ("word", "expert"), "mode": ("word", "capacity"),
            "dtype": ("word", torch.bfloat16), "family": ("word", "auto"), "active_ranks": ("flag", False),
        },
        (*_FOUR, "slots", "timeout"), "experts-ipc",
    ),
    "HighThroughput": Making(
        moegen.HighThroughput,
        {
            **SHAPE, "layout": ("word", "packed"), "mode": ("word", "capacity"), "alignment": ("number", 1),
            "dtype": ("word", torch.bfloat16), "scale_dtype": ("word", torch.float32), "quantize": ("word", None),
            "borrow": ("flag", False),
        },
        (*_FOUR, "layout", "timeout"), "rows-packed",
    ),
    "OneSided": Making(
        moegen.OneSided,
        {
            **SHAPE, "hidden": ("number", 128), "payload_bytes": ("number", 272), "exchange": ("word", "auto"),
            "copy": ("word", "auto"), "expert_rows": ("flag", True), "dtype": ("word", torch.bfloat16),
            "warp_groups": ("word", None), "payloads": ("sequence", [(128, torch.bfloat16)]),
        },
        (*_FOUR, "payload_bytes", "timeout"), "payloads-ipc",
    ),
    "deep_ep.Buffer": Making(
        deep_ep.Buffer, {**BYTES, "low_latency_mode": ("flag", True), "enable_shrink": ("flag", True)}, ()
    ),
    "deep_ep.ElasticBuffer": Making(
        deep_ep.ElasticBuffer,
        {
            "num_bytes": ("number", 4096), "num_max_tokens_per_rank": ("number", 8), "hidden": ("number", 512),
            "num_topk": ("number", 4), "use_fp8_dispatch": ("flag", False), "num_gpu_timeout_secs": ("number", 2),
        },
        (),
    ),
    "flashinfer.MoeAlltoAll": Making(
        _moe_alltoall,
        {
            "max_num_tokens": ("number", 8), "top_k": ("number", 2), "num_experts": ("number", 4),
            "hidden_size": ("number", 64), "workspace_size_per_rank": ("number", 1 << 16),
            "eplb_stats_num_experts": ("number", 4), "enable_rank_mask": ("flag", False),
        },
        ("max_num_tokens", "top_k", "num_experts", "hidden_size"),
    ),
    "mooncake.Buffer": Making(mooncake.Buffer, {"num_ep_buffer_bytes": ("number", 4096)}, ()),
    "mscclpp.Buffer": Making(mscclpp.Buffer, BYTES, ()),
    "LocalWorld": Making(
        lambda world, **given: moegen.LocalWorld(**given),
        {"num_ranks": ("number", 1), "device": ("word", "cpu")}, ("num_ranks",),
    ),
}  # fmt: skip

ENDS = (
    "destroy twice", "call after destroy", "warm up after destroy", "check after destroy", "use with", "copy",
    "destroy while hooks are open", "read after destroy",
)  # fmt: skip


@dataclass(frozen=True)
class Life:
    """What is tried: an object made with these changes of a constructor's arguments, and an end of it."""

    making: str
    ranks: int
    seed: int
    changes: tuple[tuple[str, str], ...] = ()
    mode: str = "none"
    end: str = ENDS[0]


def live(life: Life, surfaces: dict[str, Surface]) -> None:
    """
    Raises:
        FaultError: an object that was made does not work, or its end harms.
    """
    making = MAKINGS[life.making]
    chance = random.Random(life.seed)
    scene = fuzz_values.Scene(chance, {}, [], [])
    given = {name: making.arguments[name][1] for name in making.needed}
    for name, variant in life.changes:
        kind, value = making.arguments[name]
        try:
            given[name] = fuzz_values.make(kind, variant, 1 if value is None and kind == "number" else value, scene)
        except fuzz_values.NotApplicableError:
            continue
    world = moegen.LocalWorld(life.ranks)

    def made(rank: Any) -> Any:
        with around_call(life.mode):
            return making.make(rank, **given)

    try:
        with around_case(life.mode):
            objects = world.run(made)
    except FATAL:
        raise
    except Exception:  # whichever it is
        return
    try:
        if making.surface is not None and _fits(objects[0], surfaces[making.surface]):
            clean_trip(Stage(surfaces[making.surface], world, objects), life.seed)
        for each in objects:
            _end(each, life.end)
    except FaultError as fault:
        raise FaultError(f"{fault}\n{life}") from fault
    except Exception as error:
        raise FaultError(f"{''.join(traceback.format_exception(error))}\n{life}") from error
    finally:
        for each in objects:
            getattr(each, "destroy", lambda: None)()


def _fits(made: Any, surface: Surface) -> bool:
    """Whether its shape is the one that the round trip is for."""
    problem = made.problem
    same = (problem.num_experts, problem.num_topk, problem.hidden) == (surface.experts, surface.topk, surface.hidden)
    usual = problem.max_tokens == 8 and made.dtype == torch.bfloat16 and problem.layout in ("expert", "packed", "rank")
    return bool(same and usual and getattr(made, "alignment", 1) == 1)


def _end(made: Any, how: str) -> None:
    if not hasattr(made, "destroy"):
        return
    if how == "use with" and hasattr(made, "__enter__"):
        with made:
            pass
    if how == "copy":
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            _refused(lambda attempt=attempt: attempt(made), TypeError)
        return
    if how == "destroy while hooks are open" and isinstance(made, moegen.ExpertParallel) and made.problem.hooks:
        x = torch.zeros(0, made.problem.hidden, dtype=torch.bfloat16, device="cpu")
        ids = torch.zeros(0, made.problem.num_topk, dtype=torch.int64, device="cpu")
        _, hook = made.dispatch(x, ids, return_recv_hook=True)
        made.destroy()
        _refused(hook, moegen.errors.DestroyedError)
    made.destroy()
    made.destroy()
    if not isinstance(made, (moegen.ExpertParallel, moegen.HighThroughput, moegen.OneSided)):
        return
    calls: dict[str, Callable[[], Any]] = {
        "call after destroy": lambda: made.dispatch(None, None),
        "warm up after destroy": made.warmup,
        "check after destroy": made.check,
        "read after destroy": lambda: made.buffer_bytes,
    }
    if how in calls:
        _refused(calls[how], moegen.errors.DestroyedError)


def _refused(call: Callable[[], Any], kind: type[Exception]) -> None:
    try:
        call()
    except kind:
        return
    raise FaultError("a call that cannot be was not refused")
