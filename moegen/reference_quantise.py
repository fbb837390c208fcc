# SPDX-License-Identifier: Apache-2.0
"""The definition of right for results that share scales: MXFP8 and NVFP4 in plain torch."""

from __future__ import annotations

import torch

MXFP8_GROUP = 32
NVFP4_GROUP = 16
LARGEST_E4M3 = 448.0
LARGEST_E2M1 = 6.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of FP4, by their three bits."""

_E8M0_BIAS = 127
_E8M0_NAN = 0xFF
_E4M3_NAN = 0x7F


def quantise_mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of 32 elements that share a scale of E8M0, a power of two.

    The scale is the least power of two, at least 2**-127, with amax / scale <= 448; elements are e4m3(x / scale), to
    nearest, ties to even. The OCP Microscaling specification (v1.0, 6.3) has 2**(floor(log2(amax)) - 8) instead, by
    which elements of up to 512 times the scale are cut to 448. Rounding up cuts nothing; it is what the kernels of
    TensorRT-LLM and FlashInfer do (amax / 448 to E8M0, rounded towards infinity), but for the last place of their
    approximate 1 / 448. A group with a NaN or an infinity becomes NaN: its scale and all of its elements.

    Args:
        x: float32 [T, hidden], hidden a multiple of 32.

    Returns:
        float8_e4m3fn [T, hidden], and uint8 [T, hidden / 32]: 2**(byte - 127), or NaN: 255.
    """
    groups, amax, finite = _grouped(x, MXFP8_GROUP)
    mantissa, exponent = torch.frexp(amax.double() / LARGEST_E4M3)  # in [0.5, 1) times a power of two, or 0
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    exponent = torch.where(amax == 0, -_E8M0_BIAS, exponent.clamp(min=-_E8M0_BIAS))
    scaled = torch.ldexp(groups.double(), -exponent[..., None]).float()
    scaled = torch.where(finite[..., None], scaled, torch.nan)
    data = torch.where(scaled.isnan(), _E4M3_NAN, scaled.to(torch.float8_e4m3fn).view(torch.uint8))
    scales = torch.where(finite, exponent + _E8M0_BIAS, _E8M0_NAN).to(torch.uint8)
    return data.to(torch.uint8).reshape(x.shape).view(torch.float8_e4m3fn), scales


def quantise_nvfp4(x: torch.Tensor, output_scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Groups of 16 elements that share a scale of e4m3, all of them multiplied by `output_scale`.

    scale = e4m3(output_scale * (amax * fl(1/6))), at most 448; elements are e2m1(x * fl(output_scale / scale)), to
    nearest, ties to even, at most 6, -0 as 0; where the scale is 0 they are 0. All in fp32. These are the kernels of
    TensorRT-LLM and FlashInfer with exact in place of approximate reciprocals. A group with a NaN or an infinity has
    the scale NaN, and elements of 6.

    Args:
        x: float32 [T, hidden], hidden a multiple of 16.
        output_scale: positive; as float32.

    Returns:
        uint8 [T, hidden / 2], two elements in a byte, the first in its low half; float8_e4m3fn [T, hidden / 16].
    """
    groups, amax, finite = _grouped(x, NVFP4_GROUP)
    factor = torch.tensor(output_scale, dtype=torch.float32, device="cpu")
    wanted = factor * (amax * torch.tensor(1 / LARGEST_E2M1, dtype=torch.float32, device="cpu"))
    scales = wanted.clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn)
    scales = torch.where(finite, scales.view(torch.uint8), _E4M3_NAN).to(torch.uint8).view(torch.float8_e4m3fn)
    divisor = scales.float()
    factors = torch.where(divisor == 0, 0.0, factor / divisor)
    codes = _e2m1(groups * factors[..., None]).reshape(len(x), x.shape[1] // 2, 2)
    return codes[..., 0] | codes[..., 1] << 4, scales


def dequantise_mxfp8(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float64 [T, hidden]: what the numbers stand for."""
    exponent = scales.int() - _E8M0_BIAS
    values = torch.ldexp(data.double().reshape(*scales.shape, MXFP8_GROUP), exponent[..., None])
    return torch.where((scales == _E8M0_NAN)[..., None], torch.nan, values).reshape(data.shape)


def dequantise_nvfp4(data: torch.Tensor, scales: torch.Tensor, output_scale: float = 1.0) -> torch.Tensor:
    """float64 [T, hidden]: what the numbers stand for."""
    codes = torch.stack((data & 15, data >> 4), dim=-1).reshape(*scales.shape, NVFP4_GROUP).long()
    values = torch.tensor(E2M1, dtype=torch.float64, device="cpu")[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    return (values * scales.double()[..., None] / output_scale).reshape(len(data), 2 * data.shape[1])


def in_tiles(scales: torch.Tensor) -> torch.Tensor:
    """Scales [T, groups] in layout "128x4": [ceil(T / 128) * 128, ceil(groups / 4) * 4], zero where there is none. The
    tiles of 128 tokens and 4 groups follow each other along a row of tiles; a tile has the tokens m, m + 32, m + 64 and
    m + 96 in 16 consecutive bytes, 4 groups each.
    """
    tokens, groups = scales.shape
    padded = torch.zeros(-(-tokens // 128) * 128, -(-groups // 4) * 4, dtype=torch.uint8, device="cpu")
    padded[:tokens, :groups] = scales.view(torch.uint8)
    tiles = padded.reshape(len(padded) // 128, 4, 32, padded.shape[1] // 4, 4)  # tile, fourth, token, tile, group
    return tiles.permute(0, 3, 2, 1, 4).reshape(padded.shape).view(scales.dtype)


def _grouped(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[T, groups, group], the largest magnitude of each, and whether it is a number and finite."""
    groups = x.float().reshape(len(x), x.shape[1] // group, group)
    amax = groups.abs().amax(dim=2)
    finite = amax.isfinite()
    return groups, torch.where(finite, amax, 0.0), finite


def _e2m1(values: torch.Tensor) -> torch.Tensor:
    """uint8: sign and three bits. A tie goes to the even ones of E2M1: down at 0.25, 1.25, 2.5 and 5."""
    magnitude = values.abs()[..., None]
    code = (magnitude > torch.tensor((0.25, 1.25, 2.5, 5.0), dtype=torch.float32, device="cpu")).sum(dim=-1)
    code += (magnitude >= torch.tensor((0.75, 1.75, 3.5), dtype=torch.float32, device="cpu")).sum(dim=-1)
    code = torch.where(values.isnan(), len(E2M1) - 1, code)
    return (code + 8 * (values < 0).int()).to(torch.uint8)
