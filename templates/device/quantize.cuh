// SPDX-License-Identifier: Apache-2.0
// Rows of bf16 become FP8 e4m3: elements are divided by the scale of their group, which makes its largest 448.
#pragma once

#include <moegen/numeric.cuh>
#include <moegen/rows.cuh>

namespace moegen {

constexpr uint32_t kScaleGroup = 128;                      // elements that share a scale
constexpr uint32_t kScaleGroupVectors = kScaleGroup / 16;  // 16-byte vectors of FP8

// The largest magnitude of eight bf16, as the bits of a float: those of numbers that are not negative order as they do.
// bf16 below the sign bit order like integers too.
__device__ __forceinline__ uint32_t largest_magnitude(uint4 vector) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
    uint32_t largest = 0;
#pragma unroll
    for (uint32_t word = 0; word < 4; ++word) {
        largest = max(largest, max(words[word] << 16 & 0x7fff0000u, words[word] & 0x7fff0000u));
    }
    return largest;
}

// The largest value of kLanes neighboring lanes. All lanes of the warp take part.
template <uint32_t kLanes>
__device__ __forceinline__ uint32_t largest_of_lanes(uint32_t value) {
#pragma unroll
    for (uint32_t across = 1; across < kLanes; across *= 2) {
        value = max(value, __shfl_xor_sync(kFullWarp, value, across));
    }
    return value;
}

// Four bf16 to four FP8, and sixteen to sixteen.
__device__ __forceinline__ uint32_t quantize(uint32_t first, uint32_t second, float factor) {
    return round_to_e4m3x2(low_bf16(first) * factor, high_bf16(first) * factor) |
           round_to_e4m3x2(low_bf16(second) * factor, high_bf16(second) * factor) << 16;
}

__device__ __forceinline__ uint4 quantize(uint4 first, uint4 second, float factor) {
    return make_uint4(quantize(first.x, first.y, factor), quantize(first.z, first.w, factor),
                      quantize(second.x, second.y, factor), quantize(second.z, second.w, factor));
}

// The scales of a row's dtype: fp32, fp32 that are powers of two, or the exponents of those (UE8M0), four to a word.
enum class ScaleKind { kFp8, kFp8pow2, kFp8ue8m0 };

// Of a group whose largest magnitude has the bits `amax`.
template <ScaleKind kKind>
struct Fp8Scale {
    static constexpr uint32_t kPerWord = kKind == ScaleKind::kFp8ue8m0 ? 4 : 1;

    // What the elements are multiplied by.
    static __device__ __forceinline__ float factor(uint32_t amax) {
        if constexpr (kKind == ScaleKind::kFp8) {
            return __fdiv_rn(kLargest, max(__uint_as_float(amax), kSmallestAmax));
        } else {
            return __uint_as_float((254 - exponent(amax)) << 23);
        }
    }

    // A word as it travels: the scales of kPerWord groups.
    static __device__ __forceinline__ uint32_t packed(const uint32_t* amax) {
        if constexpr (kKind == ScaleKind::kFp8) {
            return __float_as_uint(exact(*amax));
        } else if constexpr (kKind == ScaleKind::kFp8pow2) {
            return exponent(*amax) << 23;
        } else {
            uint32_t exponents = 0;
#pragma unroll
            for (uint32_t group = 0; group < kPerWord; ++group) exponents |= exponent(amax[group]) << 8 * group;
            return exponents;
        }
    }

  private:
    static constexpr float kLargest = 448.0f;      // of e4m3
    static constexpr float kSmallestAmax = 1e-4f;  // no scale is zero

    static __device__ __forceinline__ float exact(uint32_t amax) {
        return max(__uint_as_float(amax), kSmallestAmax) * (1.0f / kLargest);
    }

    // Of the next power of two, as a float stores it.
    static __device__ __forceinline__ uint32_t exponent(uint32_t amax) {
        const uint32_t bits = __float_as_uint(exact(amax));
        return (bits >> 23) + ((bits & 0x7fffffu) != 0);
    }
};

// A part of a row of bf16, in FP8. A warp moves a row, so that a group is that of eight lanes.
template <class Part, ScaleKind kKind>
struct Fp8Part {
    using Scale = Fp8Scale<kKind>;

    Part part;
    uint32_t scales[Part::kAhead];  // the word of each vector's group

    // All lanes take part, also those beyond the row.
    static __device__ __forceinline__ Fp8Part load(const uint4* row, uint32_t first) {
        uint4 wide[Part::kAhead][2] = {};
#pragma unroll
        for (uint32_t step = 0; step < Part::kAhead; ++step) {
            const uint32_t at = Part::unit_index(first, step);
            if (at >= Part::kEnd) continue;
            wide[step][0] = row[2 * at];
            wide[step][1] = row[2 * at + 1];
        }
        Fp8Part made;
#pragma unroll
        for (uint32_t step = 0; step < Part::kAhead; ++step) {
            const uint32_t largest = max(largest_magnitude(wide[step][0]), largest_magnitude(wide[step][1]));
            const uint32_t amax = largest_of_lanes<kScaleGroupVectors>(largest);
            made.part.units[step] = quantize(wide[step][0], wide[step][1], Scale::factor(amax));
            made.scales[step] = scale_word(amax);
        }
        return made;
    }

    // Scales lie behind a row.
    __device__ __forceinline__ void store(uint4* row, uint32_t first) const {
        part.store(row, first);
        constexpr uint32_t kSharers = kScaleGroupVectors * Scale::kPerWord;  // vectors that share a word
#pragma unroll
        for (uint32_t step = 0; step < Part::kAhead; ++step) {
            const uint32_t at = Part::unit_index(first, step);
            if (at >= Part::kEnd || at % kSharers != 0) continue;
            reinterpret_cast<uint32_t*>(row + Part::kEnd)[at / kSharers] = scales[step];
        }
    }

  private:
    // Of the lane's group, or of the warp's four groups.
    static __device__ __forceinline__ uint32_t scale_word(uint32_t amax) {
        if constexpr (Scale::kPerWord == 1) {
            return Scale::packed(&amax);
        } else {
            uint32_t of_groups[4];
#pragma unroll
            for (uint32_t group = 0; group < 4; ++group) {
                of_groups[group] = __shfl_sync(kFullWarp, amax, group * kScaleGroupVectors);
            }
            return Scale::packed(of_groups);
        }
    }
};

}  // namespace moegen
