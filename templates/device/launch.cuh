// SPDX-License-Identifier: Apache-2.0
// What all launches have in common: what they leave for each other and for the host, and how they wait.
#pragma once

#include <moegen/ptx.cuh>

namespace moegen {

// State of one (slot, op) of this rank, in its own device memory. No two launches that may overlap share one.
struct Control {
    uint32_t epoch;           // number of the running or next launch
    uint32_t blocks_entered;  // blocks of this launch that have read the epoch
};

// What the first expired wait tells the host, in pinned host memory. `valid` is written last.
struct Failure {
    uint32_t valid;
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
    uint32_t left_out_by;    // 1 + a rank that has left this one out; 0: none
};

// Epochs run from 2 to 2**32 - 1 and begin again: 0, which fresh memory holds, is never current, and even and odd ones
// take turns for ever, each with its own half of the receive buffers.
__device__ __forceinline__ uint32_t epoch_after(uint32_t epoch) { return epoch == 0xffffffffu ? 2 : epoch + 1; }
__device__ __forceinline__ uint32_t epoch_before(uint32_t epoch) { return epoch == 2 ? 0xffffffffu : epoch - 1; }

// What is waited for: the words of the report.
struct Awaited {
    uint32_t phase;
    uint32_t peer;
    int32_t index;
};

// An expired wait is looked for every 64th poll: the timer and the abort word cost a memory access each.
constexpr uint32_t kPollsPerCheck = 64;

// True once `poll()`, which holds no references, gives `expected`. Else the caller goes on as if nothing had arrived,
// so that every barrier is still reached. When to give up, `Watch` and keep_polling() say: signal.cuh or
// masked_signal.cuh.
template <class Watch, class Poll>
__device__ __forceinline__ bool wait_for(const Watch& watch, Awaited what, uint32_t expected, Poll poll) {
    return poll() == expected || keep_polling(poll, watch, what, expected);
}

// Waits for 16 bytes that carry the launch's epoch; nothing else in them is valid if they do not come.
template <class Watch>
__device__ __forceinline__ bool wait_for_whole(const Watch& watch, Awaited what, const uint4* from, uint4& whole) {
    whole = load_whole_relaxed_sys(from);
    if (whole.w == watch.epoch) return true;
    if (!keep_polling([=] { return load_whole_relaxed_sys(from).w; }, watch, what, watch.epoch)) return false;
    whole = load_whole_relaxed_sys(from);
    return true;
}

// Called by one thread of each block once all of the block have read the epoch: the last block moves on to the next.
__device__ __forceinline__ void leave_epoch_to_the_next_launch(Control* control, uint32_t epoch) {
    if (atomic_add_acq_rel_gpu(&control->blocks_entered, 1) != gridDim.x - 1) return;
    control->blocks_entered = 0;
    control->epoch = epoch_after(epoch);
}

}  // namespace moegen
