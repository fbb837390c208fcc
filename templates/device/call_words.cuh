// SPDX-License-Identifier: Apache-2.0
// Call words: the arguments of a call that must be equal on all ranks, packed (moegen.codegen.call_words has the
// fields). Kernels compare them as a whole.
#pragma once

#include <moegen/epoch.cuh>

namespace moegen {

// This rank's call word: a constant of kernels that one kind of call launches.
template <class Params>
__device__ __forceinline__ auto call_word(const Params& p) {
    if constexpr (requires { Params::kCall; }) {
        return Params::kCall;
    } else {
        return p.call;
    }
}

// In a 64-bit word it stands above the epoch.
__device__ __forceinline__ uint64_t with_call(uint32_t call, uint32_t epoch) { return uint64_t(call) << 32 | epoch; }

// The tag of a row whose receivers compare the call word, too.
template <class Params, class Watch>
__device__ __forceinline__ uint64_t tag_of(const Params& p, const Watch& watch) {
    return with_call(call_word(p), watch.epoch);
}

// Reports that a peer's call word differs. Several threads may write such reports at once: one of them stays.
__device__ __forceinline__ void write_other_call(Failure* failure, uint32_t rank, uint32_t peer, uint64_t here,
                                                 uint64_t there) {
    store_relaxed_sys(&failure->rank, rank);
    store_relaxed_sys(&failure->call_here[0], uint32_t(here));
    store_relaxed_sys(&failure->call_here[1], uint32_t(here >> 32));
    store_relaxed_sys(&failure->call_there[0], uint32_t(there));
    store_relaxed_sys(&failure->call_there[1], uint32_t(there >> 32));
    store_release_sys(&failure->other_caller, peer + 1);
}

// ---- published call words -------------------------------------------------------------------------

// They lie as [parity][rank] in every rank's symmetric memory, with room for all ranks that may be.
constexpr uint32_t kMostRanks = 64;
__device__ __forceinline__ uint32_t place_of_call(uint32_t epoch, uint32_t rank) {
    return parity_of(epoch) * kMostRanks + rank;
}

// Where `from` publishes its call word to `rank`.
template <class Params>
__device__ __forceinline__ uint64_t* call_at(const Params& p, uint32_t epoch, uint32_t rank, uint32_t from) {
    return reinterpret_cast<uint64_t*>(p.peers[rank] + p.calls_offset) + place_of_call(epoch, from);
}

// Whether two published words are of this launch and of different calls.
__device__ __forceinline__ bool are_of_different_calls(uint64_t here, uint64_t there, uint32_t epoch) {
    return uint32_t(here) == epoch && uint32_t(there) == epoch && here != there;
}

// One block publishes this rank's call word once the epoch is open, ahead of any row. A peer that makes a different
// call then fails at once, where it would wait for what this rank never sends until it times out.
template <uint32_t kRanks, uint32_t kThreads, class Params, class Opened>
__device__ __forceinline__ void publish_call(const Params& p, uint32_t epoch, uint32_t call, Opened opened) {
#pragma unroll 1
    for (uint32_t peer = threadIdx.x; peer < kRanks; peer += kThreads) {
        if (opened.may_send_to(peer)) store_relaxed_sys(call_at(p, epoch, peer, p.rank), with_call(call, epoch));
    }
}

// ---- path collective ------------------------------------------------------------------------------

// Whether what a rank has sent is of this object, of this call's number, and of the same call word. Else that is
// reported, and what it has sent counts as empty.
template <class Params, class Call>
__device__ __forceinline__ bool belongs_here(const Params& p, uint32_t rank, uint32_t object, uint32_t number,
                                             Call call) {
    if (object != p.object || number != epoch_before(p.control->epoch)) {
        store_relaxed_sys(&p.failure->mismatched, rank + 1);
        return false;
    }
    if (call == call_word(p)) return true;
    write_other_call(p.failure, p.rank, rank, call_word(p), call);
    return false;
}

}  // namespace moegen
