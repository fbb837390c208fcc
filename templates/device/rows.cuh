// SPDX-License-Identifier: Apache-2.0
// Rows: where they lie in tensors and in the receive buffers of all ranks, and how warp groups copy them.
#pragma once

#include <moegen/epoch.cuh>
#include <moegen/work.cuh>

namespace moegen {

// What lies in the symmetric memory of a rank, `offset` bytes from its begin.
template <class T, class Params>
__device__ __forceinline__ T* peer_memory(const Params& p, uint32_t rank, const uint64_t& offset) {
    return reinterpret_cast<T*>(p.peers[rank] + offset);
}

// ---- tensors ------------------------------------------------------------------------------------

// A row of a tensor whose rows have kVectors 16-byte vectors.
template <uint32_t kVectors>
__device__ __forceinline__ const uint4* row_of(const uint8_t* tensor, uint64_t row) {
    return reinterpret_cast<const uint4*>(tensor) + row * kVectors;
}
template <uint32_t kVectors>
__device__ __forceinline__ uint4* row_of(uint8_t* tensor, uint64_t row) {
    return reinterpret_cast<uint4*>(tensor) + row * kVectors;
}

// A token as the user gave it.
template <class Params>
__device__ __forceinline__ const uint4* token_at(const Params& p, uint64_t token) {
    return reinterpret_cast<const uint4*>(p.x + token * p.x_stride);
}

// Ids behind a plane's rows, which nobody sends, become one that names no expert. Threads take turns.
template <class Params>
__device__ __forceinline__ void fill_unused_ids(const Params& p, int32_t* plane, uint32_t rows, uint64_t thread,
                                                uint64_t threads) {
    const uint64_t end = uint64_t(p.slots) * p.id_words;
#pragma unroll 1
    for (uint64_t at = uint64_t(rows) * p.id_words + thread; at < end; at += threads) plane[at] = p.unused_id;
}

// ---- receive buffers ----------------------------------------------------------------------------

// A receive buffer has a slot for each row that a source may send: slots are [source][capacity].
struct Slot {
    uint32_t source;
    const uint32_t& capacity;  // a parameter of the kernel: it is read where it is needed, and not before
    uint32_t row;

    __device__ __forceinline__ uint64_t number() const { return uint64_t(source) * capacity + row; }
};

// Double-buffered memory is [parity][source]: epochs that follow each other use different halves.
template <uint32_t kRanks>
__device__ __forceinline__ uint32_t source_in_half(uint32_t epoch, uint32_t source) {
    return parity_of(epoch) * kRanks + source;
}

// A slot in the receive buffer of a rank: kVectors for a row and what travels with it.
template <uint32_t kVectors, class Params>
__device__ __forceinline__ uint4* slot_at(const Params& p, uint32_t rank, const Slot& slot) {
    return peer_memory<uint4>(p, rank, p.rows_offset) + slot.number() * kVectors;
}

// What lies in a slot behind a row of kRowVectors.
template <class T, uint32_t kRowVectors>
__device__ __forceinline__ T* behind_row(uint4* slot) {
    return reinterpret_cast<T*>(slot + kRowVectors);
}
template <class T, uint32_t kRowVectors>
__device__ __forceinline__ const T* behind_row(const uint4* slot) {
    return reinterpret_cast<const T*>(slot + kRowVectors);
}

// A slot's tag at a rank: the sender releases it behind the row, the receiver acquires it ahead of the row.
template <class Tag, class Params>
__device__ __forceinline__ Tag* tag_at(const Params& p, uint32_t rank, Slot slot) {
    return peer_memory<Tag>(p, rank, p.tags_offset) + slot.number();
}

// ---- copies -------------------------------------------------------------------------------------

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
