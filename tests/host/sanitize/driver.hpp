// SPDX-License-Identifier: Apache-2.0
// How every driver begins and ends: its ranks' threads, its arguments and its exit status.
#pragma once

#include <atomic>
#include <string_view>

#include "rank.hpp"

template <typename Work>
void in_threads(uint32_t number, Work work) {
    std::vector<std::thread> threads;
    for (uint32_t rank = 0; rank < number; ++rank) threads.emplace_back(work, rank);
    for (std::thread& thread : threads) thread.join();
}

// The last rank stays away. Whether each of the others, in `work`, reports it.
template <typename Rank, typename Work>
bool report_last(std::vector<Rank>& ranks, Work work) {
    std::atomic<bool> failed = false;
    in_threads(2 * (kRanks - 1), [&](uint32_t thread) {
        Rank& rank = ranks[thread / 2];
        if (thread % 2 == 0) {
            work(rank);
        } else if (!await_report(rank)) {
            failed = true;
        }
    });
    return !failed;
}

// `fits`: whether a variant's kernels take the structs that this driver fills in.
template <typename Ranks, typename Variant, std::size_t number>
int run_driver(int count, char** arguments, const Variant (&variants)[number], bool (*fits)(const Variant&)) {
    const bool absent = count == 5 && std::strcmp(arguments[4], "absent") == 0;
    const Variant* variant = nullptr;
    for (const Variant& one : variants)
        if ((count == 4 || absent) && std::string_view(arguments[1]) == one.name && fits(one)) variant = &one;
    if (variant == nullptr) {
        std::printf("usage: driver VARIANT SEED ROUNDS [absent], with a variant of this executable\n");
        return 2;
    }
    Ranks ranks(*variant, uint32_t(std::atoi(arguments[2])), uint32_t(std::atoi(arguments[3])));
    if (absent) return ranks.run_without_last() ? 0 : 1;
    if (!ranks.run()) return 2;
    return ranks.verify() ? 0 : 1;
}
