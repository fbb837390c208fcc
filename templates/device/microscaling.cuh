// SPDX-License-Identifier: Apache-2.0
// MXFP8 and NVFP4: groups of small numbers that share a scale. No chip's own instructions: one rule for all targets.
#pragma once

#include <moegen/numeric.cuh>
#include <moegen/ptx.cuh>

namespace moegen {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fc00000u;

// The scale of a group: as it is stored, and what its elements are multiplied by.
struct GroupScale {
    uint32_t code;
    float factor;
};

// MXFP8: the least power of two that brings the group to 448 or less, as E8M0. `amax`: bits of the group's largest
// magnitude. 448 is 1.75 * 2**8: above that mantissa it takes one more. A group with a NaN or an infinity becomes NaN.
__device__ __forceinline__ GroupScale mxfp8_scale(uint32_t amax) {
    if (amax >= kInfinityBits) return GroupScale{0xff, __uint_as_float(kNanBits)};
    const uint32_t exponent = (amax + 0x1fffffu) >> 23;
    const uint32_t code = exponent > 8 ? exponent - 8 : 0;
    return GroupScale{code, __uint_as_float((254 - code) << 23)};
}

// NVFP4: the scale, in e4m3, that makes the group's largest element 6, all times `output_scale`. Where that rounds to
// 0, elements become 0. A group with a NaN or an infinity has the scale NaN.
__device__ __forceinline__ GroupScale nvfp4_scale(uint32_t amax, float output_scale) {
    const float largest = __uint_as_float(amax >= kInfinityBits ? kNanBits : amax);
    const uint32_t code = round_to_e4m3x2(output_scale * (largest * (1.0f / 6.0f)), 0.0f) & 0xff;
    return GroupScale{code, (code & 0x7f) == 0 ? 0.0f : __fdiv_rn(output_scale, e4m3_to_float(code))};
}

// FP4 e2m1: to nearest, ties to even, at most 6, which every NaN becomes. A number is rounded at a place by adding the
// power of two whose last place that is: 0.5 below 2, then 1, then 2.
__device__ __forceinline__ uint32_t round_to_e2m1(float value) {
    constexpr uint32_t kExponentOfOne = 127u << 23;
    const float magnitude = fminf(fabsf(value), 6.0f);
    const uint32_t exponent = max(__float_as_uint(magnitude) & kInfinityBits, kExponentOfOne);
    const uint32_t power = exponent + (22u << 23);
    const uint32_t places = __float_as_uint(magnitude + __uint_as_float(power)) - power;
    return (value < 0.0f ? 8u : 0u) | (places + ((exponent - kExponentOfOne) >> 22));
}

}  // namespace moegen
