// SPDX-License-Identifier: Apache-2.0
// Presence: what every rank tells every other when it begins an op, so that no op has to wait for the one before.
#pragma once

#include <moegen/call_words.cuh>

namespace moegen {

// Whether a rank takes part in this call. One that does not is neither told anything nor waited for.
template <class Params>
__device__ __forceinline__ bool takes_part(const Params& p, uint32_t rank) {
    return (p.active >> rank & 1) != 0;
}

// Progress word of `from` at `rank`: the last dispatch whose rows it has consumed.
template <class Params>
__device__ __forceinline__ uint64_t* presence_at(const Params& p, uint32_t rank, uint32_t from) {
    return reinterpret_cast<uint64_t*>(p.peers[rank] + p.presence_offset) + from;
}

// Published when a dispatch begins: whatever the user read before this launch, it has read. By one block, whose last
// threads publish, because the first ones have a share of the tokens.
template <uint32_t kRanks, uint32_t kThreads, class Params>
__device__ __forceinline__ void publish_presence(const Params& p, uint32_t epoch) {
#pragma unroll 1
    for (uint32_t peer = kThreads - 1 - threadIdx.x; peer < kRanks; peer += kThreads) {
        if (takes_part(p, peer)) store_release_sys(presence_at(p, peer, p.rank), uint64_t(epoch_before(epoch)));
    }
}

// Whether every rank has come as far as `needed` already. A warp looks at the ranks in turn.
template <uint32_t kRanks, class Params>
__device__ __forceinline__ bool all_are_present(const Params& p, uint32_t needed) {
    bool came = true;
#pragma unroll 1
    for (uint32_t peer = lane_id(); peer < kRanks; peer += kWarpSize) {
        came &= !takes_part(p, peer) || progress_at(presence_at(p, p.rank, peer), needed) == needed;
    }
    return came;
}

// Whether every rank has come as far as `needed`, which is waited for. A warp waits for the ranks in turn.
template <uint32_t kRanks, class Params, class Watch>
__device__ __forceinline__ bool await_presence(const Params& p, const Watch& watch, uint32_t phase, uint32_t needed) {
    bool came = true;
#pragma unroll 1
    for (uint32_t peer = lane_id(); peer < kRanks; peer += kWarpSize) {
        if (!takes_part(p, peer)) continue;
        came &= wait_for_progress(watch, phase, peer, presence_at(p, p.rank, peer), needed);
    }
    return came;
}

// Published when a combine begins: the same of the last dispatch, and the call word.
template <uint32_t kRanks, uint32_t kThreads, class Params>
__device__ __forceinline__ void publish_presence_and_call(const Params& p, uint32_t epoch) {
    const uint64_t done = epoch_before(p.other_control->epoch);
#pragma unroll 1
    for (uint32_t at = kThreads - 1 - threadIdx.x; at < 2 * kRanks; at += kThreads) {
        const uint32_t peer = at % kRanks;
        uint64_t* to = at < kRanks ? presence_at(p, peer, p.rank) : call_at(p, epoch, peer, p.rank);
        if (takes_part(p, peer)) store_release_sys(to, at < kRanks ? done : with_call(call_word(p), epoch));
    }
}

// Waits until every rank has begun this combine with the same call word. The threads of a block wait for the ranks in
// turn. A rank begins the next combine only when all have begun this one, so its word stays until then.
template <uint32_t kRanks, uint32_t kThreads, class Params, class Watch>
__device__ __forceinline__ bool await_calls(const Params& p, const Watch& watch, uint32_t phase) {
    bool came = true;
#pragma unroll 1
    for (uint32_t peer = threadIdx.x; peer < kRanks; peer += kThreads) {
        if (!takes_part(p, peer)) continue;
        const uint64_t* word = p.calls + place_of_call(watch.epoch, peer);
        came &= wait_for(watch, Awaited{phase, peer, -1}, with_call(call_word(p), watch.epoch),
                         [=] { return load_acquire_sys(word); });
    }
    return came;
}

}  // namespace moegen
