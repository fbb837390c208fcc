// SPDX-License-Identifier: Apache-2.0
// What all launches have in common: what they leave for each other and for the host, and how they wait.
#pragma once

#include <moegen/ptx.cuh>

namespace moegen {

// What is waited for: the words of the report.
struct Awaited {
    uint32_t phase;
    uint32_t peer;
    int32_t index;
};

// State of one (slot, op) of this rank, in its own device memory. No two launches that may overlap share one.
struct Control {
    uint32_t epoch;           // number of the running or next launch
    uint32_t blocks_entered;  // blocks of this launch that have read the epoch
};

// Report of the first wait that fails, in pinned host memory. `valid` is written last.
struct Failure {
    uint32_t valid;  // 1: a wait has expired
    uint32_t phase;
    uint32_t rank;
    uint32_t peer;
    int32_t index;
    uint32_t epoch;
    uint32_t expected;
    uint32_t seen;
    uint32_t invalid_token;  // 1 + a token that selected an expert that does not exist; 0: none did
    uint32_t mismatched;     // 1 + a rank whose rows belong to another call than this rank's; 0: none
    uint32_t rows_needed;    // more rows came than there was room for: room for at least so many; 0: all had room
    uint32_t call_here[2];   // this rank's call word: its low half first
    uint32_t call_there[2];  // that of the next
    uint32_t other_caller;   // 1 + a rank that makes a different call; 0: none. Written behind the call words
    uint32_t left_out_by;    // 1 + a rank that has left this one out; 0: none
};

// A call word packs the arguments of a call that must be equal on all ranks (moegen.kernels.call_words has the fields).
// Kernels compare it as a whole. In a 64-bit word it stands above the epoch.
__device__ __forceinline__ uint64_t with_call(uint32_t call, uint32_t epoch) { return uint64_t(call) << 32 | epoch; }

// Published call words lie as [parity][rank] in every rank's symmetric memory, with room for all ranks that may be.
constexpr uint32_t kMostRanks = 64;
__device__ __forceinline__ uint32_t place_of_call(uint32_t epoch, uint32_t rank) {
    return (epoch & 1) * kMostRanks + rank;
}

// Whether two published words are of this launch and of different calls.
__device__ __forceinline__ bool are_of_different_calls(uint64_t here, uint64_t there, uint32_t epoch) {
    return uint32_t(here) == epoch && uint32_t(there) == epoch && here != there;
}

// Reports that a peer's call word differs. Several threads may write such reports at once: one of them stays.
__device__ __forceinline__ void write_other_call(Failure* failure, uint32_t rank, uint32_t peer, uint64_t here,
                                                 uint64_t there) {
    store_relaxed_sys(&failure->rank, rank);
    store_relaxed_sys(&failure->call_here[0], uint32_t(here));
    store_relaxed_sys(&failure->call_here[1], uint32_t(here >> 32));
    store_relaxed_sys(&failure->call_there[0], uint32_t(there));
    store_relaxed_sys(&failure->call_there[1], uint32_t(there >> 32));
    store_release_sys(&failure->other_caller, peer + 1);
}

// Epochs run from 2 to 2**32 - 1 and begin again: 0, which fresh memory holds, is never current, and even and odd ones
// take turns for ever, each with its own half of the receive buffers.
__device__ __forceinline__ uint32_t epoch_after(uint32_t epoch) { return epoch == 0xffffffffu ? 2 : epoch + 1; }
__device__ __forceinline__ uint32_t epoch_before(uint32_t epoch) { return epoch == 2 ? 0xffffffffu : epoch - 1; }

// An expired wait is looked for every 64th poll: the timer and the abort word cost a memory access each.
constexpr uint32_t kPollsPerCheck = 64;

// True once `poll()`, which holds no references, gives `expected`. Else the caller goes on as if nothing had arrived,
// so that every barrier is still reached. When to give up, `Watch` and keep_polling() say: signal.cuh or
// masked_signal.cuh.
template <class Watch, class Word, class Poll>
__device__ __forceinline__ bool wait_for(const Watch& watch, Awaited what, Word expected, Poll poll) {
    return poll() == expected || keep_polling(poll, watch, what, expected);
}

// Waits for 16 bytes that carry `mark`; nothing else in them is valid if they do not come.
template <class Watch>
__device__ __forceinline__ bool wait_for_whole(const Watch& watch, Awaited what, const uint4* from, uint4& whole,
                                               uint32_t mark) {
    whole = load_whole_relaxed_sys(from);
    if (whole.w == mark) return true;
    if (!keep_polling([=] { return load_whole_relaxed_sys(from).w; }, watch, what, mark)) return false;
    whole = load_whole_relaxed_sys(from);
    return true;
}

// Most carry the launch's epoch.
template <class Watch>
__device__ __forceinline__ bool wait_for_whole(const Watch& watch, Awaited what, const uint4* from, uint4& whole) {
    return wait_for_whole(watch, what, from, whole, watch.epoch);
}

// Called by one thread of each block once all of the block have read the epoch: the last block moves on to the next.
__device__ __forceinline__ void leave_epoch_to_the_next_launch(Control* control, uint32_t epoch) {
    if (atomic_add_acq_rel_gpu(&control->blocks_entered, 1) != gridDim.x - 1) return;
    control->blocks_entered = 0;
    control->epoch = epoch_after(epoch);
}

}  // namespace moegen
