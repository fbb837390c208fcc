# SPDX-License-Identifier: Apache-2.0
"""Warp functions and plain intrinsics."""

from __future__ import annotations

import numpy as np
import pytest
from simt_harness import Kernels, words

LANES = np.arange(32)


def rows_of(kernels: Kernels, kernel: str, rows: int, seed: int, warps: int = 2) -> np.ndarray:
    out = words(rows * 32 * warps)
    kernels.launch(kernel, block=32 * warps, out=out, seed=seed)
    return out.reshape(rows, warps, 32)


@pytest.mark.parametrize("seed", [0, 5])
def test_shuffles(kernels: Kernels, seed: int) -> None:
    result = rows_of(kernels, "shuffles", 8, seed)
    sources = [
        np.full(32, 5),
        LANES // 8 * 8 + (LANES + 1) % 8,
        np.where(LANES < 3, LANES, LANES - 3),
        np.where(LANES % 16 + 3 >= 16, LANES, LANES + 3),
        LANES ^ 17,
        np.full(32, 31),
        LANES ^ 1,
    ]
    for row, source in enumerate(sources):
        for warp in range(2):
            assert (result[row, warp] == 100 * warp + source).all(), row
    assert (result[7] == np.where(LANES < 16, 120 + 5, 376)).all()


@pytest.mark.parametrize("seed", [0, 5])
def test_votes_and_matches(kernels: Kernels, seed: int) -> None:
    result = rows_of(kernels, "votes", 11, seed)

    def mask(lanes: np.ndarray) -> int:
        return sum(1 << int(lane) for lane in lanes)

    halves = [mask(LANES[(LANES % 2 == 0) & (LANES < 8)]), mask(LANES[(LANES % 2 == 1) & (LANES >= 8)])]
    expected = [
        np.full(32, mask(LANES[LANES % 3 == 0])),
        *(np.full(32, value) for value in (0, 1, 1, 0)),
        np.where(LANES % 2 == 0, *halves),
        np.array([mask(LANES[lane // 5 == LANES // 5]) for lane in LANES]),
        np.array([mask(LANES[lane % 2 == LANES % 2]) for lane in LANES]),
        np.full(32, 0xFFFFFFFF),
        np.full(32, 1),
        np.full(32, 1),
    ]
    for row, values in enumerate(expected):
        assert (result[row] == values).all(), row


@pytest.mark.parametrize("seed", [0, 5])
def test_reductions(kernels: Kernels, seed: int) -> None:
    result = rows_of(kernels, "reductions", 6, seed)
    values = LANES - 10
    expected = [values.sum(), values.min() & 0xFFFFFFFF, values.max(), 0xFFFFFFFF, 0xFFFFFFFF]
    for row, value in enumerate(expected):
        assert (result[row] == value).all(), row
    assert (result[5] == np.where(LANES < 3, 6, 0)).all()


def test_intrinsics(kernels: Kernels) -> None:
    out = words(20)
    kernels.launch("intrinsics", block=1, out=out)
    expected = [8, 2, 4, 41, 0, 31, 32, 0x80000000, 0x1E6A2C48, 0x18, 0xA0000001, 0x77553311, 0x3F800000, 3, 10, 4]
    assert out.tolist() == [*expected, 2, 3, 5, 816]


@pytest.mark.parametrize(
    ("kernel", "text"),
    [
        ("mask_without_caller", "thread 0: __syncwarp with mask 0xfffffffe, which leaves out the calling lane"),
        ("mask_of_exited_lane", "exited"),
        ("two_masks", "wait for it in __ballot_sync with mask 0xffffffff"),
        ("two_operations", "comes to __all_sync with mask 0xffffffff, but lanes 0x0000007f wait for it in __any_sync"),
    ],
)
@pytest.mark.parametrize("seed", [0, 6])
def test_wrong_masks_are_reported(kernels: Kernels, kernel: str, text: str, seed: int) -> None:
    reported = kernels.error(kernel, seed=seed)
    assert seed or text in reported
