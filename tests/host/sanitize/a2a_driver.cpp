// SPDX-License-Identifier: Apache-2.0
// Virtual ranks that run the one-sided kernels back to back, as an executable for sanitizers:
//     driver VARIANT SEED ROUNDS [absent]
// The ranks meet nowhere but in the kernels. With `absent` the last one stays away, and the others have to report it.
// Exit status 0: every result is right; 1: one is not; 2: a launch failed; else the sanitizer's own.
#include "a2a_round.hpp"
#include "driver.hpp"

struct Roles {
    uint32_t blocks;
    Blocks senders, receivers;
};

// A dispatch and a combine kernel, a copy for each rank. `out_bytes`: of an element of combine's result. `pulls`:
// experts leave their rows where the other ranks read them.
struct Variant {
    const char* name;
    moegen_host_entry *dispatch[kRanks], *combine[kRanks];
    unsigned long (*dispatch_bytes)();
    unsigned long (*combine_bytes)();
    uint32_t threads, shared_bytes, out_bytes;
    bool pulls;
    Roles dispatch_roles, combine_roles;
};

#include <variants.hpp>

namespace {

struct Rank : RankState {
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
    template <typename Params>
    Params common_params(Rank& rank, Round& round, uint32_t op, const Roles& roles);
    void launch(Rank& rank, moegen_host_entry* entry, const void* params, const Roles& roles) {
        if (!launched(rank, entry, params, roles.blocks, variant_.threads, seed_ != 0, variant_.shared_bytes)) {
            failed_ = true;
        }
    }
    void dispatch(Rank& rank, Round& round);
    void combine(Rank& rank, Round& round, std::vector<uint8_t>& result);
    template <typename Params>
    void combine_with(Rank& rank, Round& round, std::vector<uint8_t>& result);
    bool verify_rows(const Rank& rank, uint32_t number, const Rank& source) const;
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
        // Words of 64 bits: the upper halves mean nothing.
        rank.prepare(number, seed, kAt.end, {kAt.presence, kAt.presence + kRanks * sizeof(uint32_t)});
        for (uint32_t round = 0; round < rounds; ++round)
            rank.rounds.emplace_back(round, number, variant.out_bytes, variant.pulls, rank.random);
    }
}

// ---- running --------------------------------------------------------------------------------------

template <typename Params>
Params Ranks::common_params(Rank& rank, Round& round, uint32_t op, const Roles& roles) {
    Params p = {};
    for (uint32_t peer = 0; peer < kRanks; ++peer) p.peers[peer] = ranks_[peer].memory.get();
    p.token_ranks = round.token_ranks.data();
    p.token_slots = round.token_slots.data();
    p.tokens_sent = &round.tokens_sent;
    p.counts = round.counts.data();
    p.control = &rank.control[op];
    p.aborted = &rank.aborted;
    p.failure = &rank.failure[op];
    p.active = (1ull << kRanks) - 1;
    p.presence_offset = kAt.presence;
    p.timeout_ns = timeout_ns_;
    p.senders = roles.senders;
    p.receivers = roles.receivers;
    p.rank = rank.number;
    p.tokens = round.rows;
    p.slots = round.slots;
    p.max_tokens = kMaxTokens;
    return p;
}

void Ranks::dispatch(Rank& rank, Round& round) {
    auto p = common_params<DispatchParams>(rank, round, 0, variant_.dispatch_roles);
    for (uint32_t payload = 0; payload < kPayloads; ++payload) {
        p.payloads[payload] = round.sent[payload].data();
        p.planes[payload] = round.planes[payload];
    }
    p.topk_idx = round.any_ids();
    p.wide_ids = round.wide;
    p.num_tokens = round.counted_on_device ? &round.tokens : nullptr;
    if (round.gathers) {
        p.stats = round.stats.data();
        p.stats_words = kStatsWords;
        p.gathered = round.gathered.data();
    }
    if (round.fills_ids) {
        p.unused_ids = reinterpret_cast<int32_t*>(rank.memory.get() + round.planes[kIds]);
        p.id_words = kWidths[kIds] / sizeof(int32_t);
        p.unused_id = kUnusedId;
    }
    p.counts_offset = kAt.counts;
    p.stats_offset = kAt.stats;
    p.flags_offset = kAt.flags;
    launch(rank, variant_.dispatch[rank.number], &p, variant_.dispatch_roles);
}

void Ranks::combine(Rank& rank, Round& round, std::vector<uint8_t>& result) {
    variant_.pulls ? combine_with<PullingCombineParams>(rank, round, result)
                   : combine_with<CombineParams>(rank, round, result);
}

template <typename Params>
void Ranks::combine_with(Rank& rank, Round& round, std::vector<uint8_t>& result) {
    auto p = common_params<Params>(rank, round, 1, variant_.combine_roles);
    p.other_control = &rank.control[0];
    p.calls_offset = kAt.calls;
    p.calls = reinterpret_cast<const uint64_t*>(rank.memory.get() + kAt.calls);
    p.out = result.data();
    if constexpr (requires { p.y; }) {
        p.y = reinterpret_cast<const uint8_t*>(round.y.data());
        p.rows_offset = kAt.rows;
        p.half_bytes = kAt.half;
        p.tags_offset = kAt.tags;
    } else {
        p.rows_offset = kAt.expert_rows;
    }
    launch(rank, variant_.combine[rank.number], &p, variant_.combine_roles);
}

// A combine tells the others that the rows of dispatch were read.
void Ranks::work(Rank& rank) {
    for (Round& round : rank.rounds) {
        dispatch(rank, round);
        if (failed_) return;
        round.read(rank.memory.get());
        round.run_experts(rank.number);
        if (variant_.pulls && round.num_combines != 0)
            std::memcpy(rank.memory.get() + kAt.expert_rows, round.y.data(), round.y.size() * sizeof(Bf16));
        for (uint32_t i = 0; i < round.num_combines && !failed_; ++i) combine(rank, round, round.combined[i]);
    }
}

bool Ranks::run() {
    in_threads(kRanks, [this](uint32_t number) { work(ranks_[number]); });
    return !failed_;
}

bool Ranks::run_without_last() {
    timeout_ns_ = kAbsentTimeoutNs;
    return report_last(ranks_, [this](Rank& rank) { dispatch(rank, rank.rounds[0]); }) && !failed_;
}

// ---- what is right --------------------------------------------------------------------------------

bool Ranks::verify_rows(const Rank& rank, uint32_t number, const Rank& source) const {
    const Round &round = rank.rounds[number], &sent = source.rounds[number];
    const auto received = [&](uint32_t payload, uint32_t row) {
        return &round.received[payload][(source.number * round.slots + row) * kWidths[payload]];
    };
    uint32_t row = 0;
    for (uint32_t token = 0; token < uint32_t(sent.tokens); ++token) {
        if (!sent.goes_to(token, rank.number)) continue;
        for (uint32_t payload = 0; payload < kPayloads; ++payload) {
            const uint32_t width = kWidths[payload];
            if (std::memcmp(received(payload, row), &sent.sent[payload][token * width], width) != 0)
                return wrong("row of source", rank, number, source.number);
        }
        ++row;
    }
    if (round.counts[source.number] != int32_t(row)) return wrong("count of source", rank, number, source.number);
    for (; row < round.slots && round.fills_ids; ++row) {
        for (uint32_t k = 0; k < kTopk; ++k) {
            int32_t id;
            std::memcpy(&id, received(kIds, row) + k * sizeof id, sizeof id);
            if (id != kUnusedId) return wrong("unused ids of source", rank, number, source.number);
        }
    }
    return true;
}

bool Ranks::verify_dispatch(const Rank& rank, uint32_t number) const {
    const Round& round = rank.rounds[number];
    for (const Rank& source : ranks_) {
        if (!verify_rows(rank, number, source)) return false;
        for (uint32_t word = 0; word < kStatsWords; ++word) {
            const int32_t right = round.gathers ? stat_of(number, source.number, word) : -1;
            if (round.gathered[source.number * kStatsWords + word] != right)
                return wrong("statistics of source", rank, number, source.number);
        }
    }
    return round.tokens_sent == round.tokens || wrong("number of tokens", rank, number, uint32_t(round.tokens_sent));
}

bool Ranks::verify_combine(const Rank& rank, uint32_t number) const {
    const Round& round = rank.rounds[number];
    const uint32_t bytes = variant_.out_bytes;
    for (uint32_t i = 0; i < round.num_combines; ++i) {
        for (uint32_t at = 0; at < uint32_t(round.tokens) * kHidden; ++at) {
            if (!is_right_sum(round, at / kHidden, at % kHidden, &round.combined[i][at * bytes], bytes))
                return wrong("sum of token", rank, number, at / kHidden);
        }
    }
    return true;
}

bool Ranks::verify() const {
    bool right = true;
    for (const Rank& rank : ranks_) {
        right = right && was_silent(rank);
        for (uint32_t number = 0; number < rank.rounds.size(); ++number)
            right = right && verify_dispatch(rank, number) && verify_combine(rank, number);
    }
    return right;
}

bool fits(const Variant& variant) {
    const auto combine_bytes = variant.pulls ? sizeof(PullingCombineParams) : sizeof(CombineParams);
    return variant.dispatch_bytes() == sizeof(DispatchParams) && variant.combine_bytes() == combine_bytes;
}

}  // namespace

int main(int count, char** arguments) { return run_driver<Ranks>(count, arguments, kVariants, fits); }
