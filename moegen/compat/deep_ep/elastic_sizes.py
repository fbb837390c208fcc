# SPDX-License-Identifier: Apache-2.0
"""What `ElasticBuffer` answers about sizes and numbers of multiprocessors."""

from __future__ import annotations

import math

from moegen.compat.rows import capacity_for
from moegen.errors import InputError
from moegen.kernels.ht import regions
from moegen.kernels.ll import ceil_div
from moegen.kernels.problem import Problem
from moegen.kernels.spec import MAX_EXPERTS
from moegen.select import select_rows

BUFFER_ALIGNMENT = 2 << 20
USUAL_TOPK = 8
NVLINK_GBS = 430.0
"""Of 18 links of the fourth generation, what is left for rows."""

HEADROOM = 1.25
FEWEST_SMS = 4


def buffer_bytes(num_ranks: int, max_tokens: int, hidden: int, num_topk: int, use_fp8: bool) -> int:
    """Symmetric memory per rank of the object that such calls make, with as many experts as there can be; multiples of
    2 MiB.
    """
    experts = MAX_EXPERTS // num_ranks * num_ranks
    dtype = "e4m3" if use_fp8 else "bf16"
    capacity = capacity_for(max_tokens)
    problem = Problem(num_ranks, experts, num_topk or USUAL_TOPK, hidden, capacity, dtype, "token", on_host=True)
    selection = select_rows(problem)
    dispatch = regions(selection.dispatch, capacity, 0)
    end = regions(selection.combine, capacity, dispatch.end).end
    return ceil_div(end, BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT


def expected_ranks(num_ranks: int, num_experts: int, num_topk: int) -> float:
    """Ranks that a token reaches on average, if all sets of experts are equally likely."""
    if num_experts % num_ranks != 0:
        raise InputError(f"num_experts is a multiple of the {num_ranks} ranks; got {num_experts}")
    elsewhere = math.comb(num_experts - num_experts // num_ranks, num_topk)
    return num_ranks * (1 - elsewhere / math.comb(num_experts, num_topk))


def sms_that_fill_the_link(
    num_ranks: int, num_experts: int, num_topk: int, link_gbs: float, read_gbs: float, write_gbs: float
) -> int:
    """Multiprocessors that move rows as fast as the link does, a quarter more, even.

    A token that reaches d ranks is read once; (R - 1) / R of its d copies cross the link into the receivers' staging,
    and each copy is read there and written to its row. So per token

        link: d * (R - 1) / R,   read: 1 + d,   written: d * (R - 1) / R + d,

    and the multiprocessors need max(read / read_gbs, written / write_gbs) of the time that the link needs.

    Returns:
        0 if nothing crosses a link: nothing bounds the number then.
    """
    reach = expected_ranks(num_ranks, num_experts, num_topk)
    crossing = reach * (num_ranks - 1) / num_ranks
    if crossing == 0:
        return 0
    busy = max((1 + reach) / read_gbs, (crossing + reach) / write_gbs)
    sms = math.ceil(HEADROOM * busy / (crossing / link_gbs))
    return max(FEWEST_SMS, sms + sms % 2)


def expanded_rows(num_ranks: int, max_tokens: int, num_topk: int, local_experts: int, alignment: int) -> int:
    """Room for whatever may come, with every expert's rows filled up to the alignment."""
    most = num_ranks * max_tokens * min(num_topk, local_experts) + (alignment - 1) * local_experts
    return ceil_div(most, alignment) * alignment
