// SPDX-License-Identifier: Apache-2.0
// Waiting for peers that must come: deadlines, and what is reported when one does not.
#pragma once

#include <moegen/launch.cuh>

namespace moegen {

// What every wait of a launch needs to know.
struct PlainWatch {
    uint32_t* aborted;  // raised by the first wait that fails; every other wait of this object then gives up
    Failure* failure;
    uint64_t timeout_ns;
    uint32_t rank;
    uint32_t epoch;
};

// Of ops whose call word may differ: every rank publishes its own to every rank when it begins, and the slow path of
// each wait compares the peer's.
struct CallWatch : PlainWatch {
    const uint64_t* calls;  // [ranks]: a rank's call word, and the epoch that it is of
    uint32_t call;          // this rank's
};

__device__ __forceinline__ uint32_t call_of(const CallWatch& watch) { return watch.call; }

// Only the first failed wait of an object reports.
__device__ __noinline__ void report_expired(PlainWatch watch, Awaited what, uint32_t expected, uint32_t seen) {
    if (atomic_cas_acq_rel_gpu(watch.aborted, 0, 1) != 0) return;
    Failure* failure = watch.failure;
    failure->phase = what.phase;
    failure->rank = watch.rank;
    failure->peer = what.peer;
    failure->index = what.index;
    failure->epoch = watch.epoch;
    failure->expected = expected;
    failure->seen = seen;
    store_release_sys(&failure->valid, kExpired);
}

// The peer makes a different call: nothing that it sends may be used.
__device__ __noinline__ void report_other_call(PlainWatch watch, Awaited what, uint64_t here, uint64_t there) {
    if (atomic_cas_acq_rel_gpu(watch.aborted, 0, 1) != 0) return;
    write_other_call(watch.failure, watch.rank, what, watch.epoch, here, there);
}

__device__ __forceinline__ void compare_calls(const PlainWatch&, Awaited) {}

__device__ __forceinline__ void compare_calls(const CallWatch& watch, Awaited what) {
    const uint64_t said = load_relaxed_sys(watch.calls + what.peer);
    if (uint32_t(said) != watch.epoch || uint32_t(said >> 32) == watch.call) return;
    report_other_call(watch, what, watch.call, said >> 32);
}

// Polls until `poll()` gives `expected`; false if that timed out, the peer makes a different call, or another
// wait failed. Phases that wait for more have a little more time, so that the report names the first cause. Out of
// line: there are many waits, and what most of them wait for is there already. Instructions are fetched once per
// launch, and every jump to another line of them takes its time.
template <class Watch, class Word, class Poll>
__device__ __noinline__ bool keep_polling(Poll poll, Watch watch, Awaited what, Word expected) {
    uint64_t deadline_ns = 0;
#pragma unroll 1
    for (uint32_t polls = 1;; ++polls) {
        const Word seen = poll();
        if (seen == expected) return true;
        if (polls % kPollsPerCheck == 0) {
            const uint64_t now = global_timer_ns();
            if (deadline_ns == 0) deadline_ns = now + watch.timeout_ns + what.phase * (watch.timeout_ns / 16);
            compare_calls(watch, what);
            if (now > deadline_ns) report_expired(watch, what, uint32_t(expected), uint32_t(seen));
            if (load_relaxed_sys(watch.aborted) != 0) return false;
        }
        poll_pause();
    }
}

}  // namespace moegen
