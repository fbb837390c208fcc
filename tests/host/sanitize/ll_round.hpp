// SPDX-License-Identifier: Apache-2.0
// What the ranks of ll_driver.cpp are given, what they get, and what is right.
#pragma once

#include "inputs.hpp"

// The tokens that a rank may have in a round: fewer in every third one, so that rows do not lie where those of the
// rounds before lay in results, and do in the receive buffers.
inline uint32_t most_tokens(uint32_t number) { return number % 3 == 2 ? kMaxTokens - 2 : kMaxTokens; }

// One dispatch of one rank and the combines that follow it: what goes in, and what has come out.
struct Round : Inputs {
    uint32_t max_tokens, expert_rows;
    std::vector<Bf16> out, y, combined[3];
    std::vector<int32_t> counts, ranges, row_tokens, row_origin, row_slots, selected_ranks;
    std::vector<float> row_weights, selected_weights;
    std::vector<uint64_t> token_ranks;
    int32_t first_rows[kRanks + 1], tokens_sent = -1;
    uint32_t num_combines = 0;

    Round(uint32_t number, uint32_t rank, std::minstd_rand& random);
};

inline uint32_t choose_rows(uint32_t number, uint32_t rank, uint32_t random) {
    if (!is_one_way(number)) return random % 3 == 0 ? 0 : random / 3 % (most_tokens(number) + 1);
    return number / 5 % kRanks == rank ? most_tokens(number) - random % 3 : 0;
}

inline Round::Round(uint32_t number, uint32_t rank, std::minstd_rand& random)
    : Inputs(choose_rows(number, rank, uint32_t(random() >> 8)), !is_one_way(number), random),
      max_tokens(most_tokens(number)),
      expert_rows(kRanks * max_tokens),
      num_combines(kCombinesOfRound[number % 5]) {
    // As long as the kernels may write: see Inputs.
    out.assign(kMaxLocalExperts * expert_rows * kHidden, kNan);
    y = out;
    for (auto& result : combined) result.assign(rows * kHidden, kNan);
    counts.assign(kMaxLocalExperts, -1);
    ranges.assign(kMaxLocalExperts * kRanks * 2, -1);
    row_tokens.assign(kMaxLocalExperts * expert_rows, -1);
    row_origin.assign((kRanks - 1) * max_tokens, -1);
    row_slots.assign(expert_rows * kTopk, -1);
    row_weights.assign(expert_rows * kTopk, NAN);
    token_ranks.assign(max_tokens, ~0ull);
    selected_ranks.assign(max_tokens * kTopk, -2);
    selected_weights.assign(max_tokens * kTopk, NAN);
}

inline bool is_right_sum(const Round& round, uint32_t owner, uint32_t token, uint32_t column, Bf16 got) {
    Partials partials;
    const double x = widened(round.x[token * kHidden + column]);
    for (uint32_t at = token * kTopk; at < (token + 1) * kTopk; ++at) {
        if (round.ids[at] < 0) continue;
        const uint32_t expert = uint32_t(round.ids[at]);
        partials.add(rank_of(expert), double(round.weights[at]) * factor_of(expert) * x);
    }
    return is_near(partials, owner, got);
}
