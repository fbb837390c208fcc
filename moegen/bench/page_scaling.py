# SPDX-License-Identifier: Apache-2.0
"""Published tables of the suite: between four and eight H200, and between two H100."""

from __future__ import annotations

from moegen.bench.committed import Run, share, us
from moegen.bench.page_runs import IN_TURN_A2A, IN_TURN_HT, LL_IN_TURN, MOST, SHARE_26, before, h100
from moegen.bench.pages import Cell, Table, joined, number, with_percent
from moegen.bench.published import Op, target_us


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


def _a2a_scaling(tokens: int) -> tuple[Cell, ...]:
    """Combine that pushes is again as it was before turns."""
    ops = ("dispatch", "combine", "combine_in_place")
    four, eight = (_a2a_ops(before(ranks, "a2a"), tokens, *ops) for ranks in (4, 8))
    in_turn = _a2a_ops(IN_TURN_A2A, tokens, "dispatch", "", "combine_in_place")
    return f"`a2a`, {tokens:,} tokens, dispatch / pushed / in place", four, in_turn, eight


_PAIR_OF_EIGHT = target_us(Op(8, "expert", "fp8", "pair", 128))

SCALING = Table(
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
        (
            "`ll`, 512 tokens, dispatch FP8 / bf16, combine",
            _ll_ops(4, 512),
            _ll_sweep(512, "1x4 base", "1x8 send share 0.7"),
            _ll_ops(8, 512),
        ),
        (
            "`ll`, 128 tokens, dispatch FP8 / bf16, combine",
            _ll_ops(4, 128),
            _ll_sweep(128, "1x4 base", "1x8 send share 0.7"),
            _ll_ops(8, 128),
        ),
        ("`ll`, 1 token, dispatch bf16, combine", _ll_ops(4, 1), _ll_sweep(1, "4x8 base", "1x8 base"), _ll_ops(8, 1)),
        (
            f"`ll`, 128 tokens, the pair with FP8 dispatch (goal with eight: {_PAIR_OF_EIGHT:g})",
            number(us(before(4, "ll_fp8"), "pair", 128)),
            "",
            number(us(before(8, "ll_fp8"), "pair", 128)),
        ),
        (
            "collective, 4,096 tokens, pair / bare exchanges",
            joined(*(number(us(before(4, "coll_many"), op, MOST), 0) for op in ("pair", "pair_of_exchanges"))),
            "",
            joined(*(number(us(before(8, "coll_many"), op, MOST), 0) for op in ("pair", "pair_of_exchanges"))),
        ),
    ),
)

H100 = Table(
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
