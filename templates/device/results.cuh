// SPDX-License-Identifier: Apache-2.0
// Where a token's sum goes: a row of elements in a number format, which may share scales.
#pragma once

#include <moegen/microscaling.cuh>
#include <moegen/quantize.cuh>
#include <moegen/reduce.cuh>

namespace moegen {

// The kVector-th words of a row, of a thread: kBytes of them.
template <uint32_t kBytes, uint32_t kWords>
__device__ __forceinline__ void store_words(uint8_t* row, uint32_t vector, const uint32_t (&words)[kWords]) {
    if constexpr (kBytes == 2) {
        reinterpret_cast<uint16_t*>(row)[vector] = uint16_t(words[0]);
    } else if constexpr (kBytes == 4) {
        reinterpret_cast<uint32_t*>(row)[vector] = words[0];
    } else if constexpr (kBytes == 8) {
        reinterpret_cast<uint2*>(row)[vector] = make_uint2(words[0], words[1]);
    } else {
        uint4* to = reinterpret_cast<uint4*>(row) + vector * (kWords / 4);
#pragma unroll
        for (uint32_t word = 0; word < kWords; word += 4) {
            to[word / 4] = make_uint4(words[word], words[word + 1], words[word + 2], words[word + 3]);
        }
    }
}

// A row of kHidden elements, each rounded once.
template <class Format, uint32_t kHidden>
struct PlainResult {
    uint8_t* row;

    template <class Params>
    static __device__ __forceinline__ PlainResult of_token(const Params& p, uint32_t token) {
        return PlainResult{p.out + uint64_t(token) * (kHidden / Format::kPerWord * 4)};
    }

    // The sums of a vector of what was added; nothing beyond the row.
    template <uint32_t kElements>
    __device__ __forceinline__ void store_vector(uint32_t vector, const float (&values)[kElements]) const {
        if (vector >= kHidden / kElements) return;
        uint32_t words[kElements / Format::kPerWord];
#pragma unroll
        for (uint32_t word = 0; word < kElements / Format::kPerWord; ++word) {
            words[word] = Format::word(values + word * Format::kPerWord);
        }
        store_words<sizeof(words)>(row, vector, words);
    }
};

// The elements of a row, and a scale of 8 bits for each group of them. A group's elements lie in the vectors of
// neighboring lanes. Scales lie token by token, or in tiles of 128 tokens and 4 scales: 32 rows of 16 bytes, in which
// each fourth of the tokens has 4.
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
    __device__ __forceinline__ void store_vector(uint32_t vector, const float (&values)[kElements]) const {
        constexpr uint32_t kLanes = Format::kGroup / kElements;  // that have a group
        const GroupScale scale = Format::scale_of(amax_of_group<kLanes>(values), output_scale);
        if (vector >= kHidden / kElements) return;
        constexpr uint32_t kBytes = kElements * Format::kBits / 8;
        uint32_t words[(kBytes + 3) / 4] = {};
        Format::encode(values, scale.factor, words);
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

template <class Part, class Result, class Format>
__device__ __forceinline__ void store_sums(const Result& result, uint32_t first,
                                           const Sums<Format> (&sums)[Part::kAhead]) {
#pragma unroll
    for (uint32_t step = 0; step < Part::kAhead; ++step)
        result.store_vector(Part::unit_index(first, step), sums[step].values);
}

}  // namespace moegen
