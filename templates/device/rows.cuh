// SPDX-License-Identifier: Apache-2.0
// Rows: how warp groups copy them.
#pragma once

#include <moegen/work.cuh>

namespace moegen {

// A part of a row in a warp group's registers. Of the row's kUnits units from `first` on, each thread has every
// Group::kSize-th, and kMostAhead at most: it loads all of them before it uses one.
template <class Group, class Unit, uint32_t kUnits, uint32_t kMostAhead>
struct RowPart {
    static constexpr uint32_t kSteps = (kUnits + Group::kSize - 1) / Group::kSize;  // units of a whole row
    static constexpr uint32_t kAhead = kSteps < kMostAhead ? kSteps : kMostAhead;
    static constexpr uint32_t kLength = kAhead * Group::kSize;  // from one part's first unit to the next one's
    static constexpr uint32_t kEnd = kUnits;

    Unit units[kAhead];

    // Where the unit of a step is in the row.
    static __device__ __forceinline__ uint32_t unit_index(uint32_t first, uint32_t step) {
        return first + step * Group::kSize + Group::thread();
    }

    static __device__ __forceinline__ RowPart load(const Unit* row, uint32_t first) {
        RowPart part = {};
#pragma unroll
        for (uint32_t step = 0; step < kAhead; ++step) {
            if (unit_index(first, step) < kUnits) part.units[step] = row[unit_index(first, step)];
        }
        return part;
    }

    __device__ __forceinline__ void store(Unit* row, uint32_t first) const {
#pragma unroll
        for (uint32_t step = 0; step < kAhead; ++step) {
            if (unit_index(first, step) < kUnits) row[unit_index(first, step)] = units[step];
        }
    }

    // A whole row, two parts at a time.
    static __device__ __forceinline__ void copy(const Unit* from, Unit* to) {
#pragma unroll 1
        for (uint32_t first = 0; first < kEnd; first += 2 * kLength) {
            const RowPart one = load(from, first);
            const RowPart two = load(from, first + kLength);
            one.store(to, first);
            two.store(to, first + kLength);
        }
    }

    static __device__ __forceinline__ void store_zeros(Unit* row) {
        for (uint32_t first = 0; first < kEnd; first += kLength) RowPart{}.store(row, first);
    }
};

}  // namespace moegen
