// SPDX-License-Identifier: Apache-2.0
// Waiting for peers that may be missing: a rank that gives no sign of life in time is left out, and never waited for
// again. A rank that waits is alive, however late it is for its peers: it shows so by a beat that keeps moving.
#pragma once

#include <moegen/launch.cuh>

namespace moegen {

// Where ranks show that they are alive, and which ranks they have left out; in device memory, filled in by the host.
struct Liveness {
    Failure* failure;
    uint4* heard;            // [ranks]: {ns low, ns high, beat}: the last beat of each rank that was seen, and when
    uint32_t* const* beats;  // [ranks]: each rank's beat, in that rank's symmetric memory
    uint4* const* left_out;  // [ranks]: {ranks low, ranks high, epoch}: whom each rank has left out, and since when
};

// What every wait of a launch needs to know. Waits run out of line, where each word of this takes a register: what only
// their slow path needs is read from the kernel's parameters, through a pointer that the constant cache does not serve.
template <class Params>
struct WatchOf {
    uint32_t* active;  // [ranks]: 0: this rank neither waits for that one nor sends to it
    const Params* p;
    uint64_t started_ns;
    uint32_t rank;
    uint32_t epoch;
};

// A beat moves every 2**17 ns (131 us), and is looked at as often: both touch memory that other ranks read.
constexpr uint32_t kBeatBits = 17;

// A rank is left out once it has been silent for this many timeouts. Every op waits equally long: a rank that one op
// still waits for must not be given up by the next.
constexpr uint64_t kSilentTimeouts = 2;

// No sign of life counts for longer than this after a launch: ranks that make different calls wait for each other.
constexpr uint64_t kPatientTimeouts = 8;

// This rank is always active for itself.
template <class Watch>
__device__ __forceinline__ bool is_active(const Watch& watch, uint32_t peer) {
    return peer == watch.rank || load_relaxed_sys(watch.active + peer) != 0;
}

// Bit r: rank r is active. For a whole warp.
template <uint32_t num_ranks, class Watch>
__device__ __forceinline__ uint64_t ranks_that_are_active(const Watch& watch) {
    uint64_t active = 0;
#pragma unroll 1
    for (uint32_t first = 0; first < num_ranks; first += kWarpSize) {
        const uint32_t rank = first + lane_id();
        const bool here = rank < num_ranks && is_active(watch, rank);
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
    for (uint64_t rest = ranks & ~(uint64_t(1) << watch.rank); rest != 0; rest &= rest - 1) {
        const uint32_t peer = uint32_t(__ffsll(int64_t(rest))) - 1;
        if (is_active(watch, peer)) leave_out(watch, peer);
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
        const uint8_t* published = watch.p->peers[watch.rank] + watch.p->calls_offset;
        const uint64_t* calls = reinterpret_cast<const uint64_t*>(published);
        const uint64_t here = load_relaxed_sys(calls + place_of_call(watch.epoch, watch.rank));
        const uint64_t there = load_relaxed_sys(calls + place_of_call(watch.epoch, peer));
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

// Polls until `poll()` gives `expected`; false if its peer is not active (any more), or is left out here. Whenever the
// beat is due, this rank's moves, and the peer is looked at. After that look it is polled for once more: what arrived
// while this thread was not running counts. What this rank sends itself is not timed: it arrives as soon as its own
// waits end.
template <class Watch, class Poll>
__device__ __noinline__ bool keep_polling(Poll poll, Watch watch, Awaited what, uint32_t expected) {
    uint32_t looked = uint32_t(watch.started_ns >> kBeatBits);
#pragma unroll 1
    for (uint32_t polls = 0;; ++polls) {
        if (poll() == expected) return true;
        poll_pause();
        if (polls % kPollsPerCheck != 0 || what.peer == watch.rank) continue;
        bool gone = !is_active(watch, what.peer);
        const uint64_t now_ns = global_timer_ns();
        const uint32_t due = uint32_t(now_ns >> kBeatBits);
        if (!gone && due == looked) continue;
        looked = due;
        if (!gone) {
            store_relaxed_sys(watch.p->liveness->beats[watch.rank], due);
            if (makes_different_call(watch, what.peer)) return false;
            gone = is_left_out_by(watch, what.peer) || is_silent(watch, what.peer, now_ns);
        }
        if (!gone) continue;
        if (poll() == expected) return true;
        if (is_active(watch, what.peer)) {
            report_if_left_out(watch, what.peer);
            leave_out(watch, what.peer);
        }
        return false;
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
