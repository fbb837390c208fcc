// SPDX-License-Identifier: Apache-2.0
// Who does what in a launch: specialized blocks, the warp groups of a block, and the order in which they take work.
#pragma once

#include <moegen/ptx.cuh>

namespace moegen {

// Block specialization: remote stores back-pressure the SM's load/store unit, so senders and receivers run on different
// SMs.
struct Blocks {
    uint32_t first;
    uint32_t blocks;
};

__device__ __forceinline__ bool is_one_of(Blocks blocks) { return blockIdx.x - blocks.first < blocks.blocks; }

// Addition modulo the ranks, so that each source starts with another destination.
template <uint32_t kRanks>
__device__ __forceinline__ uint32_t rank_after(uint32_t rank, uint32_t steps) {
    const uint32_t sum = rank + steps;
    return sum < kRanks ? sum : sum - kRanks;
}

// A block has kGroups warp groups of kThreads threads; a warp group moves one row at a time.
template <uint32_t kGroups, uint32_t kThreads>
struct WarpGroup {
    static constexpr uint32_t kSize = kThreads;

    static __device__ __forceinline__ uint32_t index() { return threadIdx.x / kThreads; }
    static __device__ __forceinline__ uint32_t thread() { return threadIdx.x % kThreads; }

    static __device__ __forceinline__ void sync() {
        if constexpr (kGroups == 1) {
            __syncthreads();
        } else if constexpr (kThreads == kWarpSize) {
            __syncwarp();
        } else {
            barrier_sync(1 + index(), kThreads);
        }
    }

    // A barrier that also tells whether `holds` holds for all threads of the warp group.
    static __device__ __forceinline__ bool all(bool holds) {
        if constexpr (kGroups == 1) {
            return __syncthreads_and(holds) != 0;
        } else if constexpr (kThreads == kWarpSize) {
            const bool verdict = __all_sync(kFullWarp, holds) != 0;
            __syncwarp();
            return verdict;
        } else {
            __shared__ uint32_t others[kGroups];
            if (thread() == 0) others[index()] = 0;
            sync();
            if (!holds) atomicMax(&others[index()], 1u);
            sync();
            const bool verdict = others[index()] == 0;
            sync();
            return verdict;
        }
    }

    // Work is dealt round-robin to the warp groups of these blocks: each begins with its first work index and goes on
    // by their number. Blocks are numbered first and warp groups second, so that a small batch still uses every SM.
    static __device__ __forceinline__ uint32_t first_work(Blocks blocks) {
        return index() * blocks.blocks + blockIdx.x - blocks.first;
    }
    static __device__ __forceinline__ uint32_t number_in(Blocks blocks) { return blocks.blocks * kGroups; }
};

}  // namespace moegen
