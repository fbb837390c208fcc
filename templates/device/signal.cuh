// SPDX-License-Identifier: Apache-2.0
// Waiting for peers that must come: deadlines, and what is reported when one does not.
#pragma once

#include <moegen/call_words.cuh>

namespace moegen {

// What opening an epoch gives: leave to send to every rank, or to none.
struct AllOrNone {
    bool all;

    __device__ __forceinline__ bool may_send() const { return all; }
    __device__ __forceinline__ bool may_send_to(uint32_t) const { return true; }  // if anything may be sent at all
    __device__ __forceinline__ uint64_t among(uint64_t ranks) const { return ranks; }

    template <uint32_t kRanks>
    __device__ __forceinline__ uint64_t missing() const {
        return 0;
    }
};

// What every wait of a launch needs to know.
struct PlainWatch {
    using Opened = AllOrNone;

    uint32_t* aborted;  // raised by the first wait that fails; every other wait of this object then gives up
    Failure* failure;
    uint64_t timeout_ns;
    uint32_t rank;
    uint32_t epoch;

    template <class Params>
    static __device__ __forceinline__ PlainWatch start(const Params& p) {
        return PlainWatch{p.aborted, p.failure, p.timeout_ns, p.rank, p.control->epoch};
    }

    __device__ __forceinline__ bool is_active(uint32_t) const { return true; }

    template <uint32_t kRanks, uint32_t kPhase>
    __device__ __forceinline__ Opened await_progress(const uint32_t* words, uint32_t needed) const;

    struct Patience;
};

// A peer makes a different call: nothing that it sends may be used.
template <class Params>
__device__ __forceinline__ void report_other_call(const Params& p, uint32_t peer, uint64_t here, uint64_t there) {
    write_other_call(p.failure, p.rank, peer, here, there);
    store_relaxed_sys(p.aborted, 1);
}

// Publishes the call word to all ranks. Out of line: inlined, dispatch of family ht spills.
template <uint32_t kRanks, uint32_t kThreads, class Params>
__device__ __noinline__ void publish_call_out_of_line(const Params& p, uint32_t epoch) {
    publish_call<kRanks, kThreads>(p, epoch, call_word(p), AllOrNone{true});
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

// How long a wait polls: until its deadline, or until another wait has given up. Phases that wait for more have a
// little more time, so that the report names the first cause.
struct PlainWatch::Patience {
    uint32_t polls = 1;
    uint64_t deadline_ns = 0;

    __device__ __forceinline__ explicit Patience(const PlainWatch&) {}

    __device__ __forceinline__ bool is_due(const PlainWatch&, Awaited) const { return polls % kPollsPerLook == 0; }

    template <class Word>
    __device__ __forceinline__ bool lasts(const PlainWatch& watch, Awaited what, Word expected, Word seen) {
        const uint64_t now = global_timer_ns();
        if (deadline_ns == 0) deadline_ns = now + watch.timeout_ns + what.phase * (watch.timeout_ns / 16);
        if (now > deadline_ns) report_expired(watch, what, uint32_t(expected), uint32_t(seen));
        return load_relaxed_sys(watch.aborted) == 0;
    }

    template <class Word, class Poll>
    __device__ __forceinline__ bool ends(const PlainWatch&, Awaited, Word, Poll) const {
        return false;
    }
};

// Whether every rank's progress word has come as far as `needed`: not if a peer did not come, now or in an earlier
// launch, for then what this one would read may not be there. One warp calls this. Out of line: so the other warps'
// instructions stay in a row.
template <uint32_t kRanks, uint32_t kPhase>
__device__ __noinline__ bool all_have_come(const uint32_t* words, uint32_t needed, PlainWatch watch) {
    const bool aborted = load_relaxed_sys(watch.aborted) != 0;
    bool ready = true;
#pragma unroll 1
    for (uint32_t peer = lane_id(); peer < kRanks; peer += kWarpSize) {
        ready &= wait_for_progress(watch, kPhase, peer, words + peer, needed);
    }
    return __all_sync(kFullWarp, ready && !aborted);
}

template <uint32_t kRanks, uint32_t kPhase>
__device__ __forceinline__ AllOrNone PlainWatch::await_progress(const uint32_t* words, uint32_t needed) const {
    return AllOrNone{all_have_come<kRanks, kPhase>(words, needed, *this)};
}

}  // namespace moegen
