# SPDX-License-Identifier: Apache-2.0
"""The objects that the fuzz calls, each with its calls in order: well-formed arguments, and who judges the results."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import moegen
from moegen import functional
from support import fuzz_oracles as oracles
from support.fuzz_oracles import Done, Trip

Tensor = torch.Tensor
BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
MAX_TOKENS, TOKENS = 8, 5
TIMEOUT = 2.0
"""Of every object: seconds. Waits of a case are for a rank that was refused, and end at once."""


class Session:
    """One rank's round trip with an object.

    Attributes:
        kept: what its calls have returned, by step.
        hooks: those that were not called yet.
    """

    def __init__(self, surface: Surface, made: Any, world: Any, seed: int) -> None:
        self.surface, self.made, self.world = surface, made, world
        self.generator = torch.Generator(device="cpu").manual_seed(1000 * seed + world.rank)
        self.random = random.Random(seed)
        self.kept: dict[str, Any] = {}
        self.given: dict[str, Any] = {}
        self.hooks: list[Callable[[], None]] = []

    def floats(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        made = torch.randn(shape, generator=self.generator, dtype=F32, device="cpu")
        return made.to(dtype)

    def zeros(self, *shape: int, dtype: torch.dtype = I32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device="cpu")

    def ids(self, dtype: torch.dtype = I64) -> Tensor:
        experts, topk = self.surface.experts, self.surface.topk
        made = torch.rand(TOKENS, experts, generator=self.generator, dtype=F32, device="cpu").topk(topk, dim=1).indices
        made[0, 0] = -1
        return made.to(dtype)

    def weights(self) -> Tensor:
        return torch.rand(TOKENS, self.surface.topk, generator=self.generator, dtype=F32, device="cpu")

    def count(self) -> Tensor:
        return torch.full((1,), TOKENS - 1, dtype=I32, device="cpu")


@dataclass(frozen=True)
class Param:
    """A well-formed argument.

    Attributes:
        kind: of `fuzz_values.KINDS`.
        optional: whether calls do without, unless a case says otherwise.
        written: whether the call may write there.
        read: whether more of it than its shape and its address matters.
    """

    kind: str
    make: Callable[[Session], Any]
    optional: bool = False
    written: bool = False
    read: bool = True


@dataclass(frozen=True)
class Step:
    """A call.

    Attributes:
        judge: raises AssertionError if what all ranks' calls have done is wrong.
        unpack: the result proper, and what has to be called or waited for before it may be read, or None.
        handle: of a result.
        trusted: whether the arguments say what results are.
    """

    name: str
    method: Callable[[Any], Callable[..., Any]]
    params: dict[str, Param]
    judge: Callable[[Trip, Sequence[Done]], None]
    unpack: Callable[[Any], tuple[Any, Any]] | None = None
    handle: Callable[[Any], Any] = lambda result: getattr(result, "handle", None)
    trusted: Callable[[Done], bool] = lambda done: True


@dataclass(frozen=True)
class Surface:
    """An object and its round trip.

    Attributes:
        memory: the object's own.
        settle: makes the calls that a round trip which broke off has left out.
    """

    name: str
    experts: int
    topk: int
    hidden: int
    make: Callable[[Any], Any]
    steps: Sequence[Step]
    memory: Callable[[Any], list[Tensor]] = field(default=lambda made: [])
    settle: Callable[[Any], None] = field(default=lambda made: None)

    def trip(self) -> Trip:
        return Trip(self.experts, self.topk, MAX_TOKENS)


def scaled(rows: Tensor) -> Tensor:
    """What experts make of their rows; whatever lies in unused rows may be anything and is harmless."""
    return (rows.float() * 0.5).to(rows.dtype) if rows.is_floating_point() else rows.clone()


def _hook_of(result: Any) -> tuple[Any, Any]:
    return result if isinstance(result, tuple) else (result, None)


FLAG = Param("flag", lambda s: True, optional=True)
TIME = Param("seconds", lambda s: 5.0, optional=True)
SMS = Param("number", lambda s: 2, optional=True)


def experts(path: str, **options: Any) -> Surface:
    hidden = 64 if path == "ipc" else 8
    shape = {"num_experts": 4, "num_topk": 2, "hidden": hidden, "max_tokens_per_rank": MAX_TOKENS}

    def rows_shape(session: Session) -> tuple[int, ...]:
        return (len(session.made.local_experts), session.made.num_ranks * MAX_TOKENS, hidden)

    dispatch = Step(
        "dispatch",
        lambda made: made.dispatch,
        {
            "x": Param("tensor", lambda s: s.floats(TOKENS, hidden)),
            "topk_idx": Param("ids", Session.ids),
            "topk_weights": Param("tensor", Session.weights, optional=True),
            "num_tokens": Param("count", Session.count, optional=True),
            "out": Param("tensor", lambda s: s.zeros(*rows_shape(s), dtype=BF16), optional=True, written=True),
            "total_counts": Param("tensor", lambda s: s.zeros(len(s.made.local_experts)), optional=True, written=True),
            "timeout": TIME,
            "return_recv_hook": FLAG,
            "async_finish": FLAG,
        },
        _experts_dispatched,
        unpack=_hook_of,
    )
    combine = Step(
        "combine",
        lambda made: made.combine,
        {
            "y": Param("tensor", lambda s: scaled(s.kept["dispatch"].tokens)),
            "handle": Param("handle", lambda s: s.kept["dispatch"].handle),
            "topk_weights": Param("tensor", Session.weights, optional=True),
            "out": Param("tensor", lambda s: s.zeros(TOKENS, hidden, dtype=BF16), optional=True, written=True),
            "timeout": TIME,
            "renormalize": FLAG,
            "return_recv_hook": FLAG,
            "async_finish": FLAG,
        },
        oracles.experts_combined,
        unpack=_hook_of,
    )
    name = f"experts-{path}" + ("-active" if options.get("active_ranks") else "")
    return Surface(
        name, 4, 2, hidden,
        lambda world: moegen.ExpertParallel(world, path=path, slots=2, timeout=TIMEOUT, **shape, **options),
        (dispatch, combine),
    )  # fmt: skip


def _experts_dispatched(trip: Trip, calls: Sequence[Done]) -> None:
    oracles.experts_dispatched(trip, calls, [(r.tokens, r.counts, r.row_tokens) for r in _results(calls)])
    oracles.totals(calls, [want.counts for want in trip.expected])


def _results(calls: Sequence[Done]) -> list[Any]:
    return [call.result for call in calls]


def rows(name: str, path: str, layout: str, mode: str, hidden: int, **options: Any) -> Surface:
    number, topk = (4, 2) if path == "ipc" else (5, 3)
    shape = {"num_experts": number, "num_topk": topk, "hidden": hidden, "max_tokens_per_rank": MAX_TOKENS}

    def as_parts(received: moegen.DispatchedRows) -> dict[str, Any]:
        parts = ("tokens", "counts", "topk_idx", "topk_weights")
        return {part: getattr(received, part) for part in parts}

    def dispatched(trip: Trip, calls: Sequence[Done]) -> None:
        oracles.rows_dispatched(trip, calls, [as_parts(r) for r in _results(calls)], layout)
        oracles.totals(calls, [want.counts for want in trip.expected])

    def again(trip: Trip, calls: Sequence[Done]) -> None:
        oracles.rows_dispatched(trip, calls, [{"tokens": r.tokens} for r in _results(calls)], layout, again=True)

    def combined(trip: Trip, calls: Sequence[Done]) -> None:
        oracles.rows_combined(trip, calls, _results(calls), _is_weighted(calls))

    of_dispatch = {
        "x": Param("tensor", lambda s: s.floats(TOKENS, hidden)),
        "topk_idx": Param("ids", Session.ids),
        "topk_weights": Param("tensor", Session.weights, optional=True),
        "num_tokens": Param("count", Session.count, optional=True),
        "max_rows": Param("number", lambda s: s.made.max_rows, optional=True),
        "out": Param("tensor", lambda s: s.zeros(s.made.max_rows, hidden, dtype=BF16), optional=True, written=True),
        "out_scales": Param("tensor", lambda s: s.floats(8, 1, dtype=F32), optional=True, written=True),
        "total_counts": Param("tensor", lambda s: s.zeros(len(s.made.local_experts)), optional=True, written=True),
        "mode": Param("word", lambda s: s.random.choice(("exact", "capacity")), optional=True),
        "zero_unused": FLAG,
        "scales_by_column": FLAG,
        "num_sms": SMS,
        "timeout": TIME,
        "previous_event": Param("word", lambda s: None, optional=True),
        "async_finish": FLAG,
    }
    of_again = {
        "x": Param("tensor", lambda s: s.floats(TOKENS, hidden)),
        "handle": Param("handle", lambda s: s.kept["dispatch"].handle),
        "out": Param(
            "tensor",
            lambda s: s.zeros(s.kept["dispatch"].handle.rows, hidden, dtype=BF16),
            optional=True,
            written=True,
        ),
        "zero_unused": FLAG,
        "timeout": TIME,
    }
    of_combine = {
        "y": Param("tensor", lambda s: scaled(s.kept["again"].tokens)),
        "handle": Param("handle", lambda s: s.kept["dispatch"].handle),
        "topk_weights": Param(
            "tensor",
            lambda s: s.floats(*((len(s.kept["again"].tokens), topk)[: 2 if layout == "token" else 1]), dtype=F32),
            optional=True,
        ),
        "bias": Param("sequence", lambda s: [s.floats(TOKENS, hidden)], optional=True),
        "weighted": Param("flag", lambda s: True, optional=True),
        "out": Param("tensor", lambda s: s.zeros(TOKENS, hidden, dtype=BF16), optional=True, written=True),
        "num_sms": SMS,
        "timeout": TIME,
        "async_finish": FLAG,
    }
    layer = Param("ids", Session.ids)
    return Surface(
        name, number, topk, hidden,
        lambda world: moegen.HighThroughput(
            world, path=path, layout=layout, mode=mode, timeout=TIMEOUT, **shape, **options
        ),
        (
            Step("layout", lambda made: made.layout, {"topk_idx": layer}, _laid_out),
            Step("dispatch", lambda made: made.dispatch, of_dispatch, dispatched, unpack=_event_of),
            Step("again", lambda made: made.dispatch, of_again, again, unpack=_event_of),
            Step("combine", lambda made: made.combine, of_combine, combined, unpack=_sums_of),
        ),
    )  # fmt: skip


def _event_of(result: Any) -> tuple[Any, Any]:
    return result if isinstance(result, tuple) else (result, None)


def _sums_of(result: Any) -> tuple[Any, Any]:
    return result if isinstance(result[0], tuple) else (result, None)


def _is_weighted(calls: Sequence[Done]) -> bool:
    return bool(calls[0].seen.get("weighted", True))


def _laid_out(trip: Trip, calls: Sequence[Done]) -> None:
    for call in calls:
        ids, made = call.seen["topk_idx"], call.result
        for rank, held in enumerate(moegen.reference.expert_ranges(trip.experts, len(calls))):
            there = ((ids >= held.start) & (ids < held.stop)).any(dim=1)
            oracles.same("token_in_rank", made.token_in_rank[:, rank], there)
            assert int(made.tokens_per_rank[rank]) == int(there.sum()), "tokens_per_rank is wrong"
        for expert in range(trip.experts):
            number = int((ids == expert).any(dim=1).sum())
            assert int(made.tokens_per_expert[expert]) == number, "tokens_per_expert is wrong"


def differentiable() -> Surface:
    """`moegen.functional`, packed, backward included."""
    shape = {"num_experts": 4, "num_topk": 2, "hidden": 64, "max_tokens_per_rank": MAX_TOKENS}

    def dispatched(trip: Trip, calls: Sequence[Done]) -> None:
        received = [
            {"tokens": r.rows, "topk_weights": r.row_weights, "counts": r.handle.counts} for r in _results(calls)
        ]
        oracles.rows_dispatched(trip, calls, received, "packed")

    def combined(trip: Trip, calls: Sequence[Done]) -> None:
        oracles.rows_combined(trip, calls, [(call.result, None) for call in calls], _is_weighted(calls))

    return Surface(
        "functional", 4, 2, 64,
        lambda world: moegen.HighThroughput(world, layout="packed", timeout=TIMEOUT, **shape),
        (
            Step(
                "dispatch", lambda made: lambda *a, **k: functional.dispatch(made, *a, **k),
                {
                    "x": Param("tensor", lambda s: s.floats(TOKENS, 64)),
                    "topk_idx": Param("ids", Session.ids),
                    "topk_weights": Param("tensor", Session.weights, optional=True),
                    "max_rows": Param("number", lambda s: s.made.max_rows, optional=True),
                },
                dispatched,
            ),
            Step(
                "combine", lambda made: lambda *a, **k: functional.combine(made, *a, **k),
                {
                    "y": Param("tensor", lambda s: scaled(s.kept["dispatch"].rows)),
                    "handle": Param("handle", lambda s: s.kept["dispatch"].handle),
                    "weighted": Param("flag", lambda s: True, optional=True),
                },
                combined,
            ),
        ),
    )  # fmt: skip


def payloads(path: str, **options: Any) -> Surface:
    hidden = 128
    shape = {"num_experts": 4, "num_topk": 2, "hidden": hidden, "max_tokens_per_rank": MAX_TOKENS}

    def three(session: Session) -> list[Tensor]:
        return [session.floats(TOKENS, hidden), session.ids(I32), session.weights()]

    def dispatched(trip: Trip, calls: Sequence[Done]) -> None:
        results = _results(calls)
        counts, stats = [r.counts for r in results], [r.stats for r in results]
        oracles.payloads_dispatched(trip, calls, [r.payloads for r in results], counts, stats)

    def y(session: Session) -> Tensor:
        return scaled(session.kept["dispatch"].payloads[0]) if path == "ipc" else _rows_of(session)

    def _rows_of(session: Session) -> Tensor:
        return scaled(session.kept["dispatch"].payloads[0].contiguous())

    return Surface(
        f"payloads-{path}", 4, 2, hidden,
        lambda world: moegen.OneSided(world, path=path, payload_bytes=272, timeout=TIMEOUT, **shape, **options),
        (
            Step(
                "dispatch", lambda made: made.dispatch,
                {
                    "topk_idx": Param("ids", Session.ids),
                    "payloads": Param("sequence", three),
                    "max_tokens": Param("number", lambda s: MAX_TOKENS, optional=True),
                    "num_tokens": Param("count", Session.count, optional=True),
                    "unused_ids": Param("sequence", lambda s: (1, -1), optional=True),
                    "stats": Param("tensor", lambda s: s.ids(I32).flatten(), optional=True),
                    "active_ranks": Param("number", lambda s: 2**s.made.num_ranks - 1, optional=True),
                    "timeout": TIME,
                },
                dispatched,
            ),
            Step(
                "combine", lambda made: made.combine,
                {
                    "y": Param("tensor", y),
                    "handle": Param("handle", lambda s: s.kept["dispatch"].handle),
                    "out_dtype": Param("word", lambda s: BF16, optional=True),
                    "out": Param("tensor", lambda s: s.zeros(TOKENS, hidden, dtype=BF16), optional=True, written=True),
                    "output_scale": Param("tensor", lambda s: s.floats(1, dtype=F32), optional=True),
                    "scale_layout": Param("word", lambda s: "linear", optional=True),
                    "active_ranks": Param("number", lambda s: 2**s.made.num_ranks - 1, optional=True),
                    "timeout": TIME,
                },
                oracles.payloads_combined,
            ),
        ),
        memory=lambda made: [made._ops.memory.local],
    )  # fmt: skip


CORE = (
    experts("ipc"),
    experts("ipc", active_ranks=True),
    experts("collective"),
    rows("rows-token", "ipc", "token", "capacity", 128),
    rows("rows-packed", "ipc", "packed", "capacity", 64),
    rows("rows-exact", "ipc", "token", "exact", 128),
    rows("rows-collective", "collective", "packed", "exact", 24),
    differentiable(),
    payloads("ipc"),
    payloads("collective", exchange="padded"),
)
