// SPDX-License-Identifier: Apache-2.0
// Reductions: rows are accumulated in fp32, in a fixed order, and rounded once.
#pragma once

#include <moegen/numeric.cuh>
#include <moegen/ptx.cuh>

namespace moegen {

// Sums of the elements of 16-byte vectors, which are of a number format. A thread has an array of them for its vectors
// of a row.
template <class Format>
struct Sums {
    static constexpr uint32_t kElements = 4 * Format::kPerWord;

    float values[kElements];
};

template <class Format, class AddElement>
__device__ __forceinline__ void add_elements(Sums<Format>& sums, uint4 vector, AddElement add_element) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (uint32_t index = 0; index < sums.kElements; ++index) {
        add_element(sums.values[index], Format::element(words[index / Format::kPerWord], index % Format::kPerWord));
    }
}

template <class Format, uint32_t kVectors>
__device__ __forceinline__ void add(Sums<Format> (&sums)[kVectors], const uint4 (&vectors)[kVectors]) {
#pragma unroll
    for (uint32_t step = 0; step < kVectors; ++step) {
        add_elements(sums[step], vectors[step], [](float& sum, float element) { sum += element; });
    }
}

template <class Format, uint32_t kVectors>
__device__ __forceinline__ void add(Sums<Format> (&sums)[kVectors], const uint4 (&vectors)[kVectors], float weight) {
#pragma unroll
    for (uint32_t step = 0; step < kVectors; ++step) {
        add_elements(sums[step], vectors[step], [=](float& sum, float element) { sum = fmaf(weight, element, sum); });
    }
}

template <class Format, uint32_t kVectors>
__device__ __forceinline__ void add(Sums<Format> (&sums)[kVectors], const Sums<Format> (&more)[kVectors]) {
#pragma unroll
    for (uint32_t step = 0; step < kVectors; ++step) {
#pragma unroll
        for (uint32_t index = 0; index < sums[step].kElements; ++index) {
            sums[step].values[index] += more[step].values[index];
        }
    }
}

template <class Format>
__device__ __forceinline__ void scale(Sums<Format>& sums, float factor) {
#pragma unroll
    for (uint32_t index = 0; index < sums.kElements; ++index) sums.values[index] *= factor;
}

// A vector of the sums, in the format of what was added.
template <class Format>
__device__ __forceinline__ uint4 rounded(const Sums<Format>& sums) {
    uint32_t words[4];
#pragma unroll
    for (uint32_t word = 0; word < 4; ++word) words[word] = Format::rounded(sums.values + word * Format::kPerWord);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace moegen
