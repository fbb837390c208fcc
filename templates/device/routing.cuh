// SPDX-License-Identifier: Apache-2.0
// Where tokens go: which rank holds which expert, what a token selects, and in which order ranks are served.
#pragma once

#include <moegen/work.cuh>

namespace moegen {

// ---- sets of ranks: bit r stands for rank r -----------------------------------------------------

// Users may overwrite parts of a handle: a set that is read from there is masked with this.
template <uint32_t kRanks>
constexpr uint64_t kAllRanks = ~uint64_t(0) >> (64 - kRanks);

// The lowest rank of a set that is not empty.
__device__ __forceinline__ uint32_t first_rank(uint64_t ranks) { return uint32_t(__ffsll(int64_t(ranks))) - 1; }

__device__ __forceinline__ void drop_first(uint64_t& ranks) { ranks &= ranks - 1; }

// Takes the next rank that a row goes to. Over links each source begins behind itself, so that no rank is sent to by
// all others at once.
template <bool kCrossesLinks, class Params>
__device__ __forceinline__ uint32_t take_destination(const Params& p, uint64_t& ranks) {
    if constexpr (kCrossesLinks) {
        const uint64_t behind = ranks & ~((uint64_t(2) << p.rank) - 1);
        const uint32_t rank = first_rank(behind != 0 ? behind : ranks);
        ranks ^= uint64_t(1) << rank;
        return rank;
    } else {
        const uint32_t rank = first_rank(ranks);
        drop_first(ranks);
        return rank;
    }
}

// How many of these ranks are below `rank`: its place in what lies in the order of the ranks.
__device__ __forceinline__ int32_t ranks_below(uint32_t rank, uint64_t ranks) {
    return __popcll(ranks & ((uint64_t(1) << rank) - 1));
}

// ---- tokens of a call, and of a block -----------------------------------------------------------

// The tokens of this call: all of the user's tensor, or as many of them as device memory says.
template <class Params>
__device__ __forceinline__ uint32_t tokens_of_this_call(const Params& p) {
    if (p.num_tokens == nullptr) return p.tokens;
    const int32_t given = *p.num_tokens;
    return given < 0 ? 0 : min(uint32_t(given), p.tokens);
}

// Each of these blocks has a contiguous share of the tokens; where there are few tokens, the last blocks have none.
struct Share {
    uint32_t begin;
    uint32_t end;
};

__device__ __forceinline__ uint32_t tokens_per_block(const Blocks& blocks, uint32_t tokens) {
    return (tokens + blocks.blocks - 1) / blocks.blocks;
}

__device__ __forceinline__ Share share_of_block(const Blocks& blocks, uint32_t tokens) {
    const uint32_t number = tokens_per_block(blocks, tokens);
    const uint32_t begin = min((blockIdx.x - blocks.first) * number, tokens);
    return Share{begin, min(begin + number, tokens)};
}

// How many of these blocks have a share that is not empty.
__device__ __forceinline__ uint32_t blocks_with_a_share(const Blocks& blocks, uint32_t tokens) {
    const uint32_t number = tokens_per_block(blocks, tokens);
    return number == 0 ? 0 : (tokens + number - 1) / number;
}

// ---- experts and ids ----------------------------------------------------------------------------

// Each rank holds a contiguous share of the experts; the first kLarger ranks hold one more than the others.
template <uint32_t kNumberOfExperts, uint32_t kNumberOfRanks>
struct Partition {
    static constexpr uint32_t kNumber = kNumberOfExperts;
    static constexpr uint32_t kRanks = kNumberOfRanks;
    static constexpr uint32_t kLocal = (kNumber + kRanks - 1) / kRanks;  // experts that a rank holds at most
    static constexpr uint32_t kLarger = kNumber % kRanks;                // 0: all ranks hold kLocal

    static __device__ __forceinline__ uint32_t rank_of(uint32_t expert) {
        if constexpr (kLarger == 0) {
            return expert / kLocal;
        } else {
            constexpr uint32_t kInLarger = kLarger * kLocal;
            return expert < kInLarger ? expert / kLocal : kLarger + (expert - kInLarger) / (kLocal - 1);
        }
    }

    static __device__ __forceinline__ uint32_t first_of(uint32_t rank) {
        if constexpr (kLarger == 0) {
            return rank * kLocal;
        } else {
            return rank * kLocal - (rank > kLarger ? rank - kLarger : 0);
        }
    }

    static __device__ __forceinline__ uint32_t number_of(uint32_t rank) {
        if constexpr (kLarger == 0) {
            return kLocal;
        } else {
            return kLocal - (rank >= kLarger ? 1 : 0);
        }
    }
};

// A token's k-th id, which the user gave in 64 or 32 bits.
template <uint32_t kTopk, class Params>
__device__ __forceinline__ int64_t id_of(const Params& p, uint32_t token, uint32_t k) {
    const uint64_t at = uint64_t(token) * kTopk + k;
    return p.wide_ids ? static_cast<const int64_t*>(p.topk_idx)[at]
                      : int64_t(static_cast<const int32_t*>(p.topk_idx)[at]);
}

// An id that names no expert selects nothing. Unless it is -1, the host is told.
template <class Params>
__device__ __forceinline__ void report_unknown_id(const Params& p, uint32_t token) {
    store_relaxed_sys(&p.failure->invalid_token, token + 1);
}

// A token's ids. kUnknownId stands for each that names no expert and is not -1.
constexpr int32_t kUnknownId = -2;

template <uint32_t kTopk>
struct Ids {
    int32_t ids[kTopk];
};

// Loads all ids of a token before it looks at one.
template <class Experts, uint32_t kTopk, class Id>
__device__ __forceinline__ void load_ids_as(const Id* ids, uint32_t token, Ids<kTopk>& loaded) {
    ids += uint64_t(token) * kTopk;
    Id given[kTopk];
#pragma unroll
    for (uint32_t k = 0; k < kTopk; ++k) given[k] = ids[k];
#pragma unroll
    for (uint32_t k = 0; k < kTopk; ++k) {
        loaded.ids[k] = given[k] >= -1 && given[k] < Id(Experts::kNumber) ? int32_t(given[k]) : kUnknownId;
    }
}

// A token that does not exist selects nothing.
template <class Experts, uint32_t kTopk, class Params>
__device__ __forceinline__ Ids<kTopk> load_ids(const Params& p, uint32_t token, uint32_t tokens) {
    Ids<kTopk> loaded;
#pragma unroll
    for (uint32_t k = 0; k < kTopk; ++k) loaded.ids[k] = -1;
    if (token >= tokens) return loaded;
    if (p.wide_ids) {
        load_ids_as<Experts>(static_cast<const int64_t*>(p.topk_idx), token, loaded);
    } else {
        load_ids_as<Experts>(static_cast<const int32_t*>(p.topk_idx), token, loaded);
    }
    return loaded;
}

template <class Id, class Experts, uint32_t kTopk, class Params>
__device__ __forceinline__ uint64_t ranks_of_ids(const Params& p, uint32_t token) {
    const Id* ids = static_cast<const Id*>(p.topk_idx) + uint64_t(token) * kTopk;
    uint64_t ranks = 0;
    bool unknown = false;
#pragma unroll
    for (uint32_t k = 0; k < kTopk; ++k) {
        const Id id = ids[k];
        if (id >= 0 && id < Id(Experts::kNumber)) {
            ranks |= uint64_t(1) << Experts::rank_of(uint32_t(id));
        } else {
            unknown |= id != -1;
        }
    }
    if (unknown) report_unknown_id(p, token);
    return ranks & p.active;
}

// Bit r: rank r takes part and holds an expert of the token. One thread looks at all ids, and reports unknown ones.
template <class Experts, uint32_t kTopk, class Params>
__device__ __forceinline__ uint64_t ranks_of_token(const Params& p, uint32_t token) {
    return p.wide_ids ? ranks_of_ids<int64_t, Experts, kTopk>(p, token)
                      : ranks_of_ids<int32_t, Experts, kTopk>(p, token);
}

// Bit r: rank r holds an expert of the token; none, if there is no such token. Each lane of a warp looks at one id.
template <class Experts, uint32_t kTopk, class Params>
__device__ __forceinline__ uint64_t ranks_of_token_by_warp(const Params& p, uint32_t token, uint32_t tokens) {
    uint64_t rank = 0;
    if (token < tokens && lane_id() < kTopk) {
        const int64_t id = id_of<kTopk>(p, token, lane_id());
        if (id >= 0 && id < int64_t(Experts::kNumber)) rank = uint64_t(1) << Experts::rank_of(uint32_t(id));
    }
    const uint32_t low = __reduce_or_sync(kFullWarp, uint32_t(rank));
    if constexpr (Experts::kRanks <= 32) {
        return low;
    } else {
        return uint64_t(__reduce_or_sync(kFullWarp, uint32_t(rank >> 32))) << 32 | low;
    }
}

// ---- selections, and lanes that look at them ----------------------------------------------------

// A token's selection, as its source tells it: a local expert, and how many earlier tokens of the source select that.
constexpr uint32_t kExpertBits = 10;
constexpr uint32_t kNoSelection = ~0u;  // of an expert of another rank

__device__ __forceinline__ uint32_t pack_selection(uint32_t earlier_tokens, uint32_t local_expert) {
    return earlier_tokens << kExpertBits | local_expert;
}

__device__ __forceinline__ uint32_t local_expert_of(uint32_t selection) {
    return selection & ((1u << kExpertBits) - 1);
}
__device__ __forceinline__ uint32_t earlier_tokens_of(uint32_t selection) { return selection >> kExpertBits; }

// How many of these lanes are below `lane`: an exclusive prefix sum over a ballot.
__device__ __forceinline__ uint32_t lanes_below(uint32_t lane, uint32_t lanes) {
    return __popc(lanes & ((1u << lane) - 1));
}

// Whether this lane is the first of these.
__device__ __forceinline__ bool is_first_of(uint32_t lanes) { return uint32_t(__ffs(int32_t(lanes))) - 1 == lane_id(); }

// Whether this lane takes part and is the first with its value. ~0u is no value.
__device__ __forceinline__ bool is_first_with(uint32_t value, bool takes_part) {
    const uint32_t same = __match_any_sync(kFullWarp, takes_part ? value : ~0u);
    return takes_part && is_first_of(same);
}

// ---- rows of several ranks ----------------------------------------------------------------------

// Work is dealt round-robin to the ranks from the one `kSteps` behind this one on: a round has one row of each. Each
// rank begins with another one, so that no rank is served by all others at once.
template <uint32_t kRanks, uint32_t kSteps>
struct RoundRobin {
    static constexpr uint32_t kNumber = kRanks > kSteps ? kRanks - kSteps : 1;  // of rows in a round

    static __device__ __forceinline__ uint32_t rank(uint32_t own, uint32_t work) {
        return rank_after<kRanks>(own, kSteps + work % kNumber);
    }

    // The same, but each round begins one rank further on: no rank is the first for ever.
    static __device__ __forceinline__ uint32_t rotated_rank(uint32_t own, uint32_t work) {
        return rank_after<kRanks>(own, kSteps + (work + work / kNumber) % kNumber);
    }

    static __device__ __forceinline__ uint32_t round(uint32_t work) { return work / kNumber; }
};

// The most rows that may come. A row's number that is read from a handle is clamped to it.
template <uint32_t kRanks, class Params>
__device__ __forceinline__ uint32_t rows_at_most(const Params& p) {
    return kRanks * p.max_tokens;
}

// The rows of the rank, other than this one, that has the most; at most `limit`. For a whole warp.
template <uint32_t kRanks, class Params>
__device__ __forceinline__ uint32_t most_rows_of_others(const Params& p, uint32_t limit) {
    uint32_t most = 0;
#pragma unroll 1
    for (uint32_t rank = lane_id(); rank < kRanks; rank += kWarpSize) {
        const uint32_t rows = min(uint32_t(p.first_rows[rank + 1] - p.first_rows[rank]), limit);
        if (rank != p.rank) most = max(most, rows);
    }
    return __reduce_max_sync(kFullWarp, most);
}

}  // namespace moegen
