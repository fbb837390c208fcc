// SPDX-License-Identifier: Apache-2.0
// Reductions: rows are accumulated in fp32, in a fixed order, and rounded once.
#pragma once

#include <moegen/numeric.cuh>
#include <moegen/ptx.cuh>
#include <moegen/routing.cuh>

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
    for (uint32_t word = 0; word < 4; ++word) words[word] = Format::word(sums.values + word * Format::kPerWord);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Sums of a part of a row.
template <class Format, class Part>
struct PartSums {
    Sums<Format> vectors[Part::kAhead];
};

// Adds up a part of the rows that a token has with these ranks, in their order. `load` fills in the part of the row at
// a rank and slot; kInFlight of them are loaded before the first is added.
template <uint32_t kInFlight, class Format, class Part, class Load>
__device__ __forceinline__ PartSums<Format, Part> sum_of_rows(uint64_t ranks, const int32_t* slots, Load load) {
    PartSums<Format, Part> sums = {};
#pragma unroll 1
    for (uint64_t rest = ranks; rest != 0;) {
        Part parts[kInFlight] = {};
#pragma unroll
        for (uint32_t row = 0; row < kInFlight; ++row) {
            if (rest == 0) break;
            const uint32_t rank = first_rank(rest);
            const uint32_t slot = uint32_t(*slots++);
            drop_first(rest);
            load(rank, slot, parts[row]);
        }
#pragma unroll
        for (uint32_t row = 0; row < kInFlight; ++row) add(sums.vectors, parts[row].units);
    }
    return sums;
}

// Rows that add up to one sum, in this order, and their weights.
template <uint32_t kMost>
struct TermList {
    const uint4* rows[kMost];
    float weights[kMost];
};

// A step of a sum that is formed part by part: a term of the part that begins with vector `first`.
struct SumStep {
    uint32_t term;
    uint32_t first;
};

template <class Part>
__device__ __forceinline__ SumStep step_after(SumStep step, uint32_t terms) {
    return step.term + 1 < terms ? SumStep{step.term + 1, step.first} : SumStep{0, step.first + Part::kLength};
}

template <class Part, uint32_t kMost>
__device__ __forceinline__ Part load_step(const TermList<kMost>& terms, SumStep step) {
    return step.first < Part::kEnd ? Part::load(terms.rows[step.term], step.first) : Part{};
}

// Behind the last term of a part its sums are rounded, stored and zero again.
template <class Format, class Part, uint32_t kMost>
__device__ __forceinline__ void add_step(const TermList<kMost>& terms, uint32_t number, SumStep step, const Part& part,
                                         Sums<Format> (&sums)[Part::kAhead], uint4* to) {
    if (step.first >= Part::kEnd) return;
    add(sums, part.units, terms.weights[step.term]);
    if (step.term + 1 != number) return;
    Part sum;
#pragma unroll
    for (uint32_t unit = 0; unit < Part::kAhead; ++unit) {
        sum.units[unit] = rounded(sums[unit]);
        sums[unit] = {};
    }
    sum.store(to, step.first);
}

// Reduces rows in a software pipeline whose stages are parts of terms. A part that was added is overwritten by a load:
// no register is moved while its load is in flight, which would wait for it.
template <class Format, class Part, uint32_t kMost>
__device__ __forceinline__ void store_sum(const TermList<kMost>& terms, uint32_t number, uint4* to) {
    constexpr uint32_t kInFlight = 3;
    if (number == 0) return Part::store_zeros(to);
    Sums<Format> sums[Part::kAhead] = {};
    Part parts[kInFlight];
    SumStep ahead{0, 0};
#pragma unroll
    for (uint32_t stage = 0; stage < kInFlight; ++stage, ahead = step_after<Part>(ahead, number)) {
        parts[stage] = load_step<Part>(terms, ahead);
    }
    SumStep step{0, 0};
#pragma unroll 1
    while (step.first < Part::kEnd) {
#pragma unroll
        for (uint32_t stage = 0; stage < kInFlight; ++stage) {
            add_step(terms, number, step, parts[stage], sums, to);
            parts[stage] = load_step<Part>(terms, ahead);
            step = step_after<Part>(step, number);
            ahead = step_after<Part>(ahead, number);
        }
    }
}

}  // namespace moegen
