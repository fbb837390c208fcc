# SPDX-License-Identifier: Apache-2.0
"""Published tables of other machines than two H200: four H200, and two H100. Each family's page has its own."""

from __future__ import annotations

from moegen.bench.committed import Run, share, us
from moegen.bench.page_runs import (
    A2A_FOUR,
    A2A_H100,
    COLL_H100,
    COLL_MANY_H100,
    HT_FOUR,
    HT_H100,
    HT_SHARE,
    LL_FP8_H100,
    LL_H100,
    LL_SWEEP,
    LL_SWEEP_OF_TWO,
    MOST,
)
from moegen.bench.pages import Cell, Table, joined, number, with_percent

LAYOUTS = ("token", "packed")


def _of_link(run: Run, op: str, tokens: int, **more: str) -> Cell:
    """Microseconds, and the share of the link."""
    return with_percent(us(run, op, tokens, **more), share(run, op, tokens, **more))


# ---- four H200 ----

_SWEPT = (1, 128, 512)


def _swept(title: str, op: str, dtype: str, four: tuple[str, ...], two: tuple[str, ...]) -> tuple[Cell, ...]:
    """`four`, `two`: the variants of the sweep that are launched for each number of tokens."""

    def cell(tokens: int, of_four: str, of_two: str) -> Cell:
        return joined(
            number(us(LL_SWEEP, op, tokens, variant=of_four, dtype=dtype)),
            number(us(LL_SWEEP_OF_TWO, op, tokens, variant=of_two, dtype=dtype)),
        )

    return title, *map(cell, _SWEPT, four, two)


_SENDS = ("4x8 base", "1x4 base", "1x4 base")
_ADDS, _ADDS_OF_TWO = ("1x8 base", "1x8 send share 0.7", "1x8 send share 0.7"), ("1x8 base",) * 3

_LL_FOUR = Table(
    "low-latency-four",
    ("us, four GPUs / two of them; tokens per rank", *map(str, _SWEPT)),
    (
        _swept("dispatch, bfloat16", "dispatch", "bf16", _SENDS, _SENDS),
        _swept("dispatch, FP8", "dispatch", "fp8", _SENDS, _SENDS),
        _swept("combine, bfloat16", "combine", "bf16", _ADDS, _ADDS_OF_TWO),
    ),
)

_HT_FOUR = Table(
    "high-throughput-four",
    ("us, share of the link; layout", *(f"`{layout}`" for layout in LAYOUTS)),
    tuple(
        (
            title,
            # The share of senders that is shipped was swept for dispatch of layout token alone.
            _of_link(HT_SHARE if op == "dispatch" else HT_FOUR, op, MOST, layout="token", dtype=dtype),
            _of_link(HT_FOUR, op, MOST, layout="packed", dtype=dtype),
        )
        for title, op, dtype in (
            ("dispatch, bfloat16", "dispatch", "bf16"),
            ("dispatch, FP8 (given)", "dispatch", "fp8"),
            ("combine, bfloat16", "combine", "bf16"),
        )
    ),
)

_NODE_TOKENS = (1, 64, 128, 512, MOST)

_A2A_FOUR = Table(
    "one-sided-four",
    ("us, share of the link; tokens per rank", *map(str, _NODE_TOKENS)),
    tuple(
        (title, *(_of_link(A2A_FOUR, op, tokens) for tokens in _NODE_TOKENS))
        for title, op in (
            ("dispatch", "dispatch"),
            ("combine, in place", "combine_in_place"),
            ("pair, in place", "pair_in_place"),
        )
    ),
)

# ---- two H100 ----

_LL_H100 = Table(
    "low-latency-h100",
    ("us; tokens per rank", *map(str, _SWEPT)),
    tuple(
        (title, *(number(us(run, op, tokens)) for tokens in _SWEPT))
        for title, run, op in (
            ("dispatch, bfloat16", LL_H100, "dispatch"),
            ("dispatch, FP8", LL_FP8_H100, "dispatch"),
            ("combine, bfloat16, weights given at dispatch", LL_H100, "combine"),
            ("combine, bfloat16, weights given at combine", LL_H100, "combine_weighted"),
            ("the pair, FP8 dispatch", LL_FP8_H100, "pair"),
        )
    ),
)

_HT_H100 = Table(
    "high-throughput-h100",
    ("us; layout", *(f"`{layout}`" for layout in LAYOUTS)),
    tuple(
        (title, *(number(us(HT_H100, op, MOST, layout=layout, dtype=dtype)) for layout in LAYOUTS))
        for title, op, dtype in (
            ("dispatch, bfloat16", "dispatch", "bf16"),
            ("dispatch, FP8 (given)", "dispatch", "fp8_given"),
            ("combine, bfloat16", "combine", "bf16"),
        )
    ),
)

_A2A_H100 = Table(
    "one-sided-h100",
    ("pair, us; tokens per rank", *map(str, _NODE_TOKENS)),
    tuple(
        (title, *(number(us(A2A_H100, op, tokens)) for tokens in _NODE_TOKENS))
        for title, op in (("rows from any memory", "pair"), ("in place", "pair_in_place"))
    ),
)

_COLL_H100 = Table(
    "collective-h100",
    ("us", "64 tokens, 16 experts, top-4", "4096 tokens, 256 experts, top-8"),
    tuple(
        (title, number(us(COLL_H100, op, 64)), number(us(COLL_MANY_H100, op, MOST)))
        for title, op in (("bare exchanges", "pair_of_exchanges"), ("dispatch, then combine", "pair"))
    ),
)

SCALING = (_LL_FOUR, _HT_FOUR, _A2A_FOUR, _LL_H100, _HT_H100, _A2A_H100, _COLL_H100)
