# SPDX-License-Identifier: Apache-2.0
"""The reference of `OneSided` on examples whose results are written out by hand."""

from __future__ import annotations

import pytest
import torch

from moegen.reference_payloads import (
    ExpectedPayloads,
    combine_payloads,
    dispatch_payloads,
    out_dtype_of,
)

# Two ranks, three experts: rank 0 holds 0 and 1, rank 1 holds 2.
IDS = [torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 2]]), torch.tensor([[0, 2]])]
LETTERS = [torch.tensor([[10], [11], [12], [13]], dtype=torch.uint8), torch.tensor([[20]], dtype=torch.uint8)]
WIDE = [torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]], dtype=torch.int32), torch.tensor([[8, 9]], dtype=torch.int32)]
PAYLOADS = [list(pair) for pair in zip(LETTERS, WIDE, strict=True)]


def dispatched(**options: object) -> list[ExpectedPayloads]:
    return dispatch_payloads(PAYLOADS, IDS, 3, 4, **options)  # type: ignore[arg-type]


def test_each_token_has_one_slot_at_each_rank_that_it_selects() -> None:
    first, second = dispatched()
    assert first.tokens.tolist() == [[0, 3, -1, -1], [0, -1, -1, -1]]
    assert second.tokens.tolist() == [[1, 3, -1, -1], [0, -1, -1, -1]]
    assert first.counts.tolist() == [2, 1]
    assert second.counts.dtype == torch.int32
    assert first.used.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert first.stats is None


def test_payloads_are_the_rows_of_those_tokens() -> None:
    first, second = dispatched()
    assert first.payloads[0].squeeze(2).tolist() == [[10, 13, 0, 0], [20, 0, 0, 0]]
    assert second.payloads[0].squeeze(2).tolist() == [[11, 13, 0, 0], [20, 0, 0, 0]]
    assert second.payloads[1].tolist() == [[[2, 3], [6, 7], [0, 0], [0, 0]], [[8, 9], [0, 0], [0, 0], [0, 0]]]
    assert [plane.dtype for plane in first.payloads] == [torch.uint8, torch.int32]


def test_bits_are_kept() -> None:
    """Also of numbers that are none."""
    bits = torch.tensor([[0x7FC1, 0x7F81], [-0x8000, 1]], dtype=torch.int16)
    ids = torch.tensor([[0], [0]])
    got = dispatch_payloads([[bits.view(torch.bfloat16)]], [ids], 1, 2)[0].payloads[0]
    assert torch.equal(got.view(torch.int16)[0], bits)


def test_experts_that_do_not_divide() -> None:
    """Five experts, three ranks: 0 and 1, 2 and 3, 4."""
    ids = [torch.tensor([[1], [2], [3], [4]]), torch.empty(0, 1, dtype=torch.int64), torch.tensor([[4]])]
    payloads = [[torch.zeros(len(part), 1)] for part in ids]
    got = dispatch_payloads(payloads, ids, 5, 4)
    assert [rank.counts.tolist() for rank in got] == [[1, 0, 0], [2, 0, 0], [1, 0, 1]]
    assert got[1].tokens[0].tolist() == [1, 2, -1, -1]


def test_tokens_that_do_not_count() -> None:
    first, second = dispatched(num_tokens=[1, -3])
    assert [first.counts.tolist(), second.counts.tolist()] == [[1, 0], [0, 0]]
    assert dispatched(num_tokens=[100, 1])[1].counts.tolist() == [2, 1]


def test_unused_slots_are_filled_where_asked_for() -> None:
    first, second = dispatched(unused_ids=(1, -7))
    assert first.payloads[1][0].tolist() == [[0, 1], [6, 7], [-7, -7], [-7, -7]]
    assert second.payloads[1][1].tolist() == [[8, 9], [-7, -7], [-7, -7], [-7, -7]]
    assert first.payloads[0].squeeze(2).tolist() == [[10, 13, 0, 0], [20, 0, 0, 0]]


def test_stats_are_gathered() -> None:
    stats = [torch.tensor([1, 2], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)]
    for rank in dispatched(stats=stats):
        assert rank.stats is not None
        assert rank.stats.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(("mask", "counts"), [(0b01, [[2, 0], [0, 0]]), (0b10, [[0, 0], [0, 1]])])
def test_ranks_that_take_no_part(mask: int, counts: list[list[int]]) -> None:
    stats = [torch.tensor([1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)]
    got = dispatched(active_ranks=mask, stats=stats)
    assert [rank.counts.tolist() for rank in got] == counts
    assert got[0].stats is not None
    assert got[0].stats.tolist() == ([[1], [0]] if mask == 1 else [[0], [2]])


def test_more_tokens_than_slots() -> None:
    with pytest.raises(ValueError, match="rank 0 has 2 tokens for rank 0 and 1 slots there"):
        dispatch_payloads(PAYLOADS, IDS, 3, 1)


def outputs(
    first: dict[tuple[int, int], float], second: dict[tuple[int, int], float], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Per rank [2, 4, 1]: these numbers at (source, slot), and NaN wherever nothing came."""
    parts = []
    for numbers in (first, second):
        part = torch.full((2, 4, 1), float("nan"))
        for at, value in numbers.items():
            part[at] = value
        parts.append(part.to(dtype))
    return parts


BOTH = ({(0, 0): 1.0, (0, 1): 2.0, (1, 0): 4.0}, {(0, 0): 8.0, (0, 1): 16.0, (1, 0): 32.0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_rows_of_a_token_are_added(dtype: torch.dtype) -> None:
    first, second = combine_payloads(outputs(*BOTH, dtype), dispatched(), [4, 1])
    assert first.exact.flatten().tolist() == [1.0, 8.0, 0.0, 18.0]
    assert second.exact.flatten().tolist() == [36.0]
    assert first.rounded.flatten().tolist() == [1.0, 8.0, 0.0, 18.0]
    assert first.rounded.dtype == out_dtype_of(dtype)


def test_the_result_has_the_dtype_of_the_rows_or_what_was_asked_for() -> None:
    assert out_dtype_of(torch.float16) == torch.float16
    assert out_dtype_of(torch.float8_e4m3fn) == torch.bfloat16
    got = combine_payloads(outputs(*BOTH, torch.bfloat16), dispatched(), [4, 1], out_dtype=torch.float32)
    assert got[0].rounded.dtype == torch.float32


def test_ranks_whose_rows_are_left_out() -> None:
    first, second = combine_payloads(outputs(*BOTH, torch.float32), dispatched(), [4, 1], active_ranks=0b01)
    assert first.exact.flatten().tolist() == [1.0, 0.0, 0.0, 2.0]
    assert second.exact.flatten().tolist() == [0.0]


def test_rows_are_added_in_the_order_of_the_ranks() -> None:
    """Of three: a big number, one that is lost beside it, and the big one taken away again."""
    ids = [torch.tensor([[0, 1, 2]]), *[torch.empty(0, 3, dtype=torch.int64)] * 2]
    payloads = [[torch.zeros(len(part), 1)] for part in ids]
    expected = dispatch_payloads(payloads, ids, 3, 1)

    def rounded(values: tuple[float, float, float]) -> float:
        y = [torch.full((3, 1, 1), value) for value in values]
        return combine_payloads(y, expected, [1, 0, 0])[0].rounded.item()

    assert rounded((2.0**30, 1.0, -(2.0**30))) == 0.0
    assert rounded((2.0**30, -(2.0**30), 1.0)) == 1.0


U = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}


@pytest.mark.parametrize("dtype", U)
def test_the_bound_is_the_formula(dtype: torch.dtype) -> None:
    """Of 3 + (-1) = 2: two ranks, magnitudes that add up to 4."""
    y = outputs({(0, 0): 0.0, (0, 1): 3.0, (1, 0): 0.0}, {(0, 0): 0.0, (0, 1): -1.0, (1, 0): 0.0}, torch.float32)
    got = combine_payloads(y, dispatched(), [4, 1], out_dtype=dtype)[0]
    assert got.bound[3].item() == pytest.approx((U[dtype] * 2 + 2 * 2.0**-24 * 4) * (1 + 2.0**-6), rel=1e-3)
    assert 0 < got.bound[2].item() <= 2.0**-24  # a token that went nowhere: the smallest number


RANKS = 7


def spread_out(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[ExpectedPayloads]]:
    """Five tokens of each of seven ranks that all go everywhere, and rows of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.arange(RANKS).expand(5, RANKS) for _ in range(RANKS)]
    scales = 2.0 ** torch.randint(-6, 7, (RANKS, RANKS, 5, 64), generator=generator)
    rows = torch.randn(RANKS, RANKS, 5, 64, generator=generator) * scales
    return list(rows.to(dtype)), dispatch_payloads([[torch.zeros(5, 1)]] * RANKS, ids, RANKS, 5)


@pytest.mark.parametrize("out_dtype", U)
@pytest.mark.parametrize("dtype", [*U, torch.float8_e4m3fn])
def test_what_is_rounded_lies_within_the_bound(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    y, expected = spread_out(dtype)
    for got in combine_payloads(y, expected, [5] * RANKS, out_dtype=out_dtype):
        assert got.rounded.dtype == out_dtype
        assert ((got.rounded.double() - got.exact).abs() <= got.bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_that_are_rounded_each_time_do_not(dtype: torch.dtype) -> None:
    y, expected = spread_out(dtype)
    for owner, got in enumerate(combine_payloads(y, expected, [5] * RANKS)):
        sums = torch.zeros(5, 64, dtype=dtype)
        for part in y:
            sums = sums + part[owner]
        assert ((sums.double() - got.exact).abs() > got.bound).any()


def test_zero_tokens() -> None:
    ids = [torch.empty(0, 2, dtype=torch.int64)] * 2
    expected = dispatch_payloads([[torch.empty(0, 3)]] * 2, ids, 3, 4)
    assert expected[0].counts.tolist() == [0, 0]
    got = combine_payloads([torch.full((2, 4, 8), float("nan"))] * 2, expected, [0, 0])
    assert [part.rounded.shape for part in got] == [(0, 8), (0, 8)]
