// SPDX-License-Identifier: Apache-2.0
// Epochs: a number for each launch of an op, which everything that announces data carries.
#pragma once

#include <moegen/launch.cuh>

namespace moegen {

// State of one (slot, op) of this rank, in its own device memory. No two launches that may overlap share one.
struct Control {
    uint32_t epoch;        // number of the running or next launch
    uint32_t blocks_left;  // blocks of this launch that have left the epoch
};

// Epochs run from 2 to 2**32 - 1 and begin again: 0, which fresh memory holds, is never current, and even and odd ones
// take turns for ever.
__device__ __forceinline__ uint32_t epoch_after(uint32_t epoch) { return epoch == 0xffffffffu ? 2 : epoch + 1; }
__device__ __forceinline__ uint32_t epoch_before(uint32_t epoch) { return epoch == 2 ? 0xffffffffu : epoch - 1; }

// Double buffering: which of two receive buffers an epoch uses.
__device__ __forceinline__ uint32_t parity_of(uint32_t epoch) { return epoch & 1; }

// ---- leaving an epoch -----------------------------------------------------------------------------

// One thread of each block calls this; true for the last of them, who sees what all the others did before.
__device__ __forceinline__ bool is_last_to_leave(Control* control) {
    return atomic_add_acq_rel_gpu(&control->blocks_left, 1) == gridDim.x - 1;
}

// The next launch is that of the next epoch.
__device__ __forceinline__ void advance_epoch(Control* control, uint32_t epoch) {
    control->blocks_left = 0;
    control->epoch = epoch_after(epoch);
}

// Leaves the epoch to the next launch: all threads of a block call this once they have read it, and `thread` leaves for
// them.
__device__ __forceinline__ void leave_epoch(Control* control, uint32_t epoch, uint32_t thread) {
    __syncthreads();  // all of the block have read the epoch
    if (threadIdx.x == thread && is_last_to_leave(control)) advance_epoch(control, epoch);
}

// The same; the barrier also tells whether all threads of the block have found things sound.
__device__ __forceinline__ bool vote_and_leave_epoch(Control* control, uint32_t epoch, uint32_t thread, bool sound) {
    const bool all_sound = __syncthreads_and(sound) != 0;
    if (threadIdx.x == thread && is_last_to_leave(control)) advance_epoch(control, epoch);
    return all_sound;
}

// All threads of a block call this when they have read all that they read: true in the last block of the launch.
__device__ __forceinline__ bool is_last_block_to_leave(Control* control) {
    __shared__ bool last;
    __syncthreads();  // all of the block have read
    if (threadIdx.x == 0) last = is_last_to_leave(control);
    __syncthreads();
    return last;
}

// ---- progress words -------------------------------------------------------------------------------

// Progress word of `from` at `rank`: the last epoch that `from` has consumed.
template <class Params>
__device__ __forceinline__ uint32_t* consumed_at(const Params& p, uint32_t rank, uint32_t from) {
    return reinterpret_cast<uint32_t*>(p.peers[rank] + p.consumed_offset) + from;
}

// What a launch does with progress words, where all threads of a block or its last warp do it. kPhase is what a wait
// for them is reported as.
template <uint32_t kRanks, uint32_t kThreads, uint32_t kPhase>
struct EpochOf {
    // Publishes to every peer that this rank has consumed `epoch`, and all those before. One block calls this.
    template <class Params, class Watch>
    static __device__ __forceinline__ void publish_consumed(const Params& p, const Watch& watch, uint32_t epoch) {
#pragma unroll 1
        for (uint32_t peer = threadIdx.x; peer < kRanks; peer += kThreads) {
            if (watch.is_active(peer)) store_release_sys(consumed_at(p, peer, p.rank), epoch);
        }
    }

    // Single-buffer back-pressure: before writing a peer's receive buffer, wait until the peer has published consumed
    // >= epoch - 1. All threads of a block call this; true if it may go on: not if a peer did not come, now or in an
    // earlier launch.
    template <class Params, class Watch>
    static __device__ __forceinline__ bool open_single_buffer(const Params& p, const Watch& watch) {
        const uint32_t needed = epoch_before(watch.epoch);
        bool ready = load_relaxed_sys(p.aborted) == 0;
#pragma unroll 1
        for (uint32_t peer = threadIdx.x; peer < kRanks; peer += kThreads) {
            ready &= wait_for_progress(watch, kPhase, peer, consumed_at(p, p.rank, peer), needed);
        }
        return __syncthreads_and(ready) != 0;
    }

    // Every block ends with this. The last of them has seen all rows read: it publishes that, and leaves the epoch.
    template <class Params, class Watch>
    static __device__ __forceinline__ void close_single_buffer(const Params& p, const Watch& watch) {
        if (!is_last_block_to_leave(p.control)) return;
        publish_consumed(p, watch, watch.epoch);
        if (threadIdx.x == 0) advance_epoch(p.control, watch.epoch);
    }

    // Double-buffer back-pressure: before writing parity `epoch & 1` of a peer's receive buffer, wait until the peer
    // has published consumed >= epoch - 2, which it does in epoch - 1. The last warp waits, while the others ask for
    // what they need; behind the caller's next barrier `opened` tells whom this block may send to.
    template <class Params, class Watch>
    static __device__ __forceinline__ void open_double_buffer(const Params& p, const Watch& watch,
                                                              typename Watch::Opened& opened) {
        if (warp_id() != kThreads / kWarpSize - 1) return;
        const uint32_t needed = epoch_before(epoch_before(watch.epoch));
        const auto ready = watch.template await_progress<kRanks, kPhase>(consumed_at(p, p.rank, 0), needed);
        if (lane_id() == 0) opened = ready;
    }
};

}  // namespace moegen
