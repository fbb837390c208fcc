// SPDX-License-Identifier: Apache-2.0
// Conversions between stored numbers and the fp32 in which all sums are formed.
#pragma once

#include <moegen/ptx.cuh>

namespace moegen {

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// The e4m3 number in the low eight bits. Its exponent, put where a float has its own, is 120 too small.
__device__ __forceinline__ float e4m3_to_float(uint32_t bits) {
    const uint32_t magnitude = bits & 0x7f;
    const float value = magnitude == 0x7f ? __uint_as_float(0x7fc00000u)
                                          : __uint_as_float(magnitude << 20) * __uint_as_float((127u + 120) << 23);
    return (bits & 0x80) != 0 ? -value : value;
}

}  // namespace moegen
