// SPDX-License-Identifier: Apache-2.0
// What the ranks of ht_driver.cpp are given, what they get, and what is right.
#pragma once

#include "inputs.hpp"

// What dispatch leaves for combine and for further dispatches, as moegen.runtime.row_memory lays it out.
struct Numbers {
    std::vector<uint64_t> token_ranks;
    int32_t tokens_sent = -1;
    std::vector<int32_t> first_rows, row_tokens, row_slots, own_rows, counts, first_slots, source_counts;
    std::vector<float> row_weights;

    Numbers();
};

inline Numbers::Numbers() {
    constexpr uint32_t kRows = kRanks * kMaxTokens;
    token_ranks.assign(kMaxTokens, ~0ull);
    first_rows.assign(kRanks + 1, -1);
    row_tokens.assign(kRows, -1);
    row_slots.assign(kRows * kTopk, -1);
    row_weights.assign(kRows * kTopk, NAN);
    own_rows.assign(kMaxTokens, -1);
    counts.assign(kMaxLocalExperts, -1);
    first_slots.assign(kMaxLocalExperts + 1, -1);
    source_counts.assign(kRanks * (1 + kRanks), -1);
}

// The rows of one dispatch, in bf16 or in e4m3 with one scale each. Exactly as many as the kernels may write.
struct Received {
    uint32_t capacity = 0;
    std::vector<Bf16> rows;
    std::vector<uint8_t> quantised;
    std::vector<float> scales, weights;
    std::vector<int64_t> ids;  // layout token

    void make(uint32_t number, bool packed, bool quantises);
    float value(uint32_t row, uint32_t column) const;
};

inline void Received::make(uint32_t number, bool packed, bool quantises) {
    capacity = number;
    if (quantises) {
        quantised.assign(number * kHidden, 0x7f);
        scales.assign(number, NAN);
    } else {
        rows.assign(number * kHidden, kNan);
    }
    weights.assign(packed ? number : number * kTopk, NAN);
    if (!packed) ids.assign(number * kTopk, -2);
}

inline float from_e4m3(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if ((bits & 0x7f) == 0x7f) return NAN;
    const float magnitude =
        exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10);
    return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

inline float Received::value(uint32_t row, uint32_t column) const {
    const uint32_t at = row * kHidden + column;
    return quantised.empty() ? widened(rows[at]) : from_e4m3(quantised[at]) * scales[row];
}

// A dispatch of one rank, in one launch or planned by one and moved by another; where it repeats, another of other rows
// by the same numbers; and the combines that follow.
struct Round : Inputs {
    bool planned, repeats, weighted;
    uint32_t num_combines;
    Numbers numbers;
    Received received, repeated;
    std::vector<Bf16> x_again, y, combined[3];
    std::vector<float> y_weights, combined_weights[3];

    Round(uint32_t number, uint32_t rank, std::minstd_rand& random);
};

// In the first of each five rounds one rank's tokens are more than one chunk of the plan.
inline uint32_t choose_rows(uint32_t number, uint32_t rank, uint32_t random) {
    const bool chosen = number / 5 % kRanks == rank;
    if (chosen && number % 5 == 0) return kMaxTokens - random % 2;
    if (!is_one_way(number)) return random % 3 == 0 ? 0 : random / 3 % (kFewTokens + 1);
    return chosen ? kFewTokens - random % 3 : 0;
}

// The first five rounds make one launch where ranks rest on `consumed` alone, the next five two. Nothing but 16-byte
// atomics crosses in the one that plans, but its `consumed` orders the ranks: what rows rest on, only a repetition
// right behind them shows.
inline Round::Round(uint32_t number, uint32_t rank, std::minstd_rand& random)
    : Inputs(choose_rows(number, rank, uint32_t(random() >> 8)), number % 5 == 1, random),
      planned((number / 5 + (number % 5 == 1)) % 2 == 1),
      repeats(number % 5 == 1 || (planned && is_one_way(number))),
      weighted(number % 5 != 4),
      num_combines(kCombinesOfRound[number % 5]) {
    x_again = x;
    for (Bf16& element : x_again) element ^= 0x8000;
    for (auto& result : combined) result.assign(rows * kHidden, kNan);
    for (auto& result : combined_weights) result.assign(rows * kTopk, NAN);
}

inline bool is_right_sum(const Round& round, bool packed, uint32_t owner, uint32_t token, uint32_t column, Bf16 got) {
    Partials partials;
    const double x = widened(round.x[token * kHidden + column]);
    for (uint32_t rank = 0; rank < kRanks && !packed; ++rank)
        if (round.goes_to(token, rank)) partials.add(rank, factor_of(rank) * x);
    const int32_t* ids = &round.ids[token * kTopk];
    for (uint32_t k = 0; k < kTopk && packed; ++k) {
        if (ids[k] < 0) continue;
        const bool again = std::find(ids, ids + k, ids[k]) != ids + k;
        const double weight = round.weighted ? double(round.weights[token * kTopk + k]) : again ? 0 : 1;
        partials.add(rank_of(uint32_t(ids[k])), weight * factor_of(uint32_t(ids[k])) * x);
    }
    return is_near(partials, owner, got);
}
