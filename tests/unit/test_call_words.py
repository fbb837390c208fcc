# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import combinations

from moegen.kernels.a2a import MAX_SENDERS, MAX_STATS, ROW_DTYPES
from moegen.kernels.call_words import FIELDS, differences, of_payloads, of_ranks, pack
from moegen.kernels.call_words import ROW_DTYPES as NAMED
from moegen.kernels.ht import PHASE_WORDS
from moegen.kernels.ll import MAX_TOKENS_PER_RANK
from moegen.kernels.spec import MAX_RANKS


def bits_of(op: str) -> int:
    return sum(field.bits for field in FIELDS[op])


def test_words_fit_where_they_travel() -> None:
    assert bits_of("ll_combine") == 1  # the redundant bit of an epoch
    assert all(bits_of(op) <= 32 for op in ("ht_dispatch", "ht_combine", "a2a_combine"))  # above an epoch
    assert bits_of("a2a_dispatch") <= 64
    assert 2 ** FIELDS["a2a_dispatch"][0].bits > MAX_SENDERS


def test_values_fit_into_their_fields() -> None:
    assert set(NAMED) == set(ROW_DTYPES)
    everyone = 2**MAX_RANKS - 1
    most = MAX_TOKENS_PER_RANK - 1
    pack("a2a_dispatch", 0, of_ranks(everyone), 0xFFFF, most, MAX_STATS)
    pack("a2a_combine", len(NAMED) - 1, True, of_ranks(everyone), most)
    pack("ht_dispatch", len(PHASE_WORDS) - 1)


def test_masks_that_differ_in_one_or_two_ranks_have_different_codes() -> None:
    everyone = 2**MAX_RANKS - 1
    for number in (1, 2):
        for ranks in combinations(range(MAX_RANKS), number):
            assert of_ranks(everyone) != of_ranks(everyone & ~sum(1 << rank for rank in ranks))


def test_payloads_in_another_order_have_another_code() -> None:
    assert of_payloads((8, 16), ("int32", "float32")) != of_payloads((16, 8), ("float32", "int32"))
    assert of_payloads((8, 8), ("int32", "float32")) != of_payloads((8, 8), ("float32", "int32"))


def test_arguments_that_differ_are_named_with_both_values() -> None:
    here = pack("a2a_dispatch", 0, of_ranks(3), 7, 23, 0)
    there = pack("a2a_dispatch", 0, of_ranks(1), 7, 19, 5)
    assert differences("a2a_dispatch", here, there, 2, 5) == [
        "active_ranks",
        "max_tokens (24 on rank 2, 20 on rank 5)",
        "stats (left out on rank 2, of 5 words on rank 5)",
    ]
    assert differences("coll_reduce", 0, pack("ht_combine", 1, 0), 0, 1) == [
        "weighted (False on rank 0, True on rank 1)"
    ]
    assert differences("ht_dispatch", here, here, 0, 1) == []
