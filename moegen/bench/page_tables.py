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
    share,
    us,
)
from moegen.bench.pages import Cell, Table, joined, number, over, percent, with_percent
from moegen.bench.published import (
    COLLECTIVE_TARGET,
    DEEPEP_V1,
    DEEPEP_V2,
    FEW_BLOCKS_TARGETS,
    FEW_EXPERTS,
    FLASHINFER,
    HOST_CALL_TARGET,
    Op,
    stated_us,
    target_us,
)

LL, LL_FP8 = Run("ll_h200_processes_r2.json"), Run("ll_h200_processes_r2_fp8.json")
HT, HT_TOKENS = Run("ht_h200_processes_r2.json"), Run("ht_h200_processes_r2_tokens.json")
A2A = Run("a2a_h200_processes_r2.json")
A2A_FEW_EXPERTS = Run("a2a_h200_processes_r2_h7168_k4_e16.json")
COLL = Run("coll_h200_processes_r2_h7168_k4_e16.json")
IN_TURN_HT = Run("node_h200_processes_r4_uniform.txt", "ht")
IN_TURN_A2A = Run("node_h200_processes_r4_uniform.txt", "a2a")
SHARE_26 = Run("sweeps/ht_h200_r4_shares.txt", section="share 0.26")
LL_IN_TURN = Run("sweeps/ll_h200_r4_announced_later.txt")
MOST = 4096


def before(ranks: int, part: str) -> Run:
    """A part of the suite between so many H200, when rows still went back one rank after the other."""
    return Run(f"before_turns/node_h200_processes_r{ranks}.json", part)


def h100(part: str) -> Run:
    return Run("node_h100_processes_r2.json", part)


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
        return with_percent(value, excess(value, _ht(op, layout, dtype)), form="{} ({})") if blocks == 24 else number(value, 0)

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
    return target_us(Op(2, "rank", "bf16", "pair", tokens)) if run is A2A else float(FEW_EXPERTS["target"])


def _flashinfer(op: str, index: int) -> tuple[Cell, ...]:
    stated = [stated_us(Op(2, "rank", "bf16", op, tokens), FLASHINFER) for tokens in _A2A_TOKENS]
    return tuple(f"{one:.1f}" for one in (*stated, FEW_EXPERTS["published"][index]))


def _one_sided(op: str) -> tuple[Cell, ...]:
    return tuple(number(us(run, op, tokens)) for run, tokens in _PAIRS_AND_FEW)


_A2A = Table(
    "one-sided",
    (*_A2A_HEAD, "64 (16 experts, top-4)"),
    (
        ("FlashInfer fb28d72", *_flashinfer("pair_in_place", 0)),
        ("FlashInfer fb28d72, rows copied into its workspace first", *_flashinfer("pair", 1)),
        ("moegen, rows from any memory", *_one_sided("pair")),
        ("moegen, in place", *_one_sided("pair_in_place")),
        ("target", *(f"{_a2a_target(run, tokens):g}" for run, tokens in _PAIRS_AND_FEW)),
        (
            "over (the better of both)",
            *(over(_best(run, tokens), _a2a_target(run, tokens)) for run, tokens in _PAIRS_AND_FEW),
        ),
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
            f"over {COLLECTIVE_TARGET['factor']:g} times the bare ones, us ({COLLECTIVE_TARGET['us']:g} allowed at 64)",
            *(
                number(
                    difference(
                        us(COLL, "pair", tokens), us(COLL, "pair_of_exchanges", tokens), COLLECTIVE_TARGET["factor"]
                    )
                )
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

# ---- four and eight GPUs, two H100 ----


def _scaled(run: Run, op: str, tokens: int, **more: str) -> Cell:
    """Microseconds, and the share of the link."""
    return with_percent(us(run, op, tokens, **more), share(run, op, tokens, **more))


def _layouts(run: Run, op: str, dtype: str, token_run: Run | None = None) -> Cell:
    runs = {"token": token_run or run, "packed": run}
    return joined(*(_scaled(one, op, MOST, layout=layout, dtype=dtype) for layout, one in runs.items()))


def _a2a_ops(run: Run, tokens: int, *ops: str) -> Cell:
    return joined(*(_scaled(run, op, tokens) if op else "as before" for op in ops))


def _ll_ops(ranks: int, tokens: int) -> Cell:
    fp8 = [us(before(ranks, "ll_fp8"), "dispatch", tokens)] if tokens > 1 else []
    bf16 = [us(before(ranks, "ll"), op, tokens) for op in ("dispatch", "combine")]
    return joined(*(number(value) for value in (*fp8, *bf16)))


def _ll_sweep(tokens: int, dispatch: str, combine: str) -> Cell:
    fp8 = [us(LL_IN_TURN, "dispatch", tokens, variant=dispatch, dtype="fp8")] if tokens > 1 else []
    bf16 = [
        us(LL_IN_TURN, op, tokens, variant=variant, dtype="bf16")
        for op, variant in (("dispatch", dispatch), ("combine", combine))
    ]
    return joined(*(number(value) for value in (*fp8, *bf16)))


def _scaling_row(title: str, four: Cell, in_turn: Cell, eight: Cell) -> tuple[Cell, ...]:
    return title, four, in_turn, eight


def _a2a_scaling(tokens: int) -> tuple[Cell, ...]:
    """Combine that pushes is again as it was before turns."""
    ops = ("dispatch", "combine", "combine_in_place")
    four, eight = (_a2a_ops(before(ranks, "a2a"), tokens, *ops) for ranks in (4, 8))
    in_turn = _a2a_ops(IN_TURN_A2A, tokens, "dispatch", "", "combine_in_place")
    return f"`a2a`, {tokens:,} tokens, dispatch / pushed / in place", four, in_turn, eight


_SCALING = Table(
    "four-and-eight",
    ("us; share of the link", "four, before", "four, in turn", "eight, before"),
    (
        *(
            (
                title,
                _layouts(before(4, "ht"), op, f"{dtype}{given}"),
                # The share of senders that is shipped is of dispatch of layout token alone.
                _layouts(IN_TURN_HT, op, dtype, SHARE_26 if op == "dispatch" else None),
                _layouts(before(8, "ht"), op, f"{dtype}{given}"),
            )
            for title, op, dtype, given in (
                ("`ht`, 4,096 tokens, dispatch bf16 `token` / `packed`", "dispatch", "bf16", ""),
                ("dispatch FP8 (given) `token` / `packed`", "dispatch", "fp8", "_given"),
                ("combine bf16 `token` / `packed`", "combine", "bf16", ""),
            )
        ),
        *map(_a2a_scaling, (4096, 512, 128)),
        _scaling_row(
            "`ll`, 512 tokens, dispatch FP8 / bf16, combine",
            _ll_ops(4, 512),
            _ll_sweep(512, "1x4 base", "1x8 send share 0.7"),
            _ll_ops(8, 512),
        ),
        _scaling_row(
            "`ll`, 128 tokens, dispatch FP8 / bf16, combine",
            _ll_ops(4, 128),
            _ll_sweep(128, "1x4 base", "1x8 send share 0.7"),
            _ll_ops(8, 128),
        ),
        _scaling_row(
            "`ll`, 1 token, dispatch bf16, combine", _ll_ops(4, 1), _ll_sweep(1, "4x8 base", "1x8 base"), _ll_ops(8, 1)
        ),
        _scaling_row(
            f"`ll`, 128 tokens, the pair with FP8 dispatch (goal with eight: "
            f"{target_us(Op(8, 'expert', 'fp8', 'pair', 128)):g})",
            number(us(before(4, "ll_fp8"), "pair", 128)),
            "",
            number(us(before(8, "ll_fp8"), "pair", 128)),
        ),
        _scaling_row(
            "collective, 4,096 tokens, pair / bare exchanges",
            joined(*(number(us(before(4, "coll_many"), op, MOST), 0) for op in ("pair", "pair_of_exchanges"))),
            "",
            joined(*(number(us(before(8, "coll_many"), op, MOST), 0) for op in ("pair", "pair_of_exchanges"))),
        ),
    ),
)

_H100 = Table(
    "two-h100",
    ("us; tokens per rank", "1", "128", "512", "4096"),
    (
        *(
            (title, *(number(us(h100(part), op, tokens)) for tokens in (1, 128, 512)), "")
            for title, part, op in (
                ("`ll`, dispatch FP8", "ll_fp8", "dispatch"),
                ("`ll`, dispatch bf16", "ll", "dispatch"),
                ("`ll`, combine", "ll", "combine"),
            )
        ),
        *(
            (
                f"`ht`, {title} `token` / `packed`",
                *[""] * 3,
                joined(*(number(us(h100("ht"), op, MOST, layout=to, dtype=dtype)) for to in ("token", "packed"))),
            )
            for title, op, dtype in (
                ("dispatch bf16", "dispatch", "bf16"),
                ("dispatch FP8 (given)", "dispatch", "fp8_given"),
                ("combine bf16", "combine", "bf16"),
            )
        ),
        *(
            (f"`a2a`, pair, {title}", *(number(us(h100("a2a"), op, tokens)) for tokens in (1, 128, 512, MOST)))
            for title, op in (("rows from any memory", "pair"), ("in place", "pair_in_place"))
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
    _SCALING,
    _H100,
)
