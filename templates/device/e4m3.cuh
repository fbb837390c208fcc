// SPDX-License-Identifier: Apache-2.0
// FP8 e4m3 without hardware: CPUs, and GPUs before sm_89. Included by ptx.cuh only.
#pragma once

namespace moegen {

// As cvt.rn.satfinite.e4m3x2.f32: to nearest, ties to even, at most 448; every NaN becomes 0x7f.
__device__ __forceinline__ uint32_t round_to_e4m3(float value) {
    constexpr uint32_t kLargest = 0x7e;
    const uint32_t bits = __float_as_uint(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7f;
    uint32_t rounded;
    if (magnitude < 121u << 23) {  // below 2**-6: a multiple of 2**-9, which is the last place of 2**14
        constexpr float kShift = 16384.0f;
        rounded = __float_as_uint(__uint_as_float(magnitude) + kShift) - __float_as_uint(kShift);
    } else {
        rounded = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
    }
    return (bits >> 24 & 0x80u) | min(rounded, kLargest);
}

}  // namespace moegen
