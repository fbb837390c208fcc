// SPDX-License-Identifier: Apache-2.0
// 16-byte accesses that are never seen in halves, not even by another process (so no lock may stand in for them).
// x86-64: Intel (SDM vol. 3, 9.1.1) and AMD (APM vol. 2, 7.3.2) promise it for aligned 16-byte vector accesses on CPUs
// with AVX. aarch64: LDP and STP of an aligned pair with LSE2; before that only an exclusive pair, which writes.
#pragma once

#include <moegen/simt.hpp>

namespace moegen::host {

struct alignas(16) Whole {
    unsigned long long low, high;
};

#if defined(__SANITIZE_THREAD__)

extern "C" unsigned __int128 __tsan_atomic128_load(const volatile unsigned __int128* address, int order);
extern "C" void __tsan_atomic128_store(volatile unsigned __int128* address, unsigned __int128 value, int order);

inline Whole load_whole(const Whole* address) {
    const auto* word = reinterpret_cast<const volatile unsigned __int128*>(address);
    return __builtin_bit_cast(Whole, __tsan_atomic128_load(word, __ATOMIC_RELAXED));
}

inline void store_whole(Whole* address, Whole value) {
    auto* word = reinterpret_cast<volatile unsigned __int128*>(address);
    __tsan_atomic128_store(word, __builtin_bit_cast(unsigned __int128, value), __ATOMIC_RELAXED);
}

#else

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_load16(unsigned long address);
extern "C" void __asan_store16(unsigned long address);
inline void check_load(const void* address) { __asan_load16(reinterpret_cast<unsigned long>(address)); }
inline void check_store(const void* address) { __asan_store16(reinterpret_cast<unsigned long>(address)); }
#else
inline void check_load(const void*) {}
inline void check_store(const void*) {}
#endif

#if defined(__x86_64__)

typedef long long Vector __attribute__((vector_size(16)));

inline Whole load_whole(const Whole* address) {
    check_load(address);
    Vector value;
    asm volatile("movdqa %1, %0" : "=x"(value) : "m"(*address) : "memory");
    return __builtin_bit_cast(Whole, value);
}

inline void store_whole(Whole* address, Whole value) {
    check_store(address);
    asm volatile("movdqa %1, %0" : "=m"(*address) : "x"(__builtin_bit_cast(Vector, value)) : "memory");
}

#elif defined(__aarch64__)

inline Whole load_whole(const Whole* address) {
    check_load(address);
    Whole value;
    if (has_whole_accesses) {
        asm volatile("ldp %0, %1, [%2]" : "=r"(value.low), "=r"(value.high) : "r"(address) : "memory");
        return value;
    }
    unsigned failed;
    do {
        asm volatile("ldxp %0, %1, [%3]\n\tstxp %w2, %0, %1, [%3]"
                     : "=&r"(value.low), "=&r"(value.high), "=&r"(failed)
                     : "r"(address)
                     : "memory");
    } while (failed);
    return value;
}

inline void store_whole(Whole* address, Whole value) {
    check_store(address);
    if (has_whole_accesses) {
        asm volatile("stp %0, %1, [%2]" ::"r"(value.low), "r"(value.high), "r"(address) : "memory");
        return;
    }
    unsigned long long low, high;
    unsigned failed;
    do {
        asm volatile("ldxp %0, %1, [%3]\n\tstxp %w2, %4, %5, [%3]"
                     : "=&r"(low), "=&r"(high), "=&r"(failed)
                     : "r"(address), "r"(value.low), "r"(value.high)
                     : "memory");
    } while (failed);
}

#else
#error "moegen's host target knows x86-64 and aarch64"
#endif
#endif

}  // namespace moegen::host
