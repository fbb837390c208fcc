// SPDX-License-Identifier: Apache-2.0
// What a rank gives to one dispatch, and what is right, for all families.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <shape.hpp>
#include <vector>

constexpr uint32_t kMaxLocalExperts = (kExperts + kRanks - 1) / kRanks;
// Rows that come back order the ranks too. In the last three rounds of each five only one rank has tokens, and there
// its dispatches, and then the combines of the others, rest on `consumed` alone. There are three of either in a row:
// what is written was read one or two epochs ago.
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

inline bool is_one_way(uint32_t round) { return round % 5 >= kFirstOneWay; }

// Exactly as long as the kernels may read, so that an access beyond is one that AddressSanitizer sees.
struct Inputs {
    uint32_t rows = 0;  // of the token tensor
    int32_t tokens = 0;
    bool counted_on_device = false, wide = false;
    std::vector<Bf16> x;
    std::vector<int32_t> ids;
    std::vector<int64_t> wide_ids;
    std::vector<float> weights;

    Inputs(uint32_t of_tensor, bool may_count_on_device, std::minstd_rand& random);
    bool selects(uint32_t token, uint32_t expert) const {
        const int32_t* of_token = &ids[token * kTopk];
        return std::find(of_token, of_token + kTopk, int32_t(expert)) != of_token + kTopk;
    }
    bool goes_to(uint32_t token, uint32_t rank) const {
        const int32_t* of_token = &ids[token * kTopk];
        return std::any_of(of_token, of_token + kTopk, [=](int32_t id) { return id >= 0 && rank_of(id) == rank; });
    }
    const void* any_ids() const { return wide ? static_cast<const void*>(wide_ids.data()) : ids.data(); }
};

inline Inputs::Inputs(uint32_t of_tensor, bool may_count_on_device, std::minstd_rand& random) : rows(of_tensor) {
    const auto below = [&](uint32_t limit) { return uint32_t(random() >> 8) % limit; };
    counted_on_device = may_count_on_device && below(2);
    tokens = int32_t(counted_on_device ? below(rows + 1) : rows);
    wide = below(2);
    x.resize(rows * kHidden);
    ids.resize(rows * kTopk);
    weights.resize(rows * kTopk);
    for (Bf16& element : x) element = narrowed((float(below(31)) - 15) / 8);  // which e4m3 holds too
    for (float& weight : weights) weight = float(below(1000)) / 999;
    for (uint32_t i = 0; i < ids.size(); ++i) {
        ids[i] = int32_t(below(kExperts + 2)) - 2;
        if (ids[i] < -1) ids[i] = i % kTopk ? ids[i - 1] : -1;  // the same expert twice
    }
    if (wide) wide_ids.assign(ids.begin(), ids.end());
}

// What makes up one element of a token: of each rank its sum, and how large all terms are together.
struct Partials {
    double of_rank[kRanks] = {}, magnitude = 0;

    void add(uint32_t rank, double term) {
        of_rank[rank] += term;
        magnitude += std::abs(term);
    }
};

// As moegen.reference.combine: each remote partial sum and the result are rounded to bf16 once, and all additions are
// fp32, at most kTopk + kRanks of them.
inline bool is_near(const Partials& partials, uint32_t owner, Bf16 got) {
    double exact = 0, rounded = 0;
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
        exact += partials.of_rank[rank];
        if (rank != owner) rounded += std::abs(partials.of_rank[rank]);
    }
    const double additions = kTopk + kRanks;
    const double bound = std::ldexp(rounded + std::abs(exact), -8) + std::ldexp(partials.magnitude * additions, -24);
    return std::abs(widened(got) - exact) <= bound * (1 + 0x1p-6) + 0x1p-133;  // false for NaN
}
