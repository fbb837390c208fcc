# SPDX-License-Identifier: Apache-2.0
"""The published tables: which committed figures stand where. `moegen bench tables` writes them."""

from __future__ import annotations

from moegen.bench.committed import (
    Run,
    Value,
    difference,
    eager,
    exact,
    excess,
    least,
    padding,
    us,
)
from moegen.bench.page_runs import A2A, A2A_FEW_EXPERTS, COLL, HT, LL, LL_FP8, MOST
from moegen.bench.page_scaling import H100, SCALING
from moegen.bench.pages import Cell, Table, joined, number, over, percent, with_percent
from moegen.bench.published import (
    COLLECTIVE_FACTOR,
    COLLECTIVE_US,
    DEEPEP_V1,
    DEEPEP_V2,
    FEW_BLOCKS_TARGETS,
    FEW_EXPERTS_FLASHINFER,
    FEW_EXPERTS_TARGET,
    FLASHINFER,
    HOST_CALL_TARGET,
    Op,
    stated_us,
    target_us,
)

# ---- low latency ----

_LL_TOKENS = (1, 32, 128, 512)


def _ll_row(title: str, run: Run, op: str) -> tuple[Cell, ...]:
    return (title, *(number(us(run, op, tokens)) for tokens in _LL_TOKENS))


_LL = Table(
    "low-latency",
    ("us; tokens per rank", *map(str, _LL_TOKENS)),
    (
        _ll_row("dispatch, bfloat16", LL, "dispatch"),
        _ll_row("dispatch, FP8", LL_FP8, "dispatch"),
        _ll_row("combine, bfloat16, weights given at dispatch", LL, "combine"),
        _ll_row("combine, bfloat16, weights given at combine", LL, "combine_weighted"),
        _ll_row("the pair, FP8 dispatch", LL_FP8, "pair"),
    ),
)


def _ll_targets(title: str, *ops: tuple[Run, str, int]) -> tuple[Cell, ...]:
    """Measured, aimed at, and by how much over, of one op or of several side by side."""
    values = [us(run, op, tokens) for run, op, tokens in ops]
    aims = [target_us(Op(2, "expert", "fp8" if run is LL_FP8 else "bf16", op, tokens)) for run, op, tokens in ops]
    return (
        title,
        joined(*map(number, values)),
        joined(*(f"{aim:g}" for aim in aims)),
        joined(*(over(value, aim) for value, aim in zip(values, aims, strict=True))),
    )


_HOST_CALLS = tuple(eager(LL, f"{op}_in_small_ops", 128) for op in ("dispatch", "combine"))

_LL_TARGETS = Table(
    "low-latency-targets",
    ("us; 128 tokens unless it says 1", "measured", "target", "over"),
    (
        _ll_targets("dispatch, FP8", (LL_FP8, "dispatch", 128)),
        _ll_targets("dispatch, bfloat16", (LL, "dispatch", 128)),
        _ll_targets("combine, weights at dispatch / at combine", (LL, "combine", 128), (LL, "combine_weighted", 128)),
        _ll_targets("the pair, FP8 dispatch", (LL_FP8, "pair", 128)),
        _ll_targets("the pair, FP8 dispatch, 1 token", (LL_FP8, "pair", 1)),
        _ll_targets(
            "halves: send of FP8 dispatch / of bfloat16 dispatch",
            (LL_FP8, "dispatch_send", 128),
            (LL, "dispatch_send", 128),
        ),
        _ll_targets(
            "halves: send of combine / of combine with late weights",
            (LL, "combine_send", 128),
            (LL, "combine_weighted_send", 128),
        ),
        _ll_targets(
            "halves: receive of FP8 dispatch / of combine",
            (LL_FP8, "dispatch_receive", 128),
            (LL, "combine_receive", 128),
        ),
        (
            "host time of a call, bfloat16, in small torch ops: dispatch / combine (averages)",
            joined(*map(number, _HOST_CALLS)),
            joined(*[f"{HOST_CALL_TARGET:g}"] * 2),
            joined(*(over(value, HOST_CALL_TARGET) for value in _HOST_CALLS)),
        ),
    ),
)

# ---- high throughput ----


def _ht(op: str, layout: str, dtype: str, blocks: int = 0) -> Value:
    return us(HT, op, MOST, layout=layout, dtype=dtype, num_sms=blocks)


def _ht_row(title: str, op: str, layout: str, dtype: str, who: tuple[str, ...], rank_op: str = "") -> tuple[Cell, ...]:
    """Measured, aimed at, over, and what the libraries of `who` take; `rank_op`: FlashInfer's, of layout rank."""
    of = Op(2, layout, dtype.removesuffix("_given"), op, MOST)
    value, aim = _ht(op, layout, dtype), target_us(of)
    others = [f"{stated_us(of, one):.0f}" if one in who else "" for one in (DEEPEP_V1, DEEPEP_V2)]
    others += [f"{stated_us(Op(2, 'rank', 'bf16', rank_op, MOST), FLASHINFER):.0f}" if rank_op else ""]
    return title, number(value), f"{aim:.0f}", over(value, aim), *others


_HT = Table(
    "high-throughput",
    ("us", "moegen", "target", "over", "DeepEP V1, 24 SMs", "DeepEP V2, 64 SMs", "FlashInfer, layout `rank`"),
    (
        _ht_row("dispatch bf16, `token`", "dispatch", "token", "bf16", (DEEPEP_V1,), "dispatch"),
        _ht_row("dispatch FP8 (given), `token`", "dispatch", "token", "fp8_given", (DEEPEP_V1, DEEPEP_V2)),
        _ht_row("dispatch FP8 (given), `packed`", "dispatch", "packed", "fp8_given", (DEEPEP_V2,)),
        _ht_row("combine bf16 from `token`", "combine", "token", "bf16", (DEEPEP_V1, DEEPEP_V2), "combine_in_place"),
        _ht_row("combine bf16 from `packed`, weighted", "combine", "packed", "bf16", (DEEPEP_V2,)),
        (
            "dispatch FP8 (quantized on the way), `token` / `packed`",
            joined(number(_ht("dispatch", "token", "fp8")), number(_ht("dispatch", "packed", "fp8"))),
            *[""] * 5,
        ),
    ),
)

_HT_SHORT = Table(
    "high-throughput-short",
    ("us; layout", "`token`", "`packed`"),
    tuple(
        (title, *(number(_ht(op, layout, dtype)) for layout in ("token", "packed")))
        for title, op, dtype in (
            ("dispatch, bfloat16", "dispatch", "bf16"),
            ("dispatch, FP8", "dispatch", "fp8_given"),
            ("combine, bfloat16", "combine", "bf16"),
        )
    ),
)

_BLOCKS = (8, 16, 24, 32, 64)


def _blocks_row(title: str, op: str, layout: str, dtype: str) -> tuple[Cell, ...]:
    def cell(blocks: int) -> Cell:
        value = _ht(op, layout, dtype, blocks)
        return (
            with_percent(value, excess(value, _ht(op, layout, dtype)), form="{} ({})")
            if blocks == 24
            else number(value, 0)
        )

    return title, *map(cell, _BLOCKS), f"{FEW_BLOCKS_TARGETS[layout]:.0%}"


_HT_BLOCKS = Table(
    "high-throughput-blocks",
    ("us; blocks", *map(str, _BLOCKS), "goal at 24"),
    (
        _blocks_row("dispatch bf16, `token`", "dispatch", "token", "bf16"),
        _blocks_row("dispatch FP8 (given), `token`", "dispatch", "token", "fp8_given"),
        _blocks_row("dispatch FP8 (given), `packed`", "dispatch", "packed", "fp8_given"),
        _blocks_row("combine bf16, `token`", "combine", "token", "bf16"),
        _blocks_row("combine bf16, `packed`", "combine", "packed", "bf16"),
    ),
)

_HT_EXACT = Table(
    "high-throughput-exact",
    ("us", "until the rows are there", "until the call returns"),
    tuple(
        (
            f"{title}, `{layout}`",
            *(number(exact(HT, what, layout, dtype), 0) for what in ("us_over_ranks", "host_us_over_ranks")),
        )
        for title, dtype in (("bf16", "bf16"), ("FP8 (given)", "fp8_given"))
        for layout in ("token", "packed")
    ),
    figures="averages over ranks of calls from Python",
)

# ---- one-sided ----

_A2A_TOKENS = (1, 16, 64, 128, 512, 2048, 4096)
_A2A_HEAD = ("pair, us; tokens per rank", *map(str, _A2A_TOKENS))
_PAIRS = [(A2A, tokens) for tokens in _A2A_TOKENS]
_PAIRS_AND_FEW = [*_PAIRS, (A2A_FEW_EXPERTS, 64)]


def _best(run: Run, tokens: int) -> Value:
    return least(us(run, "pair", tokens), us(run, "pair_in_place", tokens))


def _a2a_target(run: Run, tokens: int) -> float:
    return target_us(Op(2, "rank", "bf16", "pair", tokens)) if run is A2A else FEW_EXPERTS_TARGET


A2A_TARGETS = tuple((_best(run, tokens), _a2a_target(run, tokens)) for run, tokens in _PAIRS_AND_FEW)
"""Of each size: the better of both pairs, and what is aimed at."""


def _flashinfer(op: str) -> tuple[Cell, ...]:
    stated = [stated_us(Op(2, "rank", "bf16", op, tokens), FLASHINFER) for tokens in _A2A_TOKENS]
    return tuple(f"{one:.1f}" for one in (*stated, FEW_EXPERTS_FLASHINFER[op]))


def _one_sided(op: str) -> tuple[Cell, ...]:
    return tuple(number(us(run, op, tokens)) for run, tokens in _PAIRS_AND_FEW)


_A2A = Table(
    "one-sided",
    (*_A2A_HEAD, "64 (16 experts, top-4)"),
    (
        ("FlashInfer fb28d72", *_flashinfer("pair_in_place")),
        ("FlashInfer fb28d72, rows copied into its workspace first", *_flashinfer("pair")),
        ("moegen, rows from any memory", *_one_sided("pair")),
        ("moegen, in place", *_one_sided("pair_in_place")),
        ("target", *(f"{target:g}" for _, target in A2A_TARGETS)),
        ("over (the better of both)", *(over(value, target) for value, target in A2A_TARGETS)),
        (
            "rows from any memory over in place",
            *(
                percent(excess(us(run, "pair", tokens), us(run, "pair_in_place", tokens)))
                for run, tokens in _PAIRS_AND_FEW
            ),
        ),
        ("dispatch alone", *_one_sided("dispatch")),
        (
            "combine alone, pushed / in place",
            *(
                joined(*(number(us(run, op, tokens)) for op in ("combine", "combine_in_place")))
                for run, tokens in _PAIRS_AND_FEW
            ),
        ),
    ),
)

_A2A_ROUTINGS = Table(
    "one-sided-routings",
    _A2A_HEAD,
    tuple(
        (f"{title}, {routing}", *(number(us(A2A, op, tokens, routing)) for tokens in _A2A_TOKENS))
        for op, title in (("pair", "rows from any memory"), ("pair_in_place", "in place"))
        for routing in ("zipf", "hot")
    ),
)

_A2A_SHORT = Table(
    "one-sided-short",
    _A2A_HEAD,
    tuple(
        (title, *(number(us(A2A, op, tokens)) for tokens in _A2A_TOKENS))
        for op, title in (
            ("pair", "rows of experts from any memory"),
            ("pair_in_place", "rows of experts in symmetric memory"),
        )
    ),
)

# ---- collective ----

_COLL_TOKENS = (64, 128, 512, 2048, 8192)


def _coll_row(title: str, op: str) -> tuple[Cell, ...]:
    return (title, *(number(us(COLL, op, tokens)) for tokens in _COLL_TOKENS))


_COLL = Table(
    "collective",
    ("tokens per rank", *map(str, _COLL_TOKENS)),
    (
        _coll_row("bare exchanges, us", "pair_of_exchanges"),
        _coll_row("dispatch, then combine, us", "pair"),
        (
            f"over {COLLECTIVE_FACTOR:g} times the bare ones, us ({COLLECTIVE_US:g} allowed at 64)",
            *(
                number(difference(us(COLL, "pair", tokens), us(COLL, "pair_of_exchanges", tokens), COLLECTIVE_FACTOR))
                for tokens in _COLL_TOKENS
            ),
        ),
        ("padding, of the bytes sent", *(percent(padding(COLL, tokens)) for tokens in _COLL_TOKENS)),
        *(
            (
                f"called from Python, {exchange}, us (averages)",
                *(number(eager(COLL, "pair_us", tokens, f"eager_{exchange}"), 0) for tokens in _COLL_TOKENS),
            )
            for exchange in ("padded", "exact")
        ),
    ),
)

TABLES = (
    _LL,
    _LL_TARGETS,
    _HT,
    _HT_SHORT,
    _HT_BLOCKS,
    _HT_EXACT,
    _A2A,
    _A2A_ROUTINGS,
    _A2A_SHORT,
    _COLL,
    SCALING,
    H100,
)
