// SPDX-License-Identifier: Apache-2.0
// Where tokens go: which rank holds which expert, what a token selects, and in which order ranks are served.
#pragma once

#include <moegen/work.cuh>

namespace moegen {

// Each rank holds a contiguous share of the experts; the first kLarger ranks hold one more than the others.
template <uint32_t kNumberOfExperts, uint32_t kNumberOfRanks>
struct Partition {
    static constexpr uint32_t kNumber = kNumberOfExperts;
    static constexpr uint32_t kRanks = kNumberOfRanks;
    static constexpr uint32_t kLocal = (kNumber + kRanks - 1) / kRanks;  // experts that a rank holds at most
    static constexpr uint32_t kLarger = kNumber % kRanks;                // 0: all ranks hold kLocal

    static __device__ __forceinline__ uint32_t rank_of(uint32_t expert) {
        if constexpr (kLarger == 0) {
            return expert / kLocal;
        } else {
            constexpr uint32_t kInLarger = kLarger * kLocal;
            return expert < kInLarger ? expert / kLocal : kLarger + (expert - kInLarger) / (kLocal - 1);
        }
    }

    static __device__ __forceinline__ uint32_t first_of(uint32_t rank) {
        if constexpr (kLarger == 0) {
            return rank * kLocal;
        } else {
            return rank * kLocal - (rank > kLarger ? rank - kLarger : 0);
        }
    }

    static __device__ __forceinline__ uint32_t number_of(uint32_t rank) {
        if constexpr (kLarger == 0) {
            return kLocal;
        } else {
            return kLocal - (rank >= kLarger ? 1 : 0);
        }
    }
};

}  // namespace moegen
