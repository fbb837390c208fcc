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

// Number formats of rows: how many elements a 32-bit word holds, what they are in fp32, and fp32 rounded to such a
// word.
struct Bf16 {
    static constexpr uint32_t kPerWord = 2;
    static __device__ __forceinline__ float element(uint32_t word, uint32_t index) {
        return index == 0 ? low_bf16(word) : high_bf16(word);
    }
    static __device__ __forceinline__ uint32_t word(const float* values) {
        return round_to_bf16x2(values[0], values[1]);
    }
};

struct Fp16 {
    static constexpr uint32_t kPerWord = 2;
    static __device__ __forceinline__ float element(uint32_t word, uint32_t index) {
        return index == 0 ? low_f16(word) : high_f16(word);
    }
    static __device__ __forceinline__ uint32_t word(const float* values) {
        return round_to_f16x2(values[0], values[1]);
    }
};

struct Fp32 {
    static constexpr uint32_t kPerWord = 1;
    static __device__ __forceinline__ float element(uint32_t word, uint32_t) { return __uint_as_float(word); }
    static __device__ __forceinline__ uint32_t word(const float* values) { return __float_as_uint(values[0]); }
};

struct E4m3 {
    static constexpr uint32_t kPerWord = 4;
    static __device__ __forceinline__ float element(uint32_t word, uint32_t index) {
        return e4m3_to_float(word >> 8 * index);
    }
};

}  // namespace moegen
