# SPDX-License-Identifier: Apache-2.0
"""Sentences of the pages that state figures, with the committed figures that they state."""

from __future__ import annotations

from moegen.bench.committed import (
    Results,
    Run,
    Value,
    difference,
    eager,
    excess,
    least,
    link,
    most,
    seconds,
    speed,
    us,
)
from moegen.bench.page_runs import (
    A2A,
    COLL,
    HT,
    HT_TOKENS,
    IN_TURN_A2A,
    IN_TURN_HT,
    LL,
    LL_FP8,
    MOST,
    SHARE_26,
    before,
)
from moegen.bench.page_tables import A2A_TARGETS
from moegen.bench.pages import Reading
from moegen.bench.published import FLASHINFER, Op, stated_us

README, RESULTS, DESIGN, BENCHMARKS = "README.md", "bench/results/README.md", "docs/design.md", "docs/benchmarks.md"
SUITE = ("ll", "ll_fp8", "ht", "a2a", "coll", "coll_many")
LL_IN_TURN_R2 = Run("sweeps/ll_h200_r4_announced_later.txt", section="Two of them, the same kernels:")
LL_BEFORE_R2 = Run(
    "sweeps/ll_h200_r4_announced_later.txt", section="Two of them, the kernels before rows went back in turn:"
)
LL_R8_SWEEP = Run("sweeps/ll_h200_r8_before_turns.txt")
BEFORE_ROUTES = tuple(Run(f"before_routes/{run.file}") for run in (LL, LL_FP8))


def _met(results: Results) -> float:
    return float(sum(value(results) <= target for value, target in A2A_TARGETS))


def _less_than_flashinfer(tokens: int) -> Value:
    stated = stated_us(Op(2, "rank", "bf16", "pair_in_place", tokens), FLASHINFER)
    return lambda results: 1 - us(A2A, "pair_in_place", tokens)(results) / stated


def _by_handle(routing: str) -> Value:
    """How much longer a dispatch by a handle takes, at most."""
    kinds = [(layout, dtype) for layout in ("token", "packed") for dtype in ("bf16", "fp8_given")]
    return most(
        *(
            excess(*(us(HT, op, MOST, routing, layout=layout, dtype=dtype, num_sms=0) for op in ("cached", "dispatch")))
            for layout, dtype in kinds
        )
    )


def _hot(ranks: int, layout: str) -> Value:
    """How much longer dispatch of `ht` takes with one hot rank, before turns."""
    return excess(
        *(us(before(ranks, "ht"), "dispatch", MOST, to, layout=layout, dtype="bf16") for to in ("hot", "uniform"))
    )


def _eager_costs() -> list[Value]:
    return [
        difference(eager(COLL, "pair_us", tokens, "eager_exact"), eager(COLL, "pair_us", tokens, "eager_padded"))
        for tokens in (64, 128, 512, 2048, 8192)
    ]


def _ht_fp8_256(op: str) -> Value:
    return us(HT_TOKENS, op, 256, layout="token", dtype="fp8_given")


_FOUR_LINKS = [link(before(4, part)) for part in SUITE]
_FOUR_LINKS += [link(IN_TURN_HT)]
_EIGHT_LINKS = [link(before(8, part)) for part in SUITE]
_TWO_LINKS = [link(run) for run in (LL, LL_FP8, HT, HT_TOKENS, A2A, COLL)]
_R8_COMBINE = [us(LL_R8_SWEEP, "combine", 128, variant=name) for name in ("4x8 both", "1x16 base")]
_DISPATCH_SPEED = speed(HT, "dispatch", MOST, layout="token", dtype="bf16", num_sms=0)
_COMBINE_SPEED = speed(before(8, "ll"), "combine", 512)

READINGS = (
    Reading(
        README,
        "`HighThroughput` dispatch {:.0f} us in bfloat16 (`token`), combine {:.0f}; `OneSided` dispatch {:.0f}.",
        (
            us(SHARE_26, "dispatch", MOST, layout="token", dtype="bf16"),
            us(IN_TURN_HT, "combine", MOST, layout="token", dtype="bf16"),
            us(IN_TURN_A2A, "dispatch", MOST),
        ),
    ),
    Reading(
        README,
        "`ll` dispatch of 1 token {:.1f} in place of {:.1f} us",
        tuple(us(run, "dispatch", 1, variant="4x8 base", dtype="bf16") for run in (LL_IN_TURN_R2, LL_BEFORE_R2)),
    ),
    Reading(
        RESULTS,
        "that is {:.0f} of {:.0f} GB/s",
        (_DISPATCH_SPEED, link(HT)),
    ),
    Reading(
        RESULTS,
        "it takes up to {:.0%} longer with uniform routing and up to {:.0%} with zipf (both FP8 given, `token`); with "
        "256 tokens less (the same: {:.1f} in place of {:.1f} us)",
        (_by_handle("uniform"), _by_handle("zipf"), _ht_fp8_256("cached"), _ht_fp8_256("dispatch")),
    ),
    Reading(
        RESULTS,
        "a pair took {:.0%} less than with that commit for 1 token, {:.0%} less for 128 and {:.0%} less for 512.",
        tuple(map(_less_than_flashinfer, (1, 128, 512))),
    ),
    Reading(
        RESULTS,
        "but {:.1f} us for 512 tokens are more than the {:.1f} of rows made in FlashInfer's workspace.",
        (us(A2A, "pair", 512), lambda _: stated_us(Op(2, "rank", "bf16", "pair_in_place", 512), FLASHINFER)),
    ),
    Reading(RESULTS, "Targets met: {:.0f} of {:.0f}.", (_met, lambda _: float(len(A2A_TARGETS)))),
    Reading(
        RESULTS,
        "with 2,048 the two take the same time ({:.1f} and {:.1f} us), with 4,096 pushing is faster "
        "({:.1f} in place of {:.1f})",
        tuple(us(A2A, op, tokens) for tokens in (2048, 4096) for op in ("pair", "pair_in_place")),
    ),
    Reading(
        RESULTS,
        "took 9.3 us there and {:.1f} here for 1 token, 181.4 and {:.1f} for 2,048",
        tuple(us(A2A, "pair_in_place", tokens) for tokens in (1, 2048)),
    ),
    Reading(
        RESULTS,
        "on the machine of the table above {:.1f} to {:.1f}",
        tuple(us(A2A, "pair_in_place", tokens) for tokens in (1, 4096)),
    ),
    Reading(
        RESULTS,
        "where one of a single token takes {:.1f}.",
        (lambda results: us(A2A, "pair_in_place", 1)(results) / 2,),
    ),
    Reading(RESULTS, "Exact calls cost {:.0f} to {:.0f} us more", (least(*_eager_costs()), most(*_eager_costs()))),
    Reading(
        RESULTS,
        "Link: {:.0f} to {:.0f} GB/s per rank if all four push to all at once, {:.0f} to {:.0f} with eight "
        "({:.0f} to {:.0f} between two)",
        tuple(bound(*links) for links in (_FOUR_LINKS, _EIGHT_LINKS, _TWO_LINKS) for bound in (least, most)),
    ),
    Reading(
        RESULTS,
        "`ll` combine between eight moved {:.0f} GB/s of {:.0f}",
        (_COMBINE_SPEED, link(before(8, "ll"))),
    ),
    Reading(RESULTS, "(`sweeps/ll_h200_r8_before_turns`: {:.0f} to {:.0f} us)", tuple(_R8_COMBINE)),
    Reading(
        RESULTS,
        "with 1 token took {:.1f} us more with eight ranks than with two",
        (difference(us(before(8, "ll"), "dispatch", 1), us(LL, "dispatch", 1)),),
    ),
    Reading(
        RESULTS,
        "nothing in layout `token` and {:.0%} in `packed`, where that rank writes four times the rows; with eight it "
        "cost {:.0%} and {:.0%}.",
        (_hot(4, "packed"), _hot(8, "token"), _hot(8, "packed")),
    ),
    Reading(RESULTS, "({:.0f} s for the suite, all routings;", (seconds(Run("node_h100_processes_r2.json")),)),
    Reading(
        RESULTS,
        "has {:.1f} and {:.1f} us in bf16, {:.1f} and {:.1f} in FP8.",
        tuple(us(run, "dispatch", tokens) for run in BEFORE_ROUTES for tokens in (128, 512)),
    ),
    Reading(
        RESULTS,
        "in place of {:.1f} and {:.1f}.",
        tuple(us(LL, "combine_weighted", tokens) for tokens in (128, 512)),
    ),
    Reading(
        RESULTS,
        "four and eight H200, {:.0f} and {:.0f} s;",
        tuple(seconds(Run(f"before_turns/node_h200_processes_r{ranks}.json")) for ranks in (4, 8)),
    ),
    Reading(
        DESIGN,
        "combine between eight H200 moved {:.0f} GB/s of {:.0f} that way",
        (_COMBINE_SPEED, link(before(8, "ll"))),
    ),
    Reading(
        DESIGN,
        "; a pair of 4,096 is not ({:.0f} us, pushed {:.0f})",
        tuple(us(A2A, op, 4096) for op in ("pair_in_place", "pair")),
    ),
    Reading(
        BENCHMARKS,
        "two H100 took {:.0f} s, four H200 {:.0f} and eight {:.0f};",
        tuple(
            seconds(Run(f"{name}.json"))
            for name in (
                "node_h100_processes_r2",
                "before_turns/node_h200_processes_r4",
                "before_turns/node_h200_processes_r8",
            )
        ),
    ),
)
