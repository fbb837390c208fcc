// SPDX-License-Identifier: Apache-2.0
// Virtual ranks that run the high-throughput kernels back to back, as an executable for sanitizers:
//     driver VARIANT SEED ROUNDS [absent]
// The ranks meet nowhere but in the kernels. With `absent` the last one stays away, and the others have to report it.
// Exit status 0: every result is right; 1: one is not; 2: a launch failed; else the sanitizer's own.
#include "driver.hpp"
#include "ht_round.hpp"

// Where one op's parts lie in symmetric memory.
struct Regions {
    uint64_t consumed, calls, counts, entries, rows, tags, end;
};

// A dispatch kernel for each phase and a combine kernel, a copy for each rank. `roles_apart`: one block sends and two
// receive; else one does both.
struct Variant {
    const char* name;
    moegen_host_entry *whole[kRanks], *plan[kRanks], *move[kRanks], *combine[kRanks];
    unsigned long (*dispatch_bytes)();
    unsigned long (*combine_bytes)();
    uint32_t threads;
    bool roles_apart, packed, quantises;
    Regions dispatch_at, combine_at;
};

#include <variants.hpp>

namespace {

struct Rank : RankState {
    float no_weights = 0;  // in place of a null pointer, which would mean that no weights are summed
    uint32_t chunk_counts[kChunks * kCounters] = {}, chunk_epochs[kChunks] = {};
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
    void launch(Rank& rank, moegen_host_entry* entry, const void* params) {
        if (!launched(rank, entry, params, variant_.roles_apart ? 3 : 1, variant_.threads, seed_ != 0)) failed_ = true;
    }
    template <typename Params>
    Params common_params(Rank& rank, Round& round, uint32_t op, const Regions& at);
    void dispatch(Rank& rank, Round& round, moegen_host_entry* entry, const std::vector<Bf16>& x, Received* received);
    void dispatch_all(Rank& rank, Round& round);
    void run_experts(const Rank& rank, Round& round) const;
    void combine(Rank& rank, Round& round, uint32_t number);
    bool verify_rows(const Rank& rank, uint32_t number, const Received& received, float sign) const;
    bool verify_packed_rows(const Rank& rank, uint32_t number, const Received& received, float sign) const;
    bool verify_combine(const Rank& rank, uint32_t number) const;
    bool is_row(const Received& received, uint32_t row, const Round& sent, uint32_t token, float sign) const;

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
        for (uint32_t round = 0; round < rounds; ++round) rank.rounds.emplace_back(round, number, rank.random);
    }
}

uint32_t local_experts(uint32_t rank) { return first_expert(rank + 1) - first_expert(rank); }

// ---- running --------------------------------------------------------------------------------------

template <typename Params>
Params Ranks::common_params(Rank& rank, Round& round, uint32_t op, const Regions& at) {
    Params p = {};
    for (uint32_t peer = 0; peer < kRanks; ++peer) p.peers[peer] = ranks_[peer].memory.get();
    p.control = &rank.control[op];
    p.aborted = &rank.aborted;
    p.failure = &rank.failure[op];
    p.consumed_offset = at.consumed;
    p.calls_offset = at.calls;
    p.rows_offset = at.rows;
    p.tags_offset = at.tags;
    p.timeout_ns = timeout_ns_;
    p.senders = {0, 1};
    p.receivers = variant_.roles_apart ? Blocks{1, 2} : Blocks{0, 1};
    p.rank = rank.number;
    p.tokens = round.rows;
    p.max_tokens = kMaxTokens;
    p.token_ranks = round.numbers.token_ranks.data();
    p.tokens_sent = &round.numbers.tokens_sent;
    p.first_rows = round.numbers.first_rows.data();
    p.row_tokens = round.numbers.row_tokens.data();
    p.row_slots = round.numbers.row_slots.data();
    p.row_weights = round.numbers.row_weights.data();
    p.own_rows = round.numbers.own_rows.data();
    return p;
}

// `received`: null where rows are only planned.
void Ranks::dispatch(Rank& rank, Round& round, moegen_host_entry* entry, const std::vector<Bf16>& x,
                     Received* received) {
    auto p = common_params<DispatchParams>(rank, round, 0, variant_.dispatch_at);
    p.counts_offset = variant_.dispatch_at.counts;
    p.entries_offset = variant_.dispatch_at.entries;
    p.x = reinterpret_cast<const uint8_t*>(x.data());
    p.x_stride = kHidden * sizeof(Bf16);
    p.topk_idx = round.any_ids();
    p.wide_ids = round.wide;
    p.topk_weights = round.weights.data();
    p.num_tokens = round.counted_on_device ? &round.tokens : nullptr;
    p.counts = round.numbers.counts.data();
    p.first_slots = round.numbers.first_slots.data();
    p.source_counts = round.numbers.source_counts.data();
    p.chunk_counts = rank.chunk_counts;
    p.chunk_epochs = rank.chunk_epochs;
    p.alignment = kAlignment;
    if (received != nullptr) {
        p.out = variant_.quantises ? received->quantised.data() : reinterpret_cast<uint8_t*>(received->rows.data());
        p.out_scales = reinterpret_cast<uint32_t*>(received->scales.data());
        p.scale_row_stride = p.scale_word_stride = 1;
        p.out_topk_idx = reinterpret_cast<decltype(p.out_topk_idx)>(received->ids.data());
        p.out_weights = received->weights.data();
        p.capacity = received->capacity;
    }
    launch(rank, entry, &p);
}

// Rows that are planned find exactly as much room as they need.
void Ranks::dispatch_all(Rank& rank, Round& round) {
    const Numbers& numbers = round.numbers;
    if (round.planned) {
        dispatch(rank, round, variant_.plan[rank.number], round.x, nullptr);
        if (failed_) return;
        const uint32_t last = variant_.packed ? local_experts(rank.number) : kRanks;
        const int32_t number = (variant_.packed ? numbers.first_slots : numbers.first_rows)[last];
        round.received.make(uint32_t(number), variant_.packed, variant_.quantises);
        dispatch(rank, round, variant_.move[rank.number], round.x, &round.received);
    } else {
        const uint32_t of_row = variant_.packed ? std::min(kTopk, local_experts(rank.number)) : 1;
        const uint32_t padding = variant_.packed ? (kAlignment - 1) * local_experts(rank.number) : 0;
        round.received.make(kRanks * kMaxTokens * of_row + padding, variant_.packed, variant_.quantises);
        dispatch(rank, round, variant_.whole[rank.number], round.x, &round.received);
    }
    if (!round.repeats || failed_) return;
    round.repeated.make(round.received.capacity, variant_.packed, variant_.quantises);
    dispatch(rank, round, variant_.move[rank.number], round.x_again, &round.repeated);
}

// Rows that no token came to stay NaN: a sum that one of them enters is found. In layout token a rank has one factor.
void Ranks::run_experts(const Rank& rank, Round& round) const {
    const Numbers& numbers = round.numbers;
    const uint32_t rows = uint32_t(numbers.first_rows[kRanks]);
    round.y.assign(round.received.capacity * kHidden, kNan);
    const auto run = [&](uint32_t begin, uint32_t number, float factor) {
        for (uint32_t at = begin * kHidden; at < (begin + number) * kHidden; ++at)
            round.y[at] = narrowed(round.received.value(at / kHidden, at % kHidden) * factor);
    };
    if (!variant_.packed) run(0, rows, factor_of(rank.number));
    for (uint32_t local = 0; local < local_experts(rank.number) && variant_.packed; ++local)
        run(uint32_t(numbers.first_slots[local]), uint32_t(numbers.counts[local]),
            factor_of(first_expert(rank.number) + local));
    round.y_weights.resize(rows * kTopk);
    for (uint32_t at = 0; at < rows * kTopk; ++at)
        round.y_weights[at] = numbers.row_slots[at] < 0 ? 0 : numbers.row_weights[at];
}

void Ranks::combine(Rank& rank, Round& round, uint32_t number) {
    auto p = common_params<CombineParams>(rank, round, 1, variant_.combine_at);
    p.y = reinterpret_cast<const uint8_t*>(round.y.data());
    p.y_weights = round.y_weights.empty() ? &rank.no_weights : round.y_weights.data();
    p.out = reinterpret_cast<uint8_t*>(round.combined[number].data());
    p.out_weights = round.combined_weights[number].data();
    p.rows = round.received.capacity;
    if (!round.weighted) p.row_weights = nullptr;
    launch(rank, variant_.combine[rank.number], &p);
}

void Ranks::work(Rank& rank) {
    for (Round& round : rank.rounds) {
        dispatch_all(rank, round);
        if (failed_) return;
        run_experts(rank, round);
        for (uint32_t i = 0; i < round.num_combines && !failed_; ++i) combine(rank, round, i);
    }
}

bool Ranks::run() {
    in_threads(kRanks, [this](uint32_t number) { work(ranks_[number]); });
    return !failed_;
}

bool Ranks::run_without_last() {
    timeout_ns_ = kAbsentTimeoutNs;
    return report_last(ranks_, [this](Rank& rank) { dispatch_all(rank, rank.rounds[0]); }) && !failed_;
}

// ---- what is right --------------------------------------------------------------------------------

bool Ranks::is_row(const Received& received, uint32_t row, const Round& sent, uint32_t token, float sign) const {
    if (row >= received.capacity) return false;
    for (uint32_t column = 0; column < kHidden; ++column)
        if (received.value(row, column) != sign * widened(sent.x[token * kHidden + column])) return false;
    return true;
}

// Layout token: by source and its token. `sign`: of these rows, which are x or -x.
bool Ranks::verify_rows(const Rank& rank, uint32_t number, const Received& received, float sign) const {
    const uint32_t first = first_expert(rank.number), last = first_expert(rank.number + 1);
    std::vector<int32_t> counts(kMaxLocalExperts);
    uint32_t row = 0;
    for (const Rank& source : ranks_) {
        const Round& sent = source.rounds[number];
        for (uint32_t token = 0; token < uint32_t(sent.tokens); ++token) {
            if (!sent.goes_to(token, rank.number)) continue;
            if (!is_row(received, row, sent, token, sign)) return wrong("row", rank, number, row);
            for (uint32_t k = 0; k < kTopk; ++k) {
                const int64_t id = sent.ids[token * kTopk + k];
                const bool here = id >= int64_t(first) && id < int64_t(last);
                if (received.ids[row * kTopk + k] != (here ? id - first : -1)) return wrong("id", rank, number, row);
                if (received.weights[row * kTopk + k] != (here ? sent.weights[token * kTopk + k] : 0.0f))
                    return wrong("weight of row", rank, number, row);
            }
            for (uint32_t expert = first; expert < last; ++expert)
                counts[expert - first] += sent.selects(token, expert);
            ++row;
        }
    }
    for (uint32_t at = row * kTopk; at < received.ids.size(); ++at)
        if (received.ids[at] != -1) return wrong("id of row behind the last", rank, number, at / kTopk);
    for (uint32_t local = 0; local < last - first; ++local)
        if (rank.rounds[number].numbers.counts[local] != counts[local]) return wrong("count", rank, number, local);
    return rank.rounds[number].numbers.first_rows[kRanks] == int32_t(row) || wrong("number", rank, number, row);
}

// Layout packed: by expert, source, and the source's token; every expert is aligned.
bool Ranks::verify_packed_rows(const Rank& rank, uint32_t number, const Received& received, float sign) const {
    const Numbers& numbers = rank.rounds[number].numbers;
    uint32_t slot = 0;
    for (uint32_t local = 0; local < local_experts(rank.number); ++local) {
        const int32_t expert = int32_t(first_expert(rank.number) + local);
        const uint32_t begin = slot;
        if (numbers.first_slots[local] != int32_t(begin)) return wrong("begin of expert", rank, number, local);
        for (const Rank& source : ranks_) {
            const Round& sent = source.rounds[number];
            for (uint32_t token = 0; token < uint32_t(sent.tokens); ++token) {
                if (!sent.selects(token, uint32_t(expert))) continue;
                if (!is_row(received, slot, sent, token, sign)) return wrong("row", rank, number, slot);
                float weight = 0;
                for (uint32_t at = token * kTopk; at < (token + 1) * kTopk; ++at)
                    if (sent.ids[at] == expert) weight += sent.weights[at];
                if (received.weights[slot++] != weight) return wrong("weight of row", rank, number, slot - 1);
            }
        }
        if (numbers.counts[local] != int32_t(slot - begin)) return wrong("count", rank, number, local);
        slot = (slot + kAlignment - 1) / kAlignment * kAlignment;
    }
    return numbers.first_slots[local_experts(rank.number)] == int32_t(slot) || wrong("number", rank, number, slot);
}

bool Ranks::verify_combine(const Rank& rank, uint32_t number) const {
    const Round& round = rank.rounds[number];
    for (uint32_t i = 0; i < round.num_combines; ++i) {
        for (uint32_t at = 0; at < uint32_t(round.tokens) * kHidden; ++at) {
            if (!is_right_sum(round, variant_.packed, rank.number, at / kHidden, at % kHidden, round.combined[i][at]))
                return wrong("sum of token", rank, number, at / kHidden);
        }
        for (uint32_t at = 0; at < uint32_t(round.tokens) * kTopk; ++at) {
            if (round.combined_weights[i][at] != (round.ids[at] < 0 ? 0.0f : round.weights[at]))
                return wrong("weight of token", rank, number, at / kTopk);
        }
    }
    return true;
}

bool Ranks::verify() const {
    const auto verify_dispatch = variant_.packed ? &Ranks::verify_packed_rows : &Ranks::verify_rows;
    bool right = true;
    for (const Rank& rank : ranks_) {
        right = right && was_silent(rank);
        for (uint32_t number = 0; number < rank.rounds.size() && right; ++number) {
            const Round& round = rank.rounds[number];
            right = (this->*verify_dispatch)(rank, number, round.received, 1) && verify_combine(rank, number);
            if (right && round.repeats) right = (this->*verify_dispatch)(rank, number, round.repeated, -1);
        }
    }
    return right;
}

bool fits(const Variant& variant) {
    return variant.dispatch_bytes() == sizeof(DispatchParams) && variant.combine_bytes() == sizeof(CombineParams);
}

}  // namespace

int main(int count, char** arguments) { return run_driver<Ranks>(count, arguments, kVariants, fits); }
