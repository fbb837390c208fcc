// SPDX-License-Identifier: Apache-2.0
// What launches leave for each other and for the host: epochs, and the report of what went wrong.
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

// What is waited for: the words of the report.
struct Awaited {
    uint32_t phase;
    uint32_t peer;
    int32_t index;
};

// An expired wait is looked for every 64th poll: the timer and the abort word cost a memory access each.
constexpr uint32_t kPollsPerCheck = 64;

// Called by one thread of each block once all of the block have read the epoch: the last block moves on to the next.
__device__ __forceinline__ void leave_epoch_to_the_next_launch(Control* control, uint32_t epoch) {
    if (atomic_add_acq_rel_gpu(&control->blocks_entered, 1) != gridDim.x - 1) return;
    control->blocks_entered = 0;
    control->epoch = epoch_after(epoch);
}

}  // namespace moegen
