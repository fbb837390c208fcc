// SPDX-License-Identifier: Apache-2.0
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <moegen/fiber.hpp>

#if MOEGEN_HOST_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if MOEGEN_HOST_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

// ---- the switch ---------------------------------------------------------------------------------
// void moegen_host_switch(void** saved_stack_pointer, void* next_stack_pointer)
// Keeps what the platform's ABI calls callee-saved, the floating-point control words among it.

extern "C" void moegen_host_switch(void** saved_stack_pointer, void* next_stack_pointer);
extern "C" void moegen_host_fiber_start();

#if defined(__x86_64__)

asm(R"(
    .text
    .p2align 4
    .globl moegen_host_switch
    .hidden moegen_host_switch
    .type moegen_host_switch, @function
moegen_host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    stmxcsr (%rsp)
    fnstcw 4(%rsp)
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    ldmxcsr (%rsp)
    fldcw 4(%rsp)
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size moegen_host_switch, .-moegen_host_switch

    .p2align 4
    .globl moegen_host_fiber_start
    .hidden moegen_host_fiber_start
    .type moegen_host_fiber_start, @function
moegen_host_fiber_start:
    .cfi_startproc
    .cfi_undefined %rip
    movq %r13, %rdi
    callq *%r12
    ud2
    .cfi_endproc
    .size moegen_host_fiber_start, .-moegen_host_fiber_start
)");

namespace {

struct Frame {  // what moegen_host_switch pops, from the lowest address up
    uint32_t mxcsr, x87_control;
    void *r15, *r14, *r13, *r12, *rbx, *rbp;
    void (*return_to)();
    void* padding[2];  // keeps the stack pointer 16-byte aligned where moegen_host_fiber_start begins
};
static_assert(sizeof(Frame) % 16 == 0);

void fill(Frame& frame, moegen::host::FiberBody body, void* argument) {
    asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(frame.mxcsr), "=m"(frame.x87_control));
    frame.r12 = reinterpret_cast<void*>(body);
    frame.r13 = argument;
    frame.return_to = moegen_host_fiber_start;
}

}  // namespace

#elif defined(__aarch64__)

asm(R"(
    .text
    .p2align 4
    .globl moegen_host_switch
    .hidden moegen_host_switch
    .type moegen_host_switch, %function
moegen_host_switch:
    sub sp, sp, #176
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mrs x9, fpcr
    str x9, [sp, #160]
    mov x10, sp
    str x10, [x0]
    mov sp, x1
    ldr x9, [sp, #160]
    msr fpcr, x9
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #176
    ret
    .size moegen_host_switch, .-moegen_host_switch

    .p2align 4
    .globl moegen_host_fiber_start
    .hidden moegen_host_fiber_start
    .type moegen_host_fiber_start, %function
moegen_host_fiber_start:
    .cfi_startproc
    .cfi_undefined x30
    mov x0, x20
    blr x19
    brk #1
    .cfi_endproc
    .size moegen_host_fiber_start, .-moegen_host_fiber_start
)");

namespace {

struct Frame {
    void *x19, *x20, *x21_to_x29[9];
    void (*return_to)();
    uint64_t d8_to_d15[8];
    uint64_t fpcr, padding;
};
static_assert(sizeof(Frame) == 176);

void fill(Frame& frame, moegen::host::FiberBody body, void* argument) {
    asm volatile("mrs %0, fpcr" : "=r"(frame.fpcr));
    frame.x19 = reinterpret_cast<void*>(body);
    frame.x20 = argument;
    frame.return_to = moegen_host_fiber_start;
}

}  // namespace

#else
#error "moegen's host target knows x86-64 and aarch64"
#endif

namespace moegen::host {

// ---- stacks -------------------------------------------------------------------------------------

namespace {

std::size_t page_bytes() {
    static const std::size_t bytes = std::size_t(sysconf(_SC_PAGESIZE));
    return bytes;
}

}  // namespace

bool Stacks::reserve(std::size_t count) {
    const std::size_t guard = page_bytes();
    while (lowest_.size() < count) {
        void* mapping = mmap(nullptr, guard + kBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
        if (mapping == MAP_FAILED) return false;
        if (mprotect(mapping, guard, PROT_NONE) != 0) {
            munmap(mapping, guard + kBytes);
            return false;
        }
        lowest_.push_back(static_cast<unsigned char*>(mapping) + guard);
    }
    return true;
}

Stacks::~Stacks() {
    for (unsigned char* lowest : lowest_) munmap(lowest - page_bytes(), page_bytes() + kBytes);
}

// ---- contexts -----------------------------------------------------------------------------------

void describe_this_thread(Context& context) {
#if MOEGEN_HOST_ASAN
    pthread_attr_t attributes;
    void* lowest = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &context.bytes);
    pthread_attr_destroy(&attributes);
    context.lowest = static_cast<unsigned char*>(lowest);
#endif
#if MOEGEN_HOST_TSAN
    context.tsan_fiber = __tsan_get_current_fiber();
#endif
    (void)context;
}

void prepare_context(Context& context, unsigned char* lowest, std::size_t color, FiberBody body, void* argument) {
    context.lowest = lowest;
    context.bytes = Stacks::kBytes;
    context.fake_stack = nullptr;
#if MOEGEN_HOST_ASAN
    __asan_unpoison_memory_region(lowest, Stacks::kBytes);  // an abandoned fiber leaves its red zones behind
#endif
#if MOEGEN_HOST_TSAN
    context.tsan_fiber = __tsan_create_fiber(0);
#endif
    // Stacks that all began at one page offset would share a few sets of the first-level cache.
    const std::size_t offset = color % 32 * 128;
    auto* frame = reinterpret_cast<Frame*>(lowest + Stacks::kBytes - offset - sizeof(Frame));
    *frame = Frame{};
    fill(*frame, body, argument);
    context.stack_pointer = frame;
}

void discard_context([[maybe_unused]] Context& context) {
#if MOEGEN_HOST_TSAN
    __tsan_destroy_fiber(context.tsan_fiber);
    context.tsan_fiber = nullptr;
#endif
}

void switch_context(Context& from, const Context& to, [[maybe_unused]] bool from_ends) {
#if MOEGEN_HOST_ASAN
    __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.lowest, to.bytes);
#endif
#if MOEGEN_HOST_TSAN
    constexpr unsigned kNoOrder = 1;
    __tsan_switch_to_fiber(to.tsan_fiber, kNoOrder);
#endif
    moegen_host_switch(&from.stack_pointer, to.stack_pointer);
#if MOEGEN_HOST_ASAN
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void enter_context() {
#if MOEGEN_HOST_ASAN
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

#if MOEGEN_HOST_TSAN
void tsan_acquire(void* address) { __tsan_acquire(address); }
void tsan_release(void* address) { __tsan_release(address); }
void* tsan_become(void* fiber) {
    constexpr unsigned kNoOrder = 1;
    void* self = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(fiber, kNoOrder);
    return self;
}
#else
void tsan_acquire(void*) {}
void tsan_release(void*) {}
#endif

}  // namespace moegen::host
