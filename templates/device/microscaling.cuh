// SPDX-License-Identifier: Apache-2.0
// MXFP8 and NVFP4: groups of small numbers that share a scale. No chip's own instructions: one rule for all targets.
#pragma once

#include <moegen/numeric.cuh>
#include <moegen/ptx.cuh>
#include <moegen/quantize.cuh>
#include <moegen/reduce.cuh>

namespace moegen {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kNanBits = 0x7fc00000u;

// The scale of a group: as it is stored, and what its elements are multiplied by.
struct GroupScale {
    uint32_t code;
    float factor;
};

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

// `amax`: bits of a group's largest magnitude. `words` begin as zeros, and have the elements from the lowest bits on.
struct Mxfp8 {
    static constexpr uint32_t kGroup = 32;
    static constexpr uint32_t kBits = 8;  // of an element

    // The least power of two that brings the group to 448 or less, as E8M0. 448 is 1.75 * 2**8: above that mantissa it
    // takes one more. A group with a NaN or an infinity becomes NaN.
    static __device__ __forceinline__ GroupScale scale_of(uint32_t amax, float) {
        if (amax >= kInfinityBits) return GroupScale{0xff, __uint_as_float(kNanBits)};
        const uint32_t exponent = (amax + 0x1fffffu) >> 23;
        const uint32_t code = exponent > 8 ? exponent - 8 : 0;
        return GroupScale{code, __uint_as_float((254 - code) << 23)};
    }

    template <uint32_t kElements>
    static __device__ __forceinline__ void quantize(const float (&values)[kElements], float factor, uint32_t* words) {
#pragma unroll
        for (uint32_t index = 0; index < kElements; index += 2) {
            words[index / 4] |= round_to_e4m3x2(values[index] * factor, values[index + 1] * factor) << 8 * (index % 4);
        }
    }
};

struct Nvfp4 {
    static constexpr uint32_t kGroup = 16;
    static constexpr uint32_t kBits = 4;

    // The scale, in e4m3, that makes the group's largest element 6, all times `output_scale`. Where that rounds to 0,
    // elements become 0. A group with a NaN or an infinity has the scale NaN.
    static __device__ __forceinline__ GroupScale scale_of(uint32_t amax, float output_scale) {
        const float largest = __uint_as_float(amax >= kInfinityBits ? kNanBits : amax);
        const uint32_t code = round_to_e4m3x2(output_scale * (largest * (1.0f / 6.0f)), 0.0f) & 0xff;
        return GroupScale{code, (code & 0x7f) == 0 ? 0.0f : __fdiv_rn(output_scale, e4m3_to_float(code))};
    }

    template <uint32_t kElements>
    static __device__ __forceinline__ void quantize(const float (&values)[kElements], float factor, uint32_t* words) {
#pragma unroll
        for (uint32_t index = 0; index < kElements; ++index) {
            words[index / 8] |= round_to_e2m1(values[index] * factor) << 4 * (index % 8);
        }
    }
};

// Where a token's sum goes if results are microscaled: elements, and a scale of 8 bits for each group. A group's
// elements lie in the vectors of neighboring lanes. Scales lie token by token, or in tiles of 128 tokens and 4 scales:
// 32 rows of 16 bytes, in which each fourth of the tokens has 4.
template <class Format, uint32_t kHidden, bool kTiled>
struct MicroscaledResult {
    static constexpr uint32_t kScales = kHidden / Format::kGroup;  // of a token
    static constexpr uint32_t kPaddedScales = kTiled ? (kScales + 3) / 4 * 4 : kScales;

    uint8_t* row;
    uint8_t* scales;  // the token's first
    float output_scale = 1.0f;

    template <class Params>
    static __device__ __forceinline__ MicroscaledResult of_token(const Params& p, uint32_t token) {
        MicroscaledResult result;
        result.row = p.out + uint64_t(token) * (kHidden * Format::kBits / 8);
        if constexpr (kTiled) {
            const uint64_t tiles = uint64_t(token / 128) * (kPaddedScales * 128);
            result.scales = p.scales + tiles + token % 32 * 16 + token % 128 / 32 * 4;
        } else {
            result.scales = p.scales + uint64_t(token) * kScales;
        }
        if constexpr (requires { p.output_scale; }) {
            result.output_scale = p.output_scale == nullptr ? 1.0f : *p.output_scale;
        }
        return result;
    }

    // The sums of a vector of what was added, and by one lane of a group its scale. All lanes of the warp take part; a
    // vector beyond the row is nobody's.
    template <uint32_t kElements>
    __device__ __forceinline__ void store(uint32_t vector, const float (&values)[kElements]) const {
        constexpr uint32_t kLanes = Format::kGroup / kElements;  // that have a group
        const GroupScale scale = Format::scale_of(amax_of_group<kLanes>(values), output_scale);
        if (vector >= kHidden / kElements) return;
        constexpr uint32_t kBytes = kElements * Format::kBits / 8;
        uint32_t words[(kBytes + 3) / 4] = {};
        Format::quantize(values, scale.factor, words);
        store_words<kBytes>(row, vector, words);
        if (vector % kLanes != 0) return;
        const uint32_t group = vector / kLanes;
        scales[scale_at(group)] = uint8_t(scale.code);
        if constexpr (kPaddedScales > kScales) {
            if (group != kScales - 1) return;
#pragma unroll
            for (uint32_t more = kScales; more < kPaddedScales; ++more) scales[scale_at(more)] = 0;
        }
    }

  private:
    static __device__ __forceinline__ uint32_t scale_at(uint32_t group) {
        return kTiled ? group / 4 * 512 + group % 4 : group;
    }

    // The largest magnitude of a group, as the bits of a float: those of numbers that are not negative order as they
    // do, and infinity and NaN come last.
    template <uint32_t kLanes, uint32_t kElements>
    static __device__ __forceinline__ uint32_t amax_of_group(const float (&values)[kElements]) {
        uint32_t largest = 0;
#pragma unroll
        for (uint32_t index = 0; index < kElements; ++index) {
            largest = max(largest, __float_as_uint(values[index]) & 0x7fffffffu);
        }
        return largest_of_lanes<kLanes>(largest);
    }
};

}  // namespace moegen
