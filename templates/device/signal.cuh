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

// What every wait of a launch needs to know.
struct Watch {
    uint32_t* aborted;  // raised by the first wait that runs out of time; every other wait of this object then gives up
    Failure* failure;
    uint64_t timeout_ns;
    uint32_t rank;
    uint32_t epoch;
};

// What is waited for: the words of the report.
struct Awaited {
    uint32_t phase;
    uint32_t peer;
    int32_t index;
};

// An expired wait is looked for every 64th poll: the timer and the abort word cost a memory access each.
constexpr uint32_t kPollsPerCheck = 64;

// Only the first expired wait of an object reports.
__device__ __noinline__ void report_expired(Watch watch, Awaited what, uint32_t expected, uint32_t seen) {
    if (atomic_cas_acq_rel_gpu(watch.aborted, 0, 1) != 0) return;
    Failure* failure = watch.failure;
    failure->phase = what.phase;
    failure->rank = watch.rank;
    failure->peer = what.peer;
    failure->index = what.index;
    failure->epoch = watch.epoch;
    failure->expected = expected;
    failure->seen = seen;
    store_release_sys(&failure->valid, 1);
}

// Polls until `poll()` gives `expected`. Phases that wait for more have a little more time, so that the report names
// the first cause. Out of line: there are many waits, and what most of them wait for is there already. Instructions are
// fetched once per launch, and every jump to another line of them takes its time.
template <class Poll>
__device__ __noinline__ bool keep_polling(Poll poll, Watch watch, Awaited what, uint32_t expected) {
    uint64_t deadline_ns = 0;
#pragma unroll 1
    for (uint32_t polls = 1;; ++polls) {
        const uint32_t seen = poll();
        if (seen == expected) return true;
        if (polls % kPollsPerCheck == 0) {
            const uint64_t now = global_timer_ns();
            if (deadline_ns == 0) deadline_ns = now + watch.timeout_ns + what.phase * (watch.timeout_ns / 16);
            if (now > deadline_ns) report_expired(watch, what, expected, seen);
            if (load_relaxed_sys(watch.aborted) != 0) return false;
        }
        poll_pause();
    }
}

// True once `poll()`, which holds no references, gives `expected`. False if that did not happen in time, or another
// wait gave up: the caller then goes on as if nothing had arrived, so that every barrier is still reached.
template <class Poll>
__device__ __forceinline__ bool wait_for(const Watch& watch, Awaited what, uint32_t expected, Poll poll) {
    return poll() == expected || keep_polling(poll, watch, what, expected);
}

// Waits for 16 bytes that carry the launch's epoch; nothing else in them is valid if they do not come.
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
