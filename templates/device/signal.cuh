// SPDX-License-Identifier: Apache-2.0
// Waiting for peers that must come: deadlines, and what is reported when one does not.
#pragma once

#include <moegen/launch.cuh>

namespace moegen {

// What every wait of a launch needs to know.
struct Watch {
    uint32_t* aborted;  // raised by the first wait that runs out of time; every other wait of this object then gives up
    Failure* failure;
    uint64_t timeout_ns;
    uint32_t rank;
    uint32_t epoch;
};

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

// Polls until `poll()` gives `expected`; false if that did not happen in time, or another wait gave up. Phases that
// wait for more have a little more time, so that the report names the first cause. Out of line: there are many waits,
// and what most of them wait for is there already. Instructions are fetched once per launch, and every jump to another
// line of them takes its time.
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

}  // namespace moegen
