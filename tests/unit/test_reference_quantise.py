# SPDX-License-Identifier: Apache-2.0
"""The reference of quantised results against what the formats are, and its layout of scales against its formula."""

from __future__ import annotations

import pytest
import torch

from moegen import reference_quantise as quantise


def numbers(*size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-40, 40, (*size[:1], 1), generator=generator)
    return torch.randn(size, generator=generator) * torch.pow(2.0, exponents)


def test_mxfp8_loses_no_more_than_half_a_last_place() -> None:
    x = numbers(200, 96)
    data, scales = quantise.quantise_mxfp8(x)
    unit = torch.pow(2.0, scales.double() - 127)[..., None]
    groups = x.double().reshape(200, 3, 32)
    largest = groups.abs().amax(dim=2, keepdim=True) / unit
    assert (largest <= 448).all()
    assert (largest > 224).all()
    error = (quantise.dequantise_mxfp8(data, scales).reshape(groups.shape) - groups).abs() / unit
    assert (error <= torch.maximum(groups.abs() / unit * 2.0**-4, torch.tensor(2.0**-10))).all()


def test_nvfp4_takes_the_nearest() -> None:
    x = numbers(200, 64).clamp(-2000, 2000)
    x[:2] = 0
    x[1, ::16] = 6.0
    x[1, 1::16] = torch.tensor([0.25, 0.75, 5.0, -2.5])
    data, scales = quantise.quantise_nvfp4(x)
    ties = quantise.dequantise_nvfp4(data, scales)[1, 1::16].tolist()
    assert ties == [0.0, 1.0, 4.0, -2.0]
    groups, unit = x.double().reshape(200, 4, 16), scales.double()[..., None]
    values = torch.tensor(quantise.E2M1, dtype=torch.float64)
    nearest = (groups.abs()[..., None] - unit[..., None] * values).abs().amin(dim=-1)
    error = (quantise.dequantise_nvfp4(data, scales).reshape(groups.shape) - groups).abs()
    assert (error <= nearest * (1 + 2.0**-20) + groups.abs() * 2.0**-22).all()


def test_output_scale_moves_the_scales() -> None:
    x = numbers(20, 32).clamp(-100, 100)
    data, scales = quantise.quantise_nvfp4(x, 1.0)
    doubled, twice = quantise.quantise_nvfp4(x, 2.0)
    usual = (scales.float() >= 2.0**-6) & (scales.float() < 224)
    assert torch.equal(twice.float()[usual], 2 * scales.float()[usual])
    assert torch.equal(doubled.reshape(20, 2, 8)[usual], data.reshape(20, 2, 8)[usual])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_makes_its_group_none(bad: float) -> None:
    x = torch.ones(1, 64)
    x[0, 40] = bad
    data, scales = quantise.quantise_mxfp8(x)
    assert scales[0].tolist() == [127 - 8, 255]
    assert quantise.dequantise_mxfp8(data, scales).isnan()[0].tolist() == [False] * 32 + [True] * 32
    data, scales = quantise.quantise_nvfp4(x)
    assert scales.float().isnan()[0].tolist() == [False, False, True, False]
    assert (data[0, 16:24] == 0x77).all()


def test_tiles_are_where_the_formula_says() -> None:
    tokens, groups = 300, 6
    scales = torch.randint(1, 256, (tokens, groups)).to(torch.uint8)
    tiled = quantise.in_tiles(scales)
    assert tiled.shape == (384, 8)
    flat, seen = tiled.flatten(), torch.zeros(384 * 8, dtype=torch.bool)
    for m in range(tokens):
        for k in range(groups):
            at = (m // 128 * (8 // 4) + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
            assert flat[at] == scales[m, k]
            seen[at] = True
    assert not flat[~seen].any()
