// SPDX-License-Identifier: Apache-2.0
// An executable for sanitizers: argv[1] names a run. Exit status 2: a launch failed; else the sanitizer's own.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <moegen/simt.hpp>
#include <thread>
#include <vector>

extern "C" moegen_host_entry send_messages_launch, receive_messages_launch, neighbours_launch, lanes_launch,
    beyond_the_end_launch, bulk_pipeline_launch, deadlock_launch, all_ranks_meet_launch, write_whole_launch,
    read_whole_launch;

namespace {

struct Params {
    uint32_t* out;
    uint8_t *a, *b;
    uint32_t n, flag;
};

void launch(moegen_host_entry* entry, Params params, unsigned grid, unsigned block, bool may_fail = false) {
    char error[2000];
    const moegen_host_launch request = {&params, grid, block, 2048, 0, 0, nullptr};
    const int failed = entry(&request, error, sizeof error);
    if (failed) std::printf("%s\n", error);
    if (failed && !may_fail) std::exit(2);
}

void both(moegen_host_entry* one, moegen_host_entry* other, Params params, unsigned block) {
    std::thread first([&] { launch(one, params, 1, block); });
    launch(other, params, 1, block);
    first.join();
}

void ranks(Params params) {
    std::vector<std::thread> threads;
    for (uint32_t rank = 0; rank < 4; ++rank)
        threads.emplace_back([params, rank]() mutable {
            params.flag = rank;
            launch(all_ranks_meet_launch, params, 2, 64);
        });
    for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int, char** argv) {
    std::vector<uint32_t> out(256);
    auto* memory = static_cast<uint8_t*>(std::aligned_alloc(128, 1 << 16));
    std::memset(memory, 0, 1 << 16);
    const auto is = [&](const char* name) { return std::strcmp(argv[1], name) == 0; };
    Params params = {out.data(), memory, memory + (1 << 15), 20, std::strstr(argv[1], "wrong") != nullptr};
    if (is("messages") || is("messages_wrong")) both(send_messages_launch, receive_messages_launch, params, 32);
    if (is("whole")) both(write_whole_launch, read_whole_launch, params, 1);
    if (is("whole") && out[1] != 0) return 3;
    if (is("neighbours") || is("neighbours_wrong")) launch(neighbours_launch, params, 1, 64);
    if (is("lanes") || is("lanes_wrong")) launch(lanes_launch, params, 1, 64);
    if (is("bulk")) launch(bulk_pipeline_launch, params, 1, 64);
    if (is("ranks")) ranks(params);
    if (is("deadlock")) {
        launch(deadlock_launch, params, 2, 128, true);
        launch(neighbours_launch, params, 1, 64);
    }
    params.n = 256;
    if (is("beyond_wrong")) launch(beyond_the_end_launch, params, 1, 32);
    std::free(memory);
}
