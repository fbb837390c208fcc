// SPDX-License-Identifier: Apache-2.0
// Waiting for peers that may be missing: a rank that gives no sign of life in time is left out, and never waited for
// again. A rank that waits is alive, however late it is for its peers: it shows so by a beat that keeps moving.
#pragma once

#include <moegen/call_words.cuh>
#include <moegen/routing.cuh>

namespace moegen {

// Where ranks show that they are alive, and which ranks they have left out; in device memory, filled in by the host.
struct Liveness {
    Failure* failure;
    uint4* heard;            // [ranks]: {ns low, ns high, beat}: the last beat of each rank that was seen, and when
    uint32_t* const* beats;  // [ranks]: each rank's beat, in that rank's symmetric memory
    uint4* const* left_out;  // [ranks]: {ranks low, ranks high, epoch}: whom each rank has left out, and since when
};

// What opening an epoch gives: leave to send to these ranks, this one included.
struct SomeRanks {
    uint64_t ranks;

    __device__ __forceinline__ bool may_send() const { return ranks != 0; }
    __device__ __forceinline__ bool may_send_to(uint32_t rank) const { return (ranks >> rank & 1) != 0; }
    __device__ __forceinline__ uint64_t among(uint64_t others) const { return others & ranks; }

    template <uint32_t kRanks>
    __device__ __forceinline__ uint64_t missing() const {
        return kAllRanks<kRanks> & ~ranks;
    }
};

// What every wait of a launch needs to know. Waits run out of line, where each word of this takes a register: what only
// their slow path needs is read from the kernel's parameters, through a pointer that the constant cache does not serve.
template <class Params>
struct WatchOf {
    using Opened = SomeRanks;

    uint32_t* active;  // [ranks]: 0: this rank neither waits for that one nor sends to it
    const Params* p;
    uint64_t started_ns;
    uint32_t rank;
    uint32_t epoch;

    static __device__ __forceinline__ WatchOf start(const Params& p) {
        return WatchOf{p.active, &p, global_timer_ns(), p.rank, p.control->epoch};
    }

    // This rank is always active for itself.
    __device__ __forceinline__ bool is_active(uint32_t peer) const {
        return peer == rank || load_relaxed_sys(active + peer) != 0;
    }

    template <uint32_t kRanks, uint32_t kPhase>
    __device__ __forceinline__ Opened await_progress(const uint32_t* words, uint32_t needed) const;

    struct Patience;
};

// A beat moves every 2**17 ns (131 us), and is looked at as often: both touch memory that other ranks read.
constexpr uint32_t kBeatBits = 17;

// A rank is left out once it has been silent for this many timeouts. Every op waits equally long: a rank that one op
// still waits for must not be given up by the next.
constexpr uint64_t kSilentTimeouts = 2;

// No sign of life counts for longer than this after a launch: ranks that make different calls wait for each other.
constexpr uint64_t kPatientTimeouts = 8;

// Bit r: rank r is active. For a whole warp.
template <uint32_t num_ranks, class Watch>
__device__ __forceinline__ uint64_t ranks_that_are_active(const Watch& watch) {
    uint64_t active = 0;
#pragma unroll 1
    for (uint32_t first = 0; first < num_ranks; first += kWarpSize) {
        const uint32_t rank = first + lane_id();
        const bool here = rank < num_ranks && watch.is_active(rank);
        active |= uint64_t(__ballot_sync(kFullWarp, here)) << first;
    }
    return active;
}

// Publishes whom this rank has left out: a bit for each rank, valid from this epoch of the op on.
template <class Watch>
__device__ __forceinline__ void publish_left_out(const Watch& watch, uint64_t ranks) {
    store_whole_relaxed_sys(watch.p->liveness->left_out[watch.rank],
                            make_uint4(uint32_t(ranks), uint32_t(ranks >> 32), watch.epoch, 0));
}

// Leaves a rank out. Of two threads that do so at the same time, one may publish without the other's rank: the next
// launch publishes both.
template <class Watch>
__device__ __forceinline__ void leave_out(const Watch& watch, uint32_t peer) {
    store_relaxed_sys(watch.active + peer, 0);
    const uint4 seen = load_whole_relaxed_sys(watch.p->liveness->left_out[watch.rank]);
    const uint64_t before = seen.z == watch.epoch ? uint64_t(seen.y) << 32 | seen.x : 0;
    publish_left_out(watch, before | uint64_t(1) << peer);
}

// Adopts the verdict of a peer that this rank hears from: all survivors leave out the same ranks.
template <class Watch>
__device__ __noinline__ void adopt_left_out(Watch watch, uint64_t ranks) {
#pragma unroll 1
    for (uint64_t rest = ranks & ~(uint64_t(1) << watch.rank); rest != 0; drop_first(rest)) {
        const uint32_t peer = first_rank(rest);
        if (watch.is_active(peer)) leave_out(watch, peer);
    }
}

// Whether a peer has left this rank out: then nothing will come from it. What it published before this epoch may have
// been revoked since.
template <class Watch>
__device__ __forceinline__ bool is_left_out_by(const Watch& watch, uint32_t peer) {
    const uint4 seen = load_whole_relaxed_sys(watch.p->liveness->left_out[peer]);
    const uint64_t ranks = uint64_t(seen.y) << 32 | seen.x;
    return (ranks >> watch.rank & 1) != 0 && int32_t(seen.z - watch.epoch) >= 0;
}

// The first such peer is reported, once: this rank's own element of the mask says that it was.
template <class Watch>
__device__ __forceinline__ void report_if_left_out(const Watch& watch, uint32_t by) {
    if (!is_left_out_by(watch, by) || load_relaxed_sys(watch.active + watch.rank) == 0) return;
    store_relaxed_sys(watch.active + watch.rank, 0);
    store_relaxed_sys(&watch.p->liveness->failure->left_out_by, by + 1);
}

// Whether the peer's call word differs, where calls have one, as in signal.cuh. That is reported: the peer's data is
// left out, but the peer is not.
template <class Watch>
__device__ __forceinline__ bool makes_different_call(const Watch& watch, uint32_t peer) {
    if constexpr (requires { watch.p->calls_offset; }) {
        const uint64_t* word_here = call_at(*watch.p, watch.epoch, watch.rank, watch.rank);
        const uint64_t* word_there = call_at(*watch.p, watch.epoch, watch.rank, peer);
        const uint64_t here = load_relaxed_sys(word_here);
        const uint64_t there = load_relaxed_sys(word_there);
        if (!are_of_different_calls(here, there, watch.epoch)) return false;
        write_other_call(watch.p->failure, watch.rank, peer, here >> 32, there >> 32);
        return true;
    }
    return false;
}

// Whether a peer has been silent for too long: since this launch began, and since its beat was last seen to move.
// Several silent peers cost no more time than one.
template <class Watch>
__device__ __forceinline__ bool is_silent(const Watch& watch, uint32_t peer, uint64_t now_ns) {
    if (now_ns > watch.started_ns + kPatientTimeouts * watch.p->timeout_ns) return true;
    const uint32_t beat = load_relaxed_sys(watch.p->liveness->beats[peer]);
    const uint4 heard = load_whole_relaxed_sys(watch.p->liveness->heard + peer);
    if (heard.z != beat) {
        const uint4 now = make_uint4(uint32_t(now_ns), uint32_t(now_ns >> 32), beat, 0);
        store_whole_relaxed_sys(watch.p->liveness->heard + peer, now);
        return false;
    }
    const uint64_t heard_ns = uint64_t(heard.y) << 32 | heard.x;
    const uint64_t since_ns = heard_ns > watch.started_ns ? heard_ns : watch.started_ns;
    return now_ns > since_ns + kSilentTimeouts * watch.p->timeout_ns;
}

// Leaves out a peer that does not come, unless another wait has done so. Out of line: few waits end so.
template <class Watch>
__device__ __noinline__ void give_up(Watch watch, uint32_t peer) {
    if (!watch.is_active(peer)) return;
    report_if_left_out(watch, peer);
    leave_out(watch, peer);
}

// How long a wait polls: until its peer is not active (any more), or is left out here. Whenever the beat is due, this
// rank's moves, and the peer is looked at. What this rank sends itself is not timed: it arrives as soon as its own
// waits end.
template <class Params>
struct WatchOf<Params>::Patience {
    uint32_t polls = 0;
    uint32_t looked;  // the beat that was due when this looked last
    bool has_other_call = false;

    __device__ __forceinline__ explicit Patience(const WatchOf& watch) : looked(watch.started_ns >> kBeatBits) {}

    __device__ __forceinline__ bool is_due(const WatchOf& watch, Awaited what) const {
        return polls % kPollsPerLook == 0 && what.peer != watch.rank;
    }

    template <class Watch>
    __device__ __forceinline__ bool lasts(const Watch& watch, Awaited what, uint32_t, uint32_t) {
        bool gone = !watch.is_active(what.peer);
        const uint64_t now_ns = global_timer_ns();
        const uint32_t due = uint32_t(now_ns >> kBeatBits);
        if (!gone && due == looked) return true;
        looked = due;
        if (!gone) {
            store_relaxed_sys(watch.p->liveness->beats[watch.rank], due);
            has_other_call = makes_different_call(watch, what.peer);
            if (has_other_call) return false;
            gone = is_left_out_by(watch, what.peer) || is_silent(watch, what.peer, now_ns);
        }
        return !gone;
    }

    // True if it has come after all: what came while this thread was not running counts.
    template <class Watch, class Poll>
    __device__ __forceinline__ bool ends(const Watch& watch, Awaited what, uint32_t expected, Poll poll) const {
        if (has_other_call) return false;
        if (poll() == expected) return true;
        give_up(watch, what.peer);
        return false;
    }
};

// Bit r: rank r is active, and its progress word has come as far as `needed`. One that does not come in time is left
// out. One warp calls this. Out of line: so the other warps' instructions stay in a row.
template <uint32_t kRanks, uint32_t kPhase, class Watch>
__device__ __noinline__ uint64_t ranks_that_have_come(const uint32_t* words, uint32_t needed, uint64_t active,
                                                      Watch watch) {
    uint64_t ready = uint64_t(1) << watch.rank;
#pragma unroll 1
    for (uint32_t first = 0; first < kRanks; first += kWarpSize) {
        const uint32_t peer = first + lane_id();
        bool has_come = peer < kRanks && peer != watch.rank && (active >> peer & 1) != 0;
        if (has_come) has_come = wait_for_progress(watch, kPhase, peer, words + peer, needed);
        ready |= uint64_t(__ballot_sync(kFullWarp, has_come)) << first;
    }
    return ready;
}

// A launch first publishes whom this rank has left out.
template <class Params>
template <uint32_t kRanks, uint32_t kPhase>
__device__ __forceinline__ SomeRanks WatchOf<Params>::await_progress(const uint32_t* words, uint32_t needed) const {
    const uint64_t here = ranks_that_are_active<kRanks>(*this);
    if (here != kAllRanks<kRanks> && lane_id() == 0) publish_left_out(*this, kAllRanks<kRanks> & ~here);
    return SomeRanks{ranks_that_have_come<kRanks, kPhase>(words, needed, here, *this)};
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
