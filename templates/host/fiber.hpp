// SPDX-License-Identifier: Apache-2.0
// Stacks and the switch between them, with the notes that sanitizers need.
#pragma once

#include <cstddef>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define MOEGEN_HOST_ASAN 1
#else
#define MOEGEN_HOST_ASAN 0
#endif
// Set by hand: the runtime itself is not compiled with -fsanitize=thread, because its own lists are shared by fibers
// of one OS thread, among which only what CUDA orders counts as ordered.
#if !defined(MOEGEN_HOST_TSAN)
#define MOEGEN_HOST_TSAN 0
#endif

namespace moegen::host {

constexpr std::size_t kStackBytes = 64 * 1024;
constexpr std::size_t kSanitizedStackBytes = 256 * 1024;  // red zones and shadow frames take their room

// Stacks with a guard page below each, kept for later launches.
class Stacks {
  public:
    static constexpr std::size_t kBytes = MOEGEN_HOST_ASAN || MOEGEN_HOST_TSAN ? kSanitizedStackBytes : kStackBytes;

    Stacks() = default;
    Stacks(const Stacks&) = delete;
    ~Stacks();
    // False if the system has no more mappings to give.
    bool reserve(std::size_t count);
    unsigned char* lowest(std::size_t index) const { return lowest_[index]; }

  private:
    std::vector<unsigned char*> lowest_;
};

// A suspended place of execution: a fiber's, or that of the OS thread below the fibers.
struct Context {
    void* stack_pointer = nullptr;
    unsigned char* lowest = nullptr;
    std::size_t bytes = 0;
    void* fake_stack = nullptr;
    void* tsan_fiber = nullptr;
};

using FiberBody = void (*)(void* argument);

// The calling OS thread's own context, before its first switch.
void describe_this_thread(Context& context);
// A context that will call `body(argument)` on the stack; the body never returns. Neighbours differ in `color`.
void prepare_context(Context& context, unsigned char* lowest, std::size_t color, FiberBody body, void* argument);
void discard_context(Context& context);
// `from_ends`: it is never resumed.
void switch_context(Context& from, const Context& to, bool from_ends);
// The first call of a body that runs in a new context.
void enter_context();

// Order for ThreadSanitizer: all before release(x) is seen by who comes after acquire(x).
void tsan_acquire(void* address);
void tsan_release(void* address);
// Runs `work` so that its accesses count as those of `context`.
template <typename Work>
void run_as(const Context& context, Work work);

#if MOEGEN_HOST_TSAN
void* tsan_become(void* fiber);
#endif

template <typename Work>
void run_as([[maybe_unused]] const Context& context, Work work) {
#if MOEGEN_HOST_TSAN
    void* self = tsan_become(context.tsan_fiber);
    work();
    tsan_become(self);
#else
    work();
#endif
}

}  // namespace moegen::host
