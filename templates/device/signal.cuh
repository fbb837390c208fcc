// SPDX-License-Identifier: Apache-2.0
// Waiting for peers: epochs, deadlines, and what is reported when a peer does not come.
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
};

// Epochs run from 2 to 2**32 - 1 and begin again: 0, which fresh memory holds, is never current, and even and odd ones
// take turns for ever, each with its own half of the receive buffers.
__device__ __forceinline__ uint32_t epoch_after(uint32_t epoch) { return epoch == 0xffffffffu ? 2 : epoch + 1; }
__device__ __forceinline__ uint32_t epoch_before(uint32_t epoch) { return epoch == 2 ? 0xffffffffu : epoch - 1; }

// One thread's view of the launch while it waits.
struct Watch {
    uint32_t* aborted;  // raised by the first wait that runs out of time; every other wait of this object then gives up
    Failure* failure;
    uint64_t timeout_ns;
    uint32_t rank;
    uint32_t epoch;
    uint64_t deadline_ns = 0;  // set when a wait first looks at the clock
    bool gave_up = false;
};

// An expired wait is looked for every 64th poll: the timer and the abort word cost a memory access each.
constexpr uint32_t kPollsPerCheck = 64;

// Only the first expired wait of an object reports.
__device__ __forceinline__ void report_expired(const Watch& watch, uint32_t phase, uint32_t peer, int32_t index,
                                               uint32_t expected, uint32_t seen) {
    if (atomic_cas_acq_rel_gpu(watch.aborted, 0, 1) != 0) return;
    Failure* failure = watch.failure;
    failure->phase = phase;
    failure->rank = watch.rank;
    failure->peer = peer;
    failure->index = index;
    failure->epoch = watch.epoch;
    failure->expected = expected;
    failure->seen = seen;
    store_release_sys(&failure->valid, 1);
}

// True if the launch is over for this thread: its deadline passed, or another wait gave up. Kept out of
// line, as is the report: there are many waits, and this is never run when all goes well and fast.
__device__ __noinline__ bool gives_up(Watch& watch, uint32_t phase, uint32_t peer, int32_t index, uint32_t expected,
                                      uint32_t seen) {
    const uint64_t now = global_timer_ns();
    if (watch.deadline_ns == 0) watch.deadline_ns = now + watch.timeout_ns;
    const bool expired = now > watch.deadline_ns;
    if (expired) report_expired(watch, phase, peer, index, expected, seen);
    watch.gave_up = expired || load_relaxed_sys(watch.aborted) != 0;
    return watch.gave_up;
}

// Polls until `poll()` returns `expected`. False if that did not happen in time: the caller then goes on as if nothing
// had arrived, so that every barrier is still reached.
template <class Poll>
__device__ __forceinline__ bool wait_for(Watch& watch, uint32_t phase, uint32_t peer, int32_t index, uint32_t expected,
                                         Poll poll) {
    uint32_t seen = poll();
    for (uint32_t polls = 1; seen != expected; ++polls) {
        if (watch.gave_up) return false;
        if (polls % kPollsPerCheck == 0 && gives_up(watch, phase, peer, index, expected, seen)) return false;
        poll_pause();
        seen = poll();
    }
    return true;
}

// Called by one thread of each block once all of the block have read the epoch: the last block moves on to the next.
__device__ __forceinline__ void leave_epoch_to_the_next_launch(Control* control, uint32_t epoch) {
    if (atomic_add_acq_rel_gpu(&control->blocks_entered, 1) != gridDim.x - 1) return;
    control->blocks_entered = 0;
    control->epoch = epoch_after(epoch);
}

}  // namespace moegen
