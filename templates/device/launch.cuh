// SPDX-License-Identifier: Apache-2.0
// What all launches have in common: what they tell the host, and how they wait.
#pragma once

#include <moegen/ptx.cuh>

namespace moegen {

// What is waited for: the words of the report.
struct Awaited {
    uint32_t phase;
    uint32_t peer;
    int32_t index;
};

// Report of the first wait that fails, in pinned host memory. `valid` is written last.
struct Failure {
    uint32_t valid;  // 1: a wait has expired
    uint32_t phase;
    uint32_t rank;
    uint32_t peer;
    int32_t index;
    uint32_t epoch;
    uint32_t expected;
    uint32_t seen;
    uint32_t invalid_token;  // 1 + a token that selected an expert that does not exist; 0: none did
    uint32_t mismatched;     // 1 + a rank whose rows belong to another call than this rank's; 0: none
    uint32_t rows_needed;    // more rows came than there was room for: room for at least so many; 0: all had room
    uint32_t call_here[2];   // this rank's call word: its low half first
    uint32_t call_there[2];  // that of the next
    uint32_t other_caller;   // 1 + a rank that makes a different call; 0: none. Written behind the call words
    uint32_t left_out_by;    // 1 + a rank that has left this one out; 0: none
};

// A wait looks whether to give up every 64th poll: the timer and the abort word cost a memory access each.
constexpr uint32_t kPollsPerLook = 64;

// Polls until `poll()` gives `expected`, or the watch's patience ends: see signal.cuh and masked_signal.cuh. Out of
// line: there are many waits, and what most of them wait for is there already. Instructions are fetched once per
// launch, and every jump to another line of them takes its time.
template <class Watch, class Word, class Poll>
__device__ __noinline__ bool keep_polling(Poll poll, Watch watch, Awaited what, Word expected) {
    typename Watch::Patience patience(watch);
#pragma unroll 1
    for (;; ++patience.polls) {
        const Word seen = poll();
        if (seen == expected) return true;
        poll_pause();
        if (!patience.is_due(watch, what) || patience.lasts(watch, what, expected, seen)) continue;
        return patience.ends(watch, what, expected, poll);
    }
}

// True once `poll()`, which holds no references, gives `expected`. Else the caller goes on as if nothing had arrived,
// so that every barrier is still reached.
template <class Watch, class Word, class Poll>
__device__ __forceinline__ bool wait_for(const Watch& watch, Awaited what, Word expected, Poll poll) {
    return poll() == expected || keep_polling(poll, watch, what, expected);
}

// A progress word as waits compare it: `needed` once its rank has come that far. One that waits for nothing of this
// rank may be ahead.
template <class Word>
__device__ __forceinline__ uint32_t progress_at(const Word* word, uint32_t needed) {
    const uint32_t seen = uint32_t(load_acquire_sys(word));
    return int32_t(seen - needed) >= 0 ? needed : seen;
}

template <class Watch, class Word>
__device__ __forceinline__ bool wait_for_progress(const Watch& watch, uint32_t phase, uint32_t peer, const Word* word,
                                                  uint32_t needed) {
    return wait_for(watch, Awaited{phase, peer, -1}, needed, [=] { return progress_at(word, needed); });
}

}  // namespace moegen
