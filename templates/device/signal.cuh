// SPDX-License-Identifier: Apache-2.0
// Waiting for peers: epochs, deadlines, and what is reported when a peer does not come.
#pragma once

#include <moegen/ptx.cuh>

namespace moegen {

// State of one (slot, op) of this rank, in its own device memory. No two launches that may overlap share one.
struct Control {
    uint32_t epoch;        // number of the running or next launch; 0 is never used, so zeroed memory is never current
    uint32_t blocks_done;  // blocks of this launch that have finished
    uint32_t aborted;      // raised by the first wait that runs out of time; every other wait then gives up
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

__device__ __forceinline__ uint32_t epoch_after(uint32_t epoch) { return epoch + 1 == 0 ? 1 : epoch + 1; }
__device__ __forceinline__ uint32_t epoch_before(uint32_t epoch) { return epoch == 1 ? 0xffffffffu : epoch - 1; }

// One thread's view of the launch while it waits.
struct Watch {
    Control* control;
    Failure* failure;
    uint64_t deadline_ns;
    uint32_t rank;
    uint32_t epoch;
    bool gave_up = false;
};

// An expired wait is looked for every 64th poll: the timer and the abort word cost a memory access each.
constexpr uint32_t kPollsPerCheck = 64;

// Only the first expired wait of a launch reports.
__device__ __noinline__ void report_expired(const Watch& watch, uint32_t phase, uint32_t peer, int32_t index,
                                            uint32_t expected, uint32_t seen) {
    if (atomic_cas_acq_rel_gpu(&watch.control->aborted, 0, 1) != 0) return;
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

// Polls until `poll()` returns `expected`. False if the deadline passed or another wait of this launch gave up:
// the caller then goes on as if nothing had arrived, so that every barrier is still reached.
template <class Poll>
__device__ __forceinline__ bool wait_for(Watch& watch, uint32_t phase, uint32_t peer, int32_t index,
                                         uint32_t expected, Poll poll) {
    uint32_t seen = poll();
    for (uint32_t polls = 1; seen != expected; ++polls) {
        if (watch.gave_up) return false;
        if (polls % kPollsPerCheck == 0) {
            const bool expired = global_timer_ns() > watch.deadline_ns;
            if (expired) report_expired(watch, phase, peer, index, expected, seen);
            if (expired || load_relaxed_sys(&watch.control->aborted) != 0) {
                watch.gave_up = true;
                return false;
            }
        }
        poll_pause();
        seen = poll();
    }
    return true;
}

// True in the last block of the launch to get here, for all of its threads: everything that the other blocks did
// before has then happened.
__device__ __forceinline__ bool is_last_block(Control* control) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) last = atomic_add_acq_rel_gpu(&control->blocks_done, 1) == gridDim.x - 1;
    __syncthreads();
    return last;
}

}  // namespace moegen
