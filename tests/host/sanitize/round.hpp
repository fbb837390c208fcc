// SPDX-License-Identifier: Apache-2.0
// What the ranks of driver.cpp are given, what they get, and what is right.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <shape.hpp>
#include <vector>

constexpr uint32_t kMaxLocalExperts = (kExperts + kRanks - 1) / kRanks;
constexpr uint32_t kExpertRows = kRanks * kMaxTokens;
// Rows that come back order the ranks too. In the last three rounds of each five only one rank has tokens, and there
// its dispatches, and then the combines of the others, rest on `consumed` alone. There are three of either in a row:
// what is written was read two epochs ago.
constexpr uint32_t kCombinesOfRound[] = {1, 1, 0, 0, 3};
constexpr uint32_t kFirstOneWay = 2;
constexpr uint16_t kNan = 0x7fc0;

using Bf16 = uint16_t;

inline float widened(Bf16 number) {
    const uint32_t bits = uint32_t(number) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Of a number that bf16 holds exactly.
inline Bf16 narrowed(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return Bf16(bits >> 16);
}

inline uint32_t first_expert(uint32_t rank) { return rank * (kExperts / kRanks) + std::min(rank, kExperts % kRanks); }

inline uint32_t rank_of(uint32_t expert) {
    uint32_t rank = 0;
    while (expert >= first_expert(rank + 1)) ++rank;
    return rank;
}

// What stands in for the experts: each multiplies by its own factor, exactly in bf16.
inline float factor_of(uint32_t expert) { return float(expert % 3 + 1); }

// One dispatch of one rank and the combines that follow it: what goes in, and what has come out.
struct Round {
    uint32_t rows = 0;  // of the token tensor
    int32_t tokens = 0;
    bool counted_on_device = false, wide = false;
    std::vector<Bf16> x;
    std::vector<int32_t> ids;
    std::vector<int64_t> wide_ids;
    std::vector<float> weights;

    std::vector<Bf16> out, y, combined[3];
    std::vector<int32_t> counts, ranges, row_tokens, row_origin, row_slots, selected_ranks;
    std::vector<float> row_weights, selected_weights;
    std::vector<uint64_t> token_ranks;
    int32_t rows_received = -1, tokens_sent = -1;
    uint32_t num_combines = 0;

    Round(uint32_t number, uint32_t rank, std::minstd_rand& random);
    bool selects(uint32_t token, uint32_t expert) const {
        const int32_t* of_token = &ids[token * kTopk];
        return std::find(of_token, of_token + kTopk, int32_t(expert)) != of_token + kTopk;
    }
};

inline uint32_t choose_rows(uint32_t number, uint32_t rank, uint32_t random) {
    if (number % 5 < kFirstOneWay) return random % 3 == 0 ? 0 : random / 3 % (kMaxTokens + 1);
    return number / 5 % kRanks == rank ? kMaxTokens - random % 3 : 0;
}

inline Round::Round(uint32_t number, uint32_t rank, std::minstd_rand& random)
    : num_combines(kCombinesOfRound[number % 5]) {
    const auto below = [&](uint32_t limit) { return uint32_t(random() >> 8) % limit; };
    rows = choose_rows(number, rank, below(1 << 16));
    counted_on_device = number % 5 < kFirstOneWay && below(2);
    tokens = int32_t(counted_on_device ? below(rows + 1) : rows);
    wide = below(2);
    // Exactly as long as the kernels may read and write, so that an access beyond is one that AddressSanitizer sees.
    x.resize(rows * kHidden);
    ids.resize(rows * kTopk);
    weights.resize(rows * kTopk);
    for (Bf16& element : x) element = narrowed((float(below(63)) - 31) / 8);
    for (float& weight : weights) weight = float(below(1000)) / 999;
    for (uint32_t i = 0; i < ids.size(); ++i) {
        ids[i] = int32_t(below(kExperts + 2)) - 2;
        if (ids[i] < -1) ids[i] = i % kTopk ? ids[i - 1] : -1;  // the same expert twice
    }
    if (wide) wide_ids.assign(ids.begin(), ids.end());
    out.assign(kMaxLocalExperts * kExpertRows * kHidden, kNan);
    y = out;
    for (auto& result : combined) result.assign(rows * kHidden, kNan);
    counts.assign(kMaxLocalExperts, -1);
    ranges.assign(kMaxLocalExperts * kRanks * 2, -1);
    row_tokens.assign(kMaxLocalExperts * kExpertRows, -1);
    row_origin.assign((kRanks - 1) * kMaxTokens, -1);
    row_slots.assign(kExpertRows * kTopk, -1);
    row_weights.assign(kExpertRows * kTopk, NAN);
    token_ranks.assign(kMaxTokens, ~0ull);
    selected_ranks.assign(kMaxTokens * kTopk, -2);
    selected_weights.assign(kMaxTokens * kTopk, NAN);
}

// As moegen.reference.combine: each remote partial sum and the result are rounded to bf16 once, and all additions are
// fp32, at most kTopk + kRanks of them.
inline bool is_near(const Round& round, uint32_t owner, uint32_t token, uint32_t column, Bf16 got) {
    double partials[kRanks] = {}, magnitude = 0, exact = 0, rounded = 0;
    const double x = widened(round.x[token * kHidden + column]);
    for (uint32_t at = token * kTopk; at < (token + 1) * kTopk; ++at) {
        if (round.ids[at] < 0) continue;
        const uint32_t expert = uint32_t(round.ids[at]);
        const double term = double(round.weights[at]) * factor_of(expert) * x;
        partials[rank_of(expert)] += term;
        magnitude += std::abs(term);
    }
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
        exact += partials[rank];
        if (rank != owner) rounded += std::abs(partials[rank]);
    }
    const double bound = std::ldexp(rounded + std::abs(exact), -8) + std::ldexp(magnitude * (kTopk + kRanks), -24);
    return std::abs(widened(got) - exact) <= bound * (1 + 0x1p-6) + 0x1p-133;  // false for NaN
}
