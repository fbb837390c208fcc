# SPDX-License-Identifier: Apache-2.0
"""The objects of `moegen.compat` that the fuzz calls, in shapes whose kernels other tests compile too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from moegen.compat import deep_ep, flashinfer, mooncake, mscclpp
from support import fuzz_oracles as oracles
from support.fuzz_oracles import Done, Trip
from support.fuzz_surfaces import (
    BF16,
    FLAG,
    I32,
    I64,
    MAX_TOKENS,
    TIMEOUT,
    TOKENS,
    Param,
    Session,
    Step,
    Surface,
    scaled,
)

Tensor = torch.Tensor
HIDDEN = 512

X = Param("tensor", lambda s: s.floats(TOKENS, s.surface.hidden))
IDS = Param("ids", Session.ids)
WEIGHTS = Param("tensor", Session.weights)
MOST = Param("number", lambda s: MAX_TOKENS)
EXPERTS = Param("number", lambda s: s.surface.experts)
OUT = Param("tensor", lambda s: s.zeros(TOKENS, s.surface.hidden, dtype=BF16), optional=True, written=True)
CONFIG = deep_ep.Config(4)


def _hook_or_event(event: int, hook: int | None) -> Callable[[Any], tuple[Any, Any]]:
    """Of a tuple: what has to be called before it may be read."""

    def unpack(result: Any) -> tuple[Any, Any]:
        if hook is not None and result[hook] is not None:
            return result, result[hook]
        stands_for_one = getattr(result[event], "event", result[event]) is not None
        return result, result[event].current_stream_wait if stands_for_one else None

    return unpack


def _event_that_waits(event: int, hook: int) -> Callable[[Any], tuple[Any, Any]]:
    def unpack(result: Any) -> tuple[Any, Any]:
        return result, result[hook] or (result[event] and result[event].wait)

    return unpack


def _experts_dispatched(counts: int, row_tokens: Callable[[Any], Tensor]) -> Callable[[Trip, Sequence[Done]], None]:
    def judged(trip: Trip, calls: Sequence[Done]) -> None:
        received = [(call.result[0], call.result[counts], row_tokens(call.result)) for call in calls]
        oracles.experts_dispatched(trip, calls, received)

    return judged


def _experts_combined(trip: Trip, calls: Sequence[Done]) -> None:
    for call in calls:
        ids, weights = call.seen["topk_idx"], call.seen["topk_weights"]
        call.seen["topk_weights"] = torch.where(ids < 0, 0.0, weights)
        call.result = call.result[0]
    oracles.experts_combined(trip, calls, "x")


def low_latency(name: str, make: Callable[[Any], Any], **options: Any) -> Surface:
    return Surface(
        name, 4, 2, HIDDEN, make,
        (
            Step(
                "dispatch", lambda made: partial(made.low_latency_dispatch, use_fp8=False),
                {
                    "x": X, "topk_idx": IDS,
                    "num_max_dispatch_tokens_per_rank": MOST, "num_experts": EXPERTS,
                    "cumulative_local_expert_recv_stats": Param(
                        "tensor", lambda s: s.zeros(s.surface.experts // s.world.size), optional=True, written=True
                    ),
                    "async_finish": FLAG, "return_recv_hook": FLAG,
                },
                _experts_dispatched(1, lambda result: result[2][0]), unpack=_hook_or_event(3, 4),
                handle=lambda result: result[2],
            ),
            Step(
                "combine", lambda made: made.low_latency_combine,
                {
                    "x": Param("tensor", lambda s: scaled(s.kept["dispatch"][0])),
                    "topk_idx": Param("ids", lambda s: s.given["topk_idx"]), "topk_weights": WEIGHTS,
                    "handle": Param("handle", lambda s: s.kept["dispatch"][2]),
                    "async_finish": FLAG, "return_recv_hook": FLAG, "out": OUT,
                },
                _experts_combined, unpack=_hook_or_event(1, 2),
            ),
        ),
    )  # fmt: skip


def _all_active(done: Done) -> bool:
    given = done.seen["active_ranks"]
    return isinstance(given, Tensor) and bool((given == 1).all())


def _mooncake() -> Surface:
    active = Param("count", lambda s: torch.ones(s.world.size, dtype=I32, device="cpu"))
    microseconds = Param("number", lambda s: 2_000_000)
    return Surface(
        "mooncake.Buffer", 4, 2, HIDDEN, mooncake.Buffer,
        (
            Step(
                "dispatch", lambda made: partial(made.dispatch, use_fp8=False),
                {
                    "x": X, "topk_idx": IDS, "active_ranks": active,
                    "num_max_dispatch_tokens_per_rank": MOST, "num_experts": EXPERTS, "timeout_us": microseconds,
                    "async_finish": FLAG, "return_recv_hook": FLAG,
                },
                _experts_dispatched(1, lambda result: result[2][0]), unpack=_hook_or_event(3, 4),
                handle=lambda result: result[2], trusted=_all_active,
            ),
            Step(
                "combine", lambda made: made.combine,
                {
                    "x": Param("tensor", lambda s: scaled(s.kept["dispatch"][0])),
                    "topk_idx": Param("ids", lambda s: s.given["topk_idx"]), "topk_weights": WEIGHTS,
                    "active_ranks": active, "timeout_us": microseconds,
                    "handle": Param("handle", lambda s: s.kept["dispatch"][2]),
                    "async_finish": FLAG, "return_recv_hook": FLAG, "out": OUT,
                },
                _experts_combined, unpack=_hook_or_event(1, 2), trusted=_all_active,
            ),
        ),
    )  # fmt: skip


def _mscclpp_low_latency() -> Surface:
    def part(index: int) -> Callable[[Session], Any]:
        return lambda s: s.kept["dispatch"][index]

    def given(dtype: torch.dtype, *shape: Any) -> Param:
        def make(session: Session) -> Tensor:
            sizes = {"experts": session.surface.experts // session.world.size, "ranks": session.world.size}
            sizes |= {"rows": session.world.size * MAX_TOKENS, "hidden": HIDDEN}
            return session.zeros(*(sizes[word] for word in shape), dtype=dtype)

        return Param("tensor", make, optional=True, written=True)

    no_hook = {"async_finish": Param("flag", lambda s: False), "return_recv_hook": Param("flag", lambda s: False)}
    return Surface(
        "mscclpp.Buffer-low-latency", 8, 4, HIDDEN, mscclpp.Buffer,
        (
            Step(
                "dispatch", lambda made: partial(made.low_latency_dispatch, use_fp8=False),
                {
                    "x": X, "topk_idx": IDS,
                    "num_max_dispatch_tokens_per_rank": MOST, "num_experts": EXPERTS, **no_hook,
                    "out_packed_recv_x": given(BF16, "experts", "rows", "hidden"),
                    "out_packed_recv_src_info": given(I32, "experts", "rows"),
                    "out_packed_recv_layout_range": given(I64, "experts", "ranks"),
                    "out_packed_recv_count": given(I32, "experts"),
                },
                _experts_dispatched(2, lambda result: result[3]), unpack=_event_that_waits(5, 6),
            ),
            Step(
                "combine", lambda made: partial(made.low_latency_combine, zero_copy=False),
                {
                    "x": Param("tensor", lambda s: scaled(s.kept["dispatch"][0])),
                    "topk_idx": Param("ids", lambda s: s.given["topk_idx"]), "topk_weights": WEIGHTS,
                    "src_info": Param("tensor", part(3), read=False),
                    "layout_range": Param("tensor", part(4), read=False),
                    "num_max_dispatch_tokens_per_rank": MOST, "num_experts": EXPERTS, **no_hook, "out": OUT,
                },
                _experts_combined, unpack=_event_that_waits(1, 2),
            ),
        ),
    )  # fmt: skip


def _rows_dispatched(trip: Trip, calls: Sequence[Done]) -> None:
    received = [dict(zip(("tokens", "topk_idx", "topk_weights"), call.result[:3], strict=True)) for call in calls]
    oracles.rows_dispatched(trip, calls, received, "token")


def _rows_combined(trip: Trip, calls: Sequence[Done]) -> None:
    oracles.rows_combined(trip, calls, [call.result for call in calls], y="x")


def _weights_that_came(index: int) -> Param:
    return Param("tensor", lambda s: s.floats(*s.kept["dispatch"][index].shape, dtype=torch.float32), optional=True)


BIAS = Param("tensor", lambda s: s.floats(TOKENS, s.surface.hidden), optional=True)


def _timed(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def timed(world: Any) -> Any:
        made = make(world)
        made.timeout = TIMEOUT
        return made

    return timed


def _normal() -> Surface:
    def laid(index: int) -> Param:
        return Param("tensor", lambda s: s.kept["layout"][index], read=False)

    return Surface(
        "deep_ep.Buffer-normal", 8, 4, HIDDEN, _timed(lambda world: deep_ep.Buffer(world, 4096)),
        (
            Step("layout", lambda made: made.get_dispatch_layout,
                 {"topk_idx": IDS, "num_experts": EXPERTS, "async_finish": FLAG}, lambda trip, calls: None,
                 unpack=_hook_or_event(4, None)),
            Step(
                "dispatch", lambda made: partial(made.dispatch, config=CONFIG),
                {
                    "x": X, "num_tokens_per_rank": laid(0), "is_token_in_rank": laid(3),
                    "num_tokens_per_expert": laid(2), "topk_idx": Param("ids", lambda s: s.given["topk_idx"]),
                    "topk_weights": WEIGHTS, "async_finish": FLAG,
                    "expert_alignment": Param("number", lambda s: 1, optional=True),
                    "num_worst_tokens": Param("number", lambda s: MAX_TOKENS * s.world.size, optional=True),
                },
                _rows_dispatched, unpack=_hook_or_event(5, None), handle=lambda result: result[4],
            ),
            Step(
                "combine", lambda made: partial(made.combine, config=CONFIG),
                {
                    "x": Param("tensor", lambda s: scaled(s.kept["dispatch"][0])),
                    "handle": Param("handle", lambda s: s.kept["dispatch"][4]),
                    "topk_weights": _weights_that_came(2), "bias": BIAS, "async_finish": FLAG,
                },
                _rows_combined, unpack=_hook_or_event(2, None),
            ),
        ),
    )  # fmt: skip


def _elastic() -> Surface:
    def make(world: Any) -> Any:
        made = deep_ep.ElasticBuffer(world, num_max_tokens_per_rank=MAX_TOKENS, hidden=HIDDEN)
        made.timeout = TIMEOUT
        return made

    return Surface(
        "deep_ep.ElasticBuffer", 8, 4, HIDDEN, make,
        (
            Step(
                "dispatch", lambda made: made.dispatch,
                {
                    "x": X, "topk_idx": IDS, "topk_weights": WEIGHTS, "num_experts": EXPERTS,
                    "num_max_tokens_per_rank": Param("number", lambda s: MAX_TOKENS, optional=True),
                    "num_sms": Param("number", lambda s: 2, optional=True),
                    "cumulative_local_expert_recv_stats": Param(
                        "tensor", lambda s: s.zeros(s.surface.experts // s.world.size), optional=True, written=True
                    ),
                    "do_handle_copy": FLAG, "do_zero_padding": FLAG, "async_with_compute_stream": FLAG,
                },
                _rows_dispatched, unpack=_hook_or_event(4, None), handle=lambda result: result[3],
            ),
            Step(
                "combine", lambda made: made.combine,
                {
                    "x": Param("tensor", lambda s: scaled(s.kept["dispatch"][0])),
                    "handle": Param("handle", lambda s: s.kept["dispatch"][3]),
                    "topk_weights": _weights_that_came(2), "bias": BIAS, "async_with_compute_stream": FLAG,
                },
                _rows_combined, unpack=_hook_or_event(2, None),
            ),
        ),
    )  # fmt: skip


def _intranode() -> Surface:
    no = Param("flag", lambda s: False)

    def laid(index: int) -> Param:
        return Param("tensor", lambda s: s.kept["layout"][index], read=False)

    def came(index: int) -> Param:
        return Param("tensor", lambda s: s.kept["dispatch"][index], read=False)

    def dispatched(trip: Trip, calls: Sequence[Done]) -> None:
        parts = [(call.result[0], call.result[2], call.result[3]) for call in calls]
        received = [dict(zip(("tokens", "topk_idx", "topk_weights"), part, strict=True)) for part in parts]
        oracles.rows_dispatched(trip, calls, received, "token")

    streams = {"previous_event": Param("word", lambda s: None), "async_finish": no, "allocate_on_comm_stream": no}
    return Surface(
        "mscclpp.Buffer-intranode", 8, 4, HIDDEN, mscclpp.Buffer,
        (
            Step("layout", lambda made: made.get_dispatch_layout,
                 {"topk_idx": IDS, "num_experts": EXPERTS, **streams}, lambda trip, calls: None,
                 unpack=_hook_or_event(4, None)),
            Step(
                "dispatch", lambda made: partial(
                    made.intranode_dispatch, x_scales=None, cached_num_recv_tokens=0, cached_rank_prefix_matrix=None,
                    cached_channel_prefix_matrix=None, expert_alignment=1, config=CONFIG,
                ),
                {
                    "x": X, "topk_idx": Param("ids", lambda s: s.given["topk_idx"]), "topk_weights": WEIGHTS,
                    "num_tokens_per_rank": laid(0), "is_token_in_rank": laid(3), "num_tokens_per_expert": laid(2),
                    **streams,
                },
                dispatched, unpack=_hook_or_event(10, None),
            ),
            Step(
                "combine", lambda made: partial(made.intranode_combine, config=CONFIG),
                {
                    "x": Param("tensor", lambda s: scaled(s.kept["dispatch"][0])),
                    "topk_weights": Param("tensor", lambda s: s.floats(*s.kept["dispatch"][3].shape).float()),
                    "src_idx": came(8), "rank_prefix_matrix": came(5), "recv_channel_prefix_matrix": came(7),
                    "send_head": came(9), **streams,
                },
                _rows_combined, unpack=_hook_or_event(2, None),
            ),
        ),
    )  # fmt: skip


def _moe_alltoall() -> Surface:
    hidden = 64
    ids, parts, most = "token_selected_experts", "input_payloads", "runtime_max_tokens_per_rank"

    def make(world: Any) -> Any:
        mapping = flashinfer.Mapping(world.size, world.rank, tp_size=world.size, moe_ep_size=world.size)
        config = flashinfer.MnnvlConfig(comm_backend=world)
        made = flashinfer.MoeAlltoAll(mapping, MAX_TOKENS, 2, 4, hidden_size=hidden, mnnvl_config=config)
        made.timeout = TIMEOUT
        return made

    def three(session: Session) -> list[Tensor]:
        return [session.floats(TOKENS, hidden), session.ids(I32), session.weights()]

    def dispatched(trip: Trip, calls: Sequence[Done]) -> None:
        received = [call.result for call in calls]
        oracles.payloads_dispatched(trip, calls, received, None, None, (ids, parts, most, "eplb_local_stats"))

    def combined(trip: Trip, calls: Sequence[Done]) -> None:
        oracles.payloads_combined(trip, calls, "payload", "output_dtype")

    def settle(made: Any) -> None:
        """A dispatch whose combine was refused still wants one."""
        if made._phase == "dispatched":
            slots = made._sent.slots
            made.combine(torch.zeros(made.ep_size, slots, hidden, dtype=BF16, device="cpu"), slots)

    return Surface(
        "flashinfer.MoeAlltoAll", 4, 2, hidden, make,
        (
            Step(
                "dispatch", lambda made: made.dispatch,
                {
                    ids: Param("ids", lambda s: s.ids(I32)), parts: Param("sequence", three), most: MOST,
                    "invalid_token_expert_id": Param("number", lambda s: -1, optional=True),
                    "expert_id_payload_index": Param("number", lambda s: 1, optional=True),
                },
                dispatched,
            ),
            Step(
                "combine", lambda made: made.combine,
                {
                    "payload": Param("tensor", lambda s: scaled(s.kept["dispatch"][0])), most: MOST,
                    "payload_in_workspace": FLAG, "output_dtype": Param("word", lambda s: BF16, optional=True),
                    "output": OUT,
                },
                combined,
            ),
        ),
        settle=settle,
    )  # fmt: skip


COMPAT = (
    low_latency("deep_ep.Buffer-low-latency", _timed(lambda world: deep_ep.Buffer(world, 0, 4096, enable_shrink=True))),
    _normal(),
    _elastic(),
    _mooncake(),
    _mscclpp_low_latency(),
    _intranode(),
    _moe_alltoall(),
)
