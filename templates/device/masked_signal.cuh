// SPDX-License-Identifier: Apache-2.0
// Waiting for peers that may be missing: a rank that does not come in time is marked, and nobody waits for it again.
#pragma once

#include <moegen/launch.cuh>

namespace moegen {

// What every wait of a launch needs to know.
struct PlainWatch {
    uint32_t* active;  // [ranks]: 0: this rank neither waits for that one nor sends to it
    uint64_t started_ns;
    uint64_t timeout_ns;
    uint32_t rank;
    uint32_t epoch;
};

// The same where the peer's call word may differ, as in signal.cuh.
struct CallWatch : PlainWatch {
    Failure* failure;
    const uint64_t* calls;  // [parity][rank]: call words and their epochs, as published to this rank
};

// Whether the peer's call word differs, which is reported: its data is left out, but it is not marked as missing.
__device__ __forceinline__ bool makes_different_call(const PlainWatch&, Awaited) { return false; }

__device__ __forceinline__ bool makes_different_call(const CallWatch& watch, Awaited what) {
    const uint64_t here = load_relaxed_sys(watch.calls + place_of_call(watch.epoch, watch.rank));
    const uint64_t there = load_relaxed_sys(watch.calls + place_of_call(watch.epoch, what.peer));
    if (!are_of_different_calls(here, there, watch.epoch)) return false;
    write_other_call(watch.failure, watch.rank, what.peer, here >> 32, there >> 32);
    return true;
}

// This rank is always active for itself.
__device__ __forceinline__ bool is_active(const PlainWatch& watch, uint32_t peer) {
    return peer == watch.rank || load_relaxed_sys(watch.active + peer) != 0;
}

// Deadlines count from the launch, so that several missing ranks cost no more than one. What depends on more has a
// quarter of the timeout more: a rank that was itself held up by a missing one is not marked for that.
__device__ __forceinline__ uint64_t deadline_ns(const PlainWatch& watch, uint32_t phase) {
    return watch.started_ns + watch.timeout_ns + phase * (watch.timeout_ns / 4);
}

// Polls until `poll()` gives `expected`; false if its peer is not active (any more), or is marked here. The clock is
// read before the poll: what came while this thread was not running is seen. What this rank sends itself is not timed:
// it comes as soon as its own waits end.
template <class Watch, class Poll>
__device__ __noinline__ bool keep_polling(Poll poll, Watch watch, Awaited what, uint32_t expected) {
#pragma unroll 1
    for (uint32_t polls = 0;; ++polls) {
        const bool checks = polls % kPollsPerCheck == 0 && what.peer != watch.rank;
        const bool expired = checks && global_timer_ns() > deadline_ns(watch, what.phase);
        if (poll() == expected) return true;
        if (checks && (!is_active(watch, what.peer) || makes_different_call(watch, what))) return false;
        if (expired) {
            store_relaxed_sys(watch.active + what.peer, 0);
            return false;
        }
        poll_pause();
    }
}

// Whether the blocks of this launch say that something has come: as the first of them saw it, which this call may be.
// Beside the verdict stands the epoch, without its first bit, which tells it from the one of the launch before.
__device__ __forceinline__ bool agreed(uint32_t* verdict, uint32_t epoch, bool came) {
    const uint32_t mine = epoch << 1 | (came ? 1 : 0);
    uint32_t seen = load_acquire_sys(verdict);
    if (seen >> 1 != mine >> 1) {
        const uint32_t before = atomic_cas_acq_rel_gpu(verdict, seen, mine);
        seen = before == seen ? mine : before;
    }
    return (seen & 1) != 0;
}

}  // namespace moegen
