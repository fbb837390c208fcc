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

// A peer makes a different call: nothing that it sends may be used.
template <class Params>
__device__ __forceinline__ void report_other_call(const Params& p, uint32_t peer, uint64_t here, uint64_t there) {
    write_other_call(p.failure, p.rank, peer, here, there);
    store_relaxed_sys(p.aborted, 1);
}

// Only the first expired wait of an object reports. If the peer's call word differs, the host sees that.
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
    store_release_sys(&failure->valid, 1);
}

// Polls until `poll()` gives `expected`; false if that did not happen in time, or another wait gave up. Phases that
// wait for more have a little more time, so that the report names the first cause. Out of line: there are many waits,
// and what most of them wait for is there already. Instructions are fetched once per launch, and every jump to another
// line of them takes its time.
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
            if (now > deadline_ns) report_expired(watch, what, uint32_t(expected), uint32_t(seen));
            if (load_relaxed_sys(watch.aborted) != 0) return false;
        }
        poll_pause();
    }
}

}  // namespace moegen
