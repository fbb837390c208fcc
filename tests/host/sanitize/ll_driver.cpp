// SPDX-License-Identifier: Apache-2.0
// Virtual ranks that run the low-latency kernels back to back, as an executable for sanitizers:
//     driver VARIANT SEED ROUNDS [absent]
// The ranks meet nowhere but in the kernels. With `absent` the last one stays away, and the others have to report it
// or, where ranks may be missing, to mark it and go on.
// Exit status 0: every result is right; 1: one is not; 2: a launch failed; else the sanitizer's own.
#include "driver.hpp"
#include "ll_round.hpp"

// Where one op's parts lie in symmetric memory.
struct Regions {
    uint64_t consumed, calls, routes, rows, tags, weights, end;
};

// A dispatch and a combine kernel, a copy for each rank. `late`: weights are given to combine. `masked`: ranks may be
// missing.
struct Variant {
    const char* name;
    moegen_host_entry *dispatch[kRanks], *combine[kRanks];
    unsigned long (*dispatch_bytes)();
    unsigned long (*combine_bytes)();
    uint32_t threads;
    bool late, masked;
    Regions dispatch_at, combine_at;
};

// struct Liveness of masked_signal.cuh.
struct Pieces {
    alignas(16) uint32_t words[4];
};
struct Liveness {
    Failure* failure;
    Pieces* heard;
    uint32_t* const* beats;
    Pieces* const* left_out;
};

#include <variants.hpp>

namespace {

constexpr uint64_t kMaskedTimeoutNs = 1'000'000'000;

struct Rank : RankState {
    uint32_t active[kRanks], verdicts[2][kRanks] = {};
    uint64_t waited_ns[kRanks] = {};
    uint32_t beat = 0;
    Pieces heard[kRanks] = {}, left_out[2] = {};
    uint32_t* beats[kRanks];
    Pieces* verdicts_of[2][kRanks];
    Liveness liveness[2];
    std::vector<Round> rounds;
};

// All ranks of one run.
class Ranks {
  public:
    Ranks(const Variant& variant, uint32_t seed, uint32_t rounds);
    bool run();  // whether every launch succeeded
    bool run_without_last();
    bool verify() const;

  private:
    void work(Rank& rank);
    void launch(Rank& rank, moegen_host_entry* entry, const void* params, uint32_t blocks) {
        if (!launched(rank, entry, params, blocks, variant_.threads, seed_ != 0)) failed_ = true;
    }
    template <typename Params>
    Params common_params(Rank& rank, const Round& round, uint32_t op, const Regions& at);
    void dispatch(Rank& rank, Round& round);
    template <typename Params>
    void dispatch_with(Rank& rank, Round& round);
    void combine(Rank& rank, Round& round, std::vector<Bf16>& result);
    template <typename Params>
    void combine_with(Rank& rank, Round& round, std::vector<Bf16>& result);
    void dispatch_and_combine_without_last(Rank& rank);
    bool verify_dispatch(const Rank& rank, uint32_t number) const;
    bool verify_combine(const Rank& rank, uint32_t number) const;

    const Variant& variant_;
    const uint32_t seed_;
    uint64_t timeout_ns_ = kTimeoutNs;
    std::vector<Rank> ranks_{kRanks};
    std::atomic<bool> failed_ = false;
};

Ranks::Ranks(const Variant& variant, uint32_t seed, uint32_t rounds) : variant_(variant), seed_(seed) {
    for (uint32_t number = 0; number < kRanks; ++number) {
        Rank& rank = ranks_[number];
        rank.prepare(number, seed, variant.combine_at.end, {variant.dispatch_at.consumed, variant.combine_at.consumed});
        std::fill(rank.active, rank.active + kRanks, 1);
        for (uint32_t round = 0; round < rounds; ++round) rank.rounds.emplace_back(round, number, rank.random);
        for (uint32_t peer = 0; peer < kRanks; ++peer) rank.beats[peer] = &ranks_[peer].beat;
        for (uint32_t op = 0; op < 2; ++op) {
            for (uint32_t peer = 0; peer < kRanks; ++peer) rank.verdicts_of[op][peer] = &ranks_[peer].left_out[op];
            rank.liveness[op] = {&rank.failure[op], rank.heard, rank.beats, rank.verdicts_of[op]};
        }
    }
}

// ---- running --------------------------------------------------------------------------------------

template <typename Params>
Params Ranks::common_params(Rank& rank, const Round& round, uint32_t op, const Regions& at) {
    Params p = {};
    for (uint32_t peer = 0; peer < kRanks; ++peer) p.peers[peer] = ranks_[peer].memory.get();
    p.control = &rank.control[op];
    if constexpr (requires { p.aborted; }) {
        p.aborted = &rank.aborted;
    } else {
        p.active = rank.active;
        p.liveness = &rank.liveness[op];
        p.verdicts = rank.verdicts[op];
        p.waited_ns = rank.waited_ns;
    }
    p.failure = &rank.failure[op];
    p.consumed_offset = at.consumed;
    p.rows_offset = at.rows;
    p.tags_offset = at.tags;
    p.timeout_ns = timeout_ns_;
    p.rank = rank.number;
    p.capacity = kMaxTokens;
    p.max_tokens = round.max_tokens;
    return p;
}

void Ranks::dispatch(Rank& rank, Round& round) {
    variant_.masked ? dispatch_with<MaskedDispatchParams>(rank, round) : dispatch_with<DispatchParams>(rank, round);
}

template <typename Params>
void Ranks::dispatch_with(Rank& rank, Round& round) {
    auto p = common_params<Params>(rank, round, 0, variant_.dispatch_at);
    if constexpr (requires { p.selected_ranks; }) {
        p.selected_ranks = round.selected_ranks.data();
        p.selected_weights = round.selected_weights.data();
    }
    p.routes_offset = variant_.dispatch_at.routes;
    p.x = reinterpret_cast<const uint8_t*>(round.x.data());
    p.x_stride = kHidden * sizeof(Bf16);
    p.topk_idx = round.any_ids();
    p.wide_ids = round.wide;
    p.topk_weights = variant_.late ? nullptr : round.weights.data();
    p.tokens = round.rows;
    p.num_tokens = round.counted_on_device ? &round.tokens : nullptr;
    p.out = reinterpret_cast<uint8_t*>(round.out.data());
    p.counts = round.counts.data();
    p.ranges = round.ranges.data();
    p.first_rows = round.first_rows;
    p.row_origin = round.row_origin.data();
    p.row_slots = round.row_slots.data();
    p.row_weights = round.row_weights.data();
    p.token_ranks = round.token_ranks.data();
    p.tokens_sent = &round.tokens_sent;
    p.row_tokens = round.row_tokens.data();
    p.tellers = 1;
    p.shares = 1;
    p.senders = {1, kBlocksPerRole};
    p.receivers = {1 + kBlocksPerRole, kBlocksPerRole};
    launch(rank, variant_.dispatch[rank.number], &p, 1 + 2 * kBlocksPerRole);
}

void Ranks::combine(Rank& rank, Round& round, std::vector<Bf16>& result) {
    variant_.masked ? combine_with<MaskedCombineParams>(rank, round, result)
                    : combine_with<CombineParams>(rank, round, result);
}

template <typename Params>
void Ranks::combine_with(Rank& rank, Round& round, std::vector<Bf16>& result) {
    auto p = common_params<Params>(rank, round, 1, variant_.combine_at);
    if constexpr (requires { p.selected_ranks; }) {
        p.selected_ranks = round.selected_ranks.data();
        p.selected_weights = round.selected_weights.data();
        p.renormalize = 1;  // by 1 where nobody is missing
    }
    p.calls_offset = variant_.combine_at.calls;
    p.call = variant_.late;
    p.weights_offset = variant_.combine_at.weights;
    p.y = reinterpret_cast<const uint8_t*>(round.y.data());
    p.out = reinterpret_cast<uint8_t*>(result.data());
    p.topk_weights = variant_.late ? round.weights.data() : nullptr;
    p.first_rows = round.first_rows;
    p.row_origin = round.row_origin.data();
    p.row_slots = round.row_slots.data();
    p.row_weights = round.row_weights.data();
    p.token_ranks = round.token_ranks.data();
    p.tokens_sent = &round.tokens_sent;
    p.tokens = round.rows;
    p.senders = {0, kBlocksPerRole};
    p.receivers = {kBlocksPerRole, kBlocksPerRole};
    launch(rank, variant_.combine[rank.number], &p, 2 * kBlocksPerRole);
}

// Rows that no token came to stay NaN: a sum that one of them enters is found.
void run_experts(const Rank& rank, Round& round) {
    const uint32_t first = first_expert(rank.number), last = first_expert(rank.number + 1);
    for (uint32_t expert = first; expert < last; ++expert) {
        const uint32_t begin = (expert - first) * round.expert_rows * kHidden;
        const uint32_t end = begin + uint32_t(round.counts[expert - first]) * kHidden;
        for (uint32_t at = begin; at < end; ++at) round.y[at] = narrowed(widened(round.out[at]) * factor_of(expert));
    }
}

void Ranks::work(Rank& rank) {
    for (Round& round : rank.rounds) {
        dispatch(rank, round);
        if (failed_) return;
        run_experts(rank, round);
        for (uint32_t i = 0; i < round.num_combines && !failed_; ++i) combine(rank, round, round.combined[i]);
    }
}

bool Ranks::run() {
    in_threads(kRanks, [this](uint32_t number) { work(ranks_[number]); });
    return !failed_;
}

// One rank that is missing: marked, with no time lost in the second round, and nothing of it in the results.
void Ranks::dispatch_and_combine_without_last(Rank& rank) {
    for (uint32_t number = 0; number < 2; ++number) {
        Round& round = rank.rounds[number];
        dispatch(rank, round);
        run_experts(rank, round);
        combine(rank, round, round.combined[0]);
        for (const int32_t* range = &round.ranges[(kRanks - 1) * 2]; range < round.ranges.data() + round.ranges.size();
             range += kRanks * 2)
            if (range[0] > 0) failed_ = true;
        for (uint32_t at = 0; at < uint32_t(round.tokens) * kHidden; ++at)
            if (round.combined[0][at] == kNan) failed_ = true;
    }
    for (uint32_t peer = 0; peer < kRanks; ++peer)
        if (rank.active[peer] != (peer + 1 < kRanks)) failed_ = true;
}

bool Ranks::run_without_last() {
    timeout_ns_ = variant_.masked ? kMaskedTimeoutNs : kAbsentTimeoutNs;
    if (!variant_.masked)
        return report_last(ranks_, [this](Rank& rank) { dispatch(rank, rank.rounds[0]); }) && !failed_;
    in_threads(kRanks - 1, [this](uint32_t number) { dispatch_and_combine_without_last(ranks_[number]); });
    return !failed_;
}

// ---- what is right --------------------------------------------------------------------------------

bool Ranks::verify_dispatch(const Rank& rank, uint32_t number) const {
    const Round& got = rank.rounds[number];
    const uint32_t first = first_expert(rank.number);
    for (uint32_t expert = first; expert < first_expert(rank.number + 1); ++expert) {
        const uint32_t local = expert - first;
        uint32_t row = 0;
        for (const Rank& source : ranks_) {
            const Round& sent = source.rounds[number];
            const uint32_t before = row;
            for (uint32_t token = 0; token < uint32_t(sent.tokens); ++token) {
                if (!sent.selects(token, expert)) continue;
                const Bf16* there = &got.out[(local * got.expert_rows + row++) * kHidden];
                if (std::memcmp(there, &sent.x[token * kHidden], kHidden * sizeof(Bf16)) != 0)
                    return wrong("row of expert", rank, number, expert);
            }
            const int32_t* range = &got.ranges[(local * kRanks + source.number) * 2];
            if (range[0] != int32_t(row - before) || range[1] != int32_t(before))
                return wrong("range of expert", rank, number, expert);
        }
        if (got.counts[local] != int32_t(row)) return wrong("count of expert", rank, number, expert);
    }
    return true;
}

bool Ranks::verify_combine(const Rank& rank, uint32_t number) const {
    const Round& round = rank.rounds[number];
    for (uint32_t i = 0; i < round.num_combines; ++i) {
        for (uint32_t at = 0; at < uint32_t(round.tokens) * kHidden; ++at) {
            if (!is_right_sum(round, rank.number, at / kHidden, at % kHidden, round.combined[i][at]))
                return wrong("sum of token", rank, number, at / kHidden);
        }
    }
    return true;
}

bool Ranks::verify() const {
    bool right = true;
    for (const Rank& rank : ranks_) {
        right = right && was_silent(rank);
        for (uint32_t round = 0; round < rank.rounds.size(); ++round)
            right = right && verify_dispatch(rank, round) && verify_combine(rank, round);
    }
    return right;
}

bool fits(const Variant& variant) {
    const auto dispatch_bytes = variant.masked ? sizeof(MaskedDispatchParams) : sizeof(DispatchParams);
    const auto combine_bytes = variant.masked ? sizeof(MaskedCombineParams) : sizeof(CombineParams);
    return variant.dispatch_bytes() == dispatch_bytes && variant.combine_bytes() == combine_bytes;
}

}  // namespace

int main(int count, char** arguments) { return run_driver<Ranks>(count, arguments, kVariants, fits); }
