// SPDX-License-Identifier: Apache-2.0
// What kernels, their entry points and callers see of the CPU runtime. No standard header is included, here or in
// anything a kernel includes: on the GPU uint64_t is `unsigned long long`, and the fixed-width types of the C library
// are not.
#pragma once

// ---- the C interface ----------------------------------------------------------------------------

extern "C" {

// A launch that its caller left before its end.
struct moegen_host_running;

// One launch. All fields are input.
struct moegen_host_launch {
    const void* params;       // the kernel's Params; read until the grid is done
    unsigned grid;            // blocks, 1..256: every block is an OS thread and all run at once
    unsigned block;           // threads of a block, 1..1024
    unsigned shared_bytes;    // dynamic shared memory, at most 232,448 (227 KiB, what an H100 grants)
    unsigned wait_ms;         // 0: the call returns when the grid is done
    unsigned long long seed;  // 0: fixed order, no pauses; else: seeded order, early bulk copies and pauses
    // Read if wait_ms is not 0: null until the call has returned 2, and again once the grid is done.
    moegen_host_running** running;
};

// The entry of a kernel library. Returns when the grid is done: 0, or 1 with a text in `error` (cut to
// `error_bytes`, always terminated). Or 2 after `wait_ms` milliseconds: then the caller goes on with moegen_host_wait
// until it returns something else.
typedef int moegen_host_entry(const moegen_host_launch* launch, char* error, unsigned long error_bytes);

// What an entry point tells the runtime of its kernel; the last three fields are the runtime's own.
struct moegen_host_kernel {
    void (*thread)(const void* params);
    void* (*shared_anchor)(void);  // address of a thread-local variable of the kernel's library
    int inspected;
    unsigned long anchor_offset;  // where the anchor lies in the library's thread-local memory
    unsigned long static_bytes;   // size of that memory; 0 if it is not the library's alone
};

__attribute__((visibility("default"))) int moegen_host_run(moegen_host_kernel* kernel, const moegen_host_launch* launch,
                                                           char* error, unsigned long error_bytes);

// Waits for so many milliseconds, 1 at least; returns what the entry returns.
__attribute__((visibility("default"))) int moegen_host_wait(moegen_host_running* running, unsigned wait_ms, char* error,
                                                            unsigned long error_bytes);

// Ends the launch as a failed one, at the next switch between its threads; it is then to be waited for.
__attribute__((visibility("default"))) void moegen_host_stop(moegen_host_running* running);
}

// ---- what kernels call --------------------------------------------------------------------------

#pragma GCC visibility push(default)
namespace moegen::host {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

struct BlockView {
    Index index, size, grid;
    unsigned char* dynamic_shared = nullptr;
    unsigned long long seed = 0;
};

struct FiberView {
    Index thread;
    const BlockView* block = nullptr;
    unsigned long long stores = 0;  // a thread that stored since its last poll is not idle
};

// The CUDA thread that this OS thread is executing. initial-exec spares kernels a call per access; the 8 bytes fit
// the room that the C library keeps for libraries loaded later.
extern constinit thread_local FiberView* current_fiber __attribute__((tls_model("initial-exec")));

// Where a call stands in the kernel; as a default argument it is the caller's place.
struct Place {
    const char* file;
    int line;
    constexpr Place(const char* called_file = __builtin_FILE(), int called_line = __builtin_LINE())
        : file(called_file), line(called_line) {}
};

// Ends the launch with this text. Never returns to the kernel.
[[noreturn]] void fail(const char* text, Place place);

enum class Vote : unsigned char { none, any, all, count };
unsigned block_barrier(Vote vote, int predicate, Place place);
void named_barrier(unsigned id, unsigned threads, Place place);

enum class Collective : unsigned char {
    sync,
    shuffle,
    ballot,
    any,
    all,
    match_any,
    match_all,
    add,
    min_signed,
    max_signed,
    min_unsigned,
    max_unsigned,
    bit_and,
    bit_or,
    bit_xor,
};
// `source` is the lane that a shuffle reads. What lanes outside the mask would deliver is a poison pattern.
unsigned long long collective(Collective operation, unsigned mask, unsigned long long value, unsigned source,
                              Place place);

// After a load that may be a poll: tells waiting from progress, and whether the load acquired.
void note_load(const void* address, unsigned long long value, bool acquired, Place place);
// Where the order among threads is free: with a seed, another fiber may run here, and stores may be delayed.
void may_switch();
void may_pause(unsigned one_in);
inline void switch_point() {
    if (current_fiber->block->seed != 0) [[unlikely]]
        may_switch();
}
inline void pause_point(unsigned one_in) {
    if (current_fiber->block->seed != 0) [[unlikely]]
        may_pause(one_in);
}
void poll_pause();
unsigned long long clock_ns();

void fence_proxy();
void mbarrier_init(unsigned long long* word, unsigned arrivals, Place place);
void mbarrier_arrive(unsigned long long* word, unsigned bytes, Place place);
bool mbarrier_test(unsigned long long* word, unsigned parity, Place place);
void bulk_load(void* shared, const void* global, unsigned bytes, unsigned long long* word, Place place);
void bulk_store(void* global, const void* shared, unsigned bytes, Place place);
void bulk_commit();
void bulk_wait(unsigned pending, bool only_reads);

// Whether 16-byte vector loads and stores are single accesses on this CPU (x86-64: AVX, aarch64: LSE2).
extern const bool has_whole_accesses;

}  // namespace moegen::host
#pragma GCC visibility pop
