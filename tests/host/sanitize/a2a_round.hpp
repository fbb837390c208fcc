// SPDX-License-Identifier: Apache-2.0
// What the ranks of a2a_driver.cpp are given, what they get, and what is right.
#pragma once

#include <array>

#include "inputs.hpp"

// Bytes of several rows of each payload.
using Payloads = std::array<std::vector<uint8_t>, kPayloads>;

constexpr int32_t kUnusedId = -7;

// One dispatch of one rank, what its user has read of it, and the combines that follow. As long as the kernels may
// read and write: see Inputs.
struct Round : Inputs {
    uint32_t slots;
    const uint64_t* planes;
    bool fills_ids, gathers;
    uint32_t num_combines;
    Payloads sent, received;
    std::vector<int32_t> stats, gathered, token_slots, counts;
    std::vector<uint64_t> token_ranks;
    int32_t tokens_sent = -1;
    std::vector<Bf16> y;
    std::vector<uint8_t> combined[3];

    Round(uint32_t number, uint32_t rank, uint32_t out_bytes, bool pulls, std::minstd_rand& random);
    void read(const uint8_t* memory);
    void run_experts(uint32_t rank);
};

// In the first of each five rounds one rank's blocks plan more than once.
inline uint32_t choose_rows(uint32_t number, uint32_t rank, uint32_t random) {
    const bool chosen = number / 5 % kRanks == rank;
    if (chosen && number % 5 == 0) return kMaxTokens - random % 2;
    if (!is_one_way(number)) return random % 3 == 0 ? 0 : random / 3 % (kFewTokens + 1);
    return chosen ? kFewTokens - random % 3 : 0;
}

inline int32_t stat_of(uint32_t number, uint32_t rank, uint32_t word) {
    return int32_t(number * 1000 + rank * 100 + word + 1);
}

// Rows that are pulled are written once in five rounds. One dispatch is enough by the protocol: from each rank numbers
// have come, which it tells when it has read the rows. But these are relaxed atomics, which for ThreadSanitizer order
// nothing; behind several dispatches `presence` does.
inline Round::Round(uint32_t number, uint32_t rank, uint32_t out_bytes, bool pulls, std::minstd_rand& random)
    : Inputs(choose_rows(number, rank, uint32_t(random() >> 8)), number % 5 == 1, random),
      slots(kLimits[number % 5]),
      planes(kPlanes[number % 5]),
      fills_ids(number % 2 == 0),
      gathers(number % 3 != 1),
      num_combines(pulls && number % 5 != 4 ? 0 : kCombinesOfRound[number % 5]) {
    const auto take = [this](uint32_t payload, const void* from) {
        const auto* bytes = static_cast<const uint8_t*>(from);
        sent[payload].assign(bytes, bytes + rows * kWidths[payload]);
    };
    for (uint32_t payload = 0; payload < kPayloads; ++payload) {
        sent[payload].resize(rows * kWidths[payload]);
        for (uint8_t& byte : sent[payload]) byte = uint8_t(random() >> 8);
        received[payload].assign(kRanks * slots * kWidths[payload], 0);
    }
    take(0, x.data());
    take(kIds, ids.data());
    for (uint32_t word = 0; word < kStatsWords; ++word) stats.push_back(stat_of(number, rank, word));
    gathered.assign(kRanks * kStatsWords, -1);
    token_slots.assign(rows * kDestinations, -1);
    token_ranks.assign(rows, ~0ull);
    counts.assign(kRanks, -1);
    for (auto& result : combined) result.assign(rows * kHidden * out_bytes, 0xff);
}

// Of the receive buffer what a user may read: each source's rows, and where they are filled, the ids behind them.
inline void Round::read(const uint8_t* memory) {
    for (uint32_t source = 0; source < kRanks; ++source) {
        for (uint32_t payload = 0; payload < kPayloads; ++payload) {
            const uint32_t of_source = slots * kWidths[payload] * source;
            const uint32_t number = payload == kIds && fills_ids ? slots : uint32_t(counts[source]);
            std::memcpy(received[payload].data() + of_source, memory + planes[payload] + of_source,
                        number * kWidths[payload]);
        }
    }
}

// Rows that no token came to stay NaN: a sum that one of them enters is found. A rank has one factor.
inline void Round::run_experts(uint32_t rank) {
    y.assign(kRanks * slots * kHidden, kNan);
    for (uint32_t source = 0; source < kRanks; ++source) {
        const uint32_t first = source * slots * kHidden;
        for (uint32_t at = first; at < first + uint32_t(counts[source]) * kHidden; ++at) {
            Bf16 element;
            std::memcpy(&element, &received[0][at * sizeof(Bf16)], sizeof element);
            y[at] = narrowed(widened(element) * factor_of(rank));
        }
    }
}

// Sums of so few and so small terms are exact, whatever they are rounded to.
inline bool is_right_sum(const Round& round, uint32_t token, uint32_t column, const uint8_t* got, uint32_t out_bytes) {
    float factors = 0, sum = 0;
    for (uint32_t rank = 0; rank < kRanks; ++rank)
        if (round.goes_to(token, rank)) factors += factor_of(rank);
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<uint8_t*>(&bits) + sizeof bits - out_bytes, got, out_bytes);
    std::memcpy(&sum, &bits, sizeof sum);
    return sum == factors * widened(round.x[token * kHidden + column]);
}
