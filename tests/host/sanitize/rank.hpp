// SPDX-License-Identifier: Apache-2.0
// What a virtual rank of any family has, and how it launches kernels.
#pragma once

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <moegen/simt.hpp>
#include <thread>

#include "inputs.hpp"

// struct Control and struct Failure of signal.cuh, which a file with standard headers cannot include.
struct alignas(128) Control {
    uint32_t epoch, rest[31];
};
struct alignas(128) Failure {
    uint32_t words[32];
};
// As in the kernels: the blocks of a launch that send, and those that receive.
struct Blocks {
    uint32_t first, blocks;
};

constexpr uint32_t kFirstEpoch = 0xfffffffa;  // wraps after 6 launches
constexpr uint64_t kTimeoutNs = 60'000'000'000, kAbsentTimeoutNs = 500'000'000;

// Dispatch has the first control and failure, combine the second.
struct RankState {
    uint32_t number = 0;
    std::unique_ptr<uint8_t, decltype(&std::free)> memory = {nullptr, std::free};
    Control control[2] = {};
    uint32_t aborted = 0;
    Failure failure[2] = {};
    std::minstd_rand random;

    void prepare(uint32_t rank, uint32_t seed, uint64_t bytes, std::initializer_list<uint64_t> consumed_offsets) {
        number = rank;
        random.seed(seed * kRanks + rank + 1);
        memory.reset(static_cast<uint8_t*>(std::aligned_alloc(256, bytes)));
        std::memset(memory.get(), 0, bytes);
        for (Control& of_op : control) of_op.epoch = kFirstEpoch;
        for (const uint64_t offset : consumed_offsets) {
            auto* words = reinterpret_cast<uint32_t*>(memory.get() + offset);
            std::fill(words, words + kRanks, kFirstEpoch - 1);
        }
    }
};

// Sometimes after a pause. Whether it succeeded.
inline bool launched(RankState& rank, moegen_host_entry* entry, const void* params, uint32_t blocks, uint32_t threads,
                     bool seeded, uint32_t shared_bytes = 0) {
    if (rank.random() / 256 % 2) std::this_thread::sleep_for(std::chrono::microseconds(rank.random() / 256 % 300));
    char error[4000];
    const uint64_t seed = seeded ? rank.random() : 0;
    const moegen_host_launch request = {params, blocks, threads, shared_bytes, 0, seed, nullptr};
    if (entry(&request, error, sizeof error) == 0) return true;
    std::printf("rank %u: %s\n", rank.number, error);
    return false;
}

// The host reads a report while the launch is still under way. Whether it is of this rank and another one.
inline bool await_report(const RankState& rank) {
    const uint32_t* words = rank.failure[0].words;  // valid, phase, rank, peer, ...
    while (__atomic_load_n(&words[0], __ATOMIC_ACQUIRE) == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return words[2] == rank.number && words[3] != rank.number && words[3] < kRanks;
}

inline bool wrong(const char* what, const RankState& rank, uint32_t round, uint32_t index) {
    std::printf("rank %u, round %u: wrong %s %u\n", rank.number, round, what, index);
    return false;
}

inline bool was_silent(const RankState& rank) {
    for (uint32_t op = 0; op < 2; ++op) {
        for (const uint32_t word : rank.failure[op].words)
            if (word != 0) return wrong("silence of op", rank, 0, op);
    }
    return true;
}
