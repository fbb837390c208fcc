# SPDX-License-Identifier: Apache-2.0
"""Sentences of the pages that state figures, with the committed figures that they state."""

from __future__ import annotations

from moegen.bench.committed import (
    Results,
    Value,
    beyond_link,
    difference,
    eager,
    excess,
    least,
    link,
    megabytes,
    most,
    seconds,
    speed,
    stage,
    us,
)
from moegen.bench.page_runs import (
    A2A,
    A2A_FOUR,
    ALONE_H100,
    COLL,
    HT,
    HT_FOUR,
    HT_LARGER_SHARE,
    HT_SHARE,
    HT_TOKENS,
    LL,
    LL_FOUR,
    LL_FP8,
    LL_SWEEP_BEFORE,
    LL_SWEEP_OF_TWO,
    MOST,
    NODE_FOUR,
    NODE_H100,
    PARTS_H100,
)
from moegen.bench.page_tables import A2A_TARGETS
from moegen.bench.pages import (
    BENCHMARKS,
    COLLECTIVE,
    DESIGN,
    HIGH_THROUGHPUT,
    HISTORY,
    INDEX,
    LOW_LATENCY,
    ONE_SIDED,
    README,
    Reading,
)
from moegen.bench.published import DEEPEP_V1, FLASHINFER, NCCL_EP, PPLX, Op, meets, stated_us, target_us


def _stated(op: Op, who: str) -> Value:
    return lambda _: stated_us(op, who)


def _aimed(op: Op) -> Value:
    return lambda _: target_us(op)


def _met(results: Results) -> float:
    return float(sum(meets(value(results), aim) for value, aim in A2A_TARGETS))


def _flashinfer(tokens: int) -> Value:
    return _stated(Op(2, "rank", "bf16", "pair_in_place", tokens), FLASHINFER)


def _less_than_flashinfer(tokens: int) -> Value:
    return lambda results: -excess(us(A2A, "pair_in_place", tokens), _flashinfer(tokens))(results)


def _by_handle(routing: str) -> Value:
    """How much longer a dispatch by a handle takes, at most."""
    kinds = [(layout, dtype) for layout in ("token", "packed") for dtype in ("bf16", "fp8_given")]
    return most(
        *(
            excess(*(us(HT, op, MOST, routing, layout=layout, dtype=dtype, num_sms=0) for op in ("cached", "dispatch")))
            for layout, dtype in kinds
        )
    )


def _eager_costs() -> list[Value]:
    return [
        difference(eager(COLL, "pair_us", tokens, "eager_exact"), eager(COLL, "pair_us", tokens, "eager_padded"))
        for tokens in (64, 128, 512, 2048, 8192)
    ]


def _ht_fp8_256(op: str) -> Value:
    return us(HT_TOKENS, op, 256, layout="token", dtype="fp8_given")


def _sent(what: str, layout: str, dtype: str) -> Value:
    return megabytes(HT, what, "dispatch", MOST, layout=layout, dtype=dtype, num_sms=24)


_MOVED, _PLACED = _sent("unique_remote", "token", "bf16"), _sent("unique_with_self", "token", "bf16")


def _moved_by_an_sm(results: Results) -> float:
    """GB/s of one of 24 SMs that dispatch, bytes sent and placed."""
    took = us(HT, "dispatch", MOST, layout="token", dtype="bf16", num_sms=24)(results)
    return (_MOVED(results) + _PLACED(results)) / took * 1e3 / 24


_TWO_LINKS = [link(run) for run in (LL, LL_FP8, HT, HT_TOKENS, A2A, COLL)]
_H100_LINKS = [link(run) for run in (*PARTS_H100, *ALONE_H100)]
_BEYOND = [beyond_link(run, op, 128) for run, op in ((LL, "dispatch"), (LL, "combine"), (LL_FP8, "dispatch"))]
_DISPATCH_SPEED = speed(HT, "dispatch", MOST, layout="token", dtype="bf16", num_sms=0)
_ONE_TOKEN = tuple(
    us(run, "dispatch", 1, variant="4x8 base", dtype="bf16") for run in (LL_SWEEP_OF_TWO, LL_SWEEP_BEFORE)
)

READINGS = (
    Reading(
        README,
        "`HighThroughput` dispatch {:.0f} us in bfloat16 (`token`), combine {:.0f}; `OneSided` dispatch {:.0f}.",
        (
            us(HT_SHARE, "dispatch", MOST, layout="token", dtype="bf16"),
            us(HT_FOUR, "combine", MOST, layout="token", dtype="bf16"),
            us(A2A_FOUR, "dispatch", MOST),
        ),
    ),
    Reading(README, "`ll` dispatch of 1 token {:.1f} in place of {:.1f} us", _ONE_TOKEN),
    # ---- the index ----
    Reading(
        INDEX,
        "to every other at once: {:.0f} to {:.0f} GB/s per rank and direction between two H200, {:.0f} between two "
        "H100, {:.0f} between four H200.",
        (least(*_TWO_LINKS), most(*_TWO_LINKS), least(*_H100_LINKS), link(HT_FOUR)),
    ),
    Reading(INDEX, "between two H200, {:.0f} between two H100,", (most(*_H100_LINKS),)),
    # ---- low latency ----
    Reading(
        LOW_LATENCY,
        "DeepEP 1.2.1 took {:.1f} us for the pair with FP8 dispatch of 128 tokens, on two H200 on 2026-11-23; moegen "
        "takes {:.1f}.",
        (_stated(Op(2, "expert", "fp8", "pair", 128), DEEPEP_V1), us(LL_FP8, "pair", 128)),
    ),
    Reading(
        LOW_LATENCY,
        "NCCL EP takes {:.0f} us for dispatch and {:.0f} for combine in bfloat16, pplx {:.0f} and {:.0f} with FP8 "
        "dispatch",
        tuple(
            _stated(Op(8, "expert", sent, op, 128), who)
            for sent, who in (("bf16", NCCL_EP), ("fp8", PPLX))
            for op in ("dispatch", "combine")
        ),
    ),
    Reading(
        LOW_LATENCY,
        "an op takes {:.0f} to {:.0f} us more than its bytes need on the link, and {:.0f} us more between four H200.",
        (least(*_BEYOND), most(*_BEYOND), beyond_link(LL_FOUR, "dispatch", 128)),
    ),
    Reading(LOW_LATENCY, "and {:.0f} us more between four H200.", (beyond_link(LL_FOUR, "combine", 128),)),
    Reading(LOW_LATENCY, "(dispatch of 1 token in bfloat16: {:.1f} us in place of {:.1f})", _ONE_TOKEN),
    Reading(
        LOW_LATENCY,
        "The goal with eight GPUs is {:.0f} us for the pair with FP8 dispatch of 128 tokens",
        (_aimed(Op(8, "expert", "fp8", "pair", 128)),),
    ),
    # ---- high throughput ----
    Reading(HIGH_THROUGHPUT, "that is {:.0f} of {:.0f} GB/s", (_DISPATCH_SPEED, link(HT))),
    Reading(
        HIGH_THROUGHPUT,
        "it takes up to {:.0%} longer with uniform routing and up to {:.0%} with zipf (both FP8 given, `token`); with "
        "256 tokens less (the same: {:.1f} in place of {:.1f} us)",
        (_by_handle("uniform"), _by_handle("zipf"), _ht_fp8_256("cached"), _ht_fp8_256("dispatch")),
    ),
    Reading(
        HIGH_THROUGHPUT,
        "{:.0f} here (24 blocks, bf16 `token`: {:.1f} MB sent and {:.0f} MB placed)",
        (_moved_by_an_sm, _MOVED, _PLACED),
    ),
    Reading(
        HIGH_THROUGHPUT,
        "Dispatch `packed` in FP8 sends {:.0f} MB per rank and places {:.0f}:",
        (_sent("unique_remote", "packed", "fp8_given"), _sent("selections", "packed", "fp8_given")),
    ),
    Reading(
        HIGH_THROUGHPUT,
        "with 42% it takes {:.0f} us in bfloat16 and {:.0f} in FP8.",
        tuple(us(HT_LARGER_SHARE, "dispatch", MOST, layout="token", dtype=dtype) for dtype in ("bf16", "fp8")),
    ),
    # ---- one-sided ----
    Reading(
        ONE_SIDED,
        "a pair took {:.0%} less than with that commit for 1 token, {:.0%} less for 128 and {:.0%} less for 512.",
        tuple(map(_less_than_flashinfer, (1, 128, 512))),
    ),
    Reading(
        ONE_SIDED,
        "but {:.1f} us for 512 tokens are more than the {:.1f} of rows made in FlashInfer's workspace.",
        (us(A2A, "pair", 512), _flashinfer(512)),
    ),
    Reading(ONE_SIDED, "Targets met: {:.0f} of {:.0f}.", (_met, lambda _: float(len(A2A_TARGETS)))),
    Reading(
        ONE_SIDED,
        "with 2,048 the two take the same time ({:.1f} and {:.1f} us), with 4,096 pushing is faster "
        "({:.1f} in place of {:.1f})",
        tuple(us(A2A, op, tokens) for tokens in (2048, 4096) for op in ("pair", "pair_in_place")),
    ),
    Reading(
        ONE_SIDED,
        "where one of a single token takes {:.1f}.",
        (lambda results: us(A2A, "pair_in_place", 1)(results) / 2,),
    ),
    # ---- collective ----
    Reading(COLLECTIVE, "Exact calls cost {:.0f} to {:.0f} us more", (least(*_eager_costs()), most(*_eager_costs()))),
    Reading(
        COLLECTIVE,
        "With 8,192 tokens packing rows takes {:.0f} us and summing them {:.0f}, beside {:.0f} and {:.0f} us of the "
        "exchanges",
        tuple(
            stage(COLL, what, 8192)
            for what in ("dispatch_pack", "combine_reduce", "dispatch_collective", "combine_collective")
        ),
    ),
    # ---- what the history says of the other pages' figures ----
    Reading(
        HISTORY,
        "took 9.3 us there and {:.1f} here for 1 token, 181.4 and {:.1f} for 2,048",
        tuple(us(A2A, "pair_in_place", tokens) for tokens in (1, 2048)),
    ),
    Reading(
        HISTORY,
        "on the machine of the page's table {:.1f} to {:.1f}",
        tuple(us(A2A, "pair_in_place", tokens) for tokens in (1, 4096)),
    ),
    Reading(
        HISTORY,
        "in place of {:.1f} and {:.1f}.",
        tuple(us(LL, "combine_weighted", tokens) for tokens in (128, 512)),
    ),
    # ---- documents ----
    Reading(
        DESIGN,
        "; a pair of 4,096 is not ({:.0f} us, pushed {:.0f})",
        tuple(us(A2A, op, 4096) for op in ("pair_in_place", "pair")),
    ),
    Reading(
        BENCHMARKS,
        "two H100 took {:.0f} s; four H200, with one routing and without collectives, {:.0f};",
        (seconds(NODE_H100), seconds(NODE_FOUR)),
    ),
)
