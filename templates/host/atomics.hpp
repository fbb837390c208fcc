// SPDX-License-Identifier: Apache-2.0
// CUDA's atomic functions: relaxed, as on the GPU. Included by cuda.hpp only.
#pragma once

namespace moegen::host {

template <typename T, typename Change>
__forceinline__ T atomic_change(T* address, Change change) {
    switch_point();
    T before;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    for (;;) {
        T after = change(before);
        if (__atomic_compare_exchange(address, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return before;
    }
}

}  // namespace moegen::host

#define MOEGEN_HOST_ATOMIC(name, type, builtin)            \
    __forceinline__ type name(type* address, type value) { \
        moegen::host::switch_point();                      \
        return builtin(address, value, __ATOMIC_RELAXED);  \
    }
#define MOEGEN_HOST_ATOMIC_CHANGE(name, type, expression)                                                 \
    __forceinline__ type name(type* address, type value) {                                                \
        return moegen::host::atomic_change(address, [value](type before) -> type { return expression; }); \
    }
#define MOEGEN_HOST_ATOMIC_CAS(type)                                                                         \
    __forceinline__ type atomicCAS(type* address, type expected, type desired) {                             \
        moegen::host::switch_point();                                                                        \
        __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); \
        return expected;                                                                                     \
    }
#define MOEGEN_HOST_ATOMIC_WORD(type)                                           \
    MOEGEN_HOST_ATOMIC(atomicAdd, type, __atomic_fetch_add)                     \
    MOEGEN_HOST_ATOMIC(atomicAnd, type, __atomic_fetch_and)                     \
    MOEGEN_HOST_ATOMIC(atomicOr, type, __atomic_fetch_or)                       \
    MOEGEN_HOST_ATOMIC(atomicXor, type, __atomic_fetch_xor)                     \
    MOEGEN_HOST_ATOMIC(atomicExch, type, __atomic_exchange_n)                   \
    MOEGEN_HOST_ATOMIC_CHANGE(atomicMin, type, before < value ? before : value) \
    MOEGEN_HOST_ATOMIC_CHANGE(atomicMax, type, before > value ? before : value) \
    MOEGEN_HOST_ATOMIC_CAS(type)

MOEGEN_HOST_ATOMIC_WORD(int)
MOEGEN_HOST_ATOMIC_WORD(unsigned)
MOEGEN_HOST_ATOMIC_WORD(unsigned long long)
MOEGEN_HOST_ATOMIC(atomicSub, int, __atomic_fetch_sub)
MOEGEN_HOST_ATOMIC(atomicSub, unsigned, __atomic_fetch_sub)
MOEGEN_HOST_ATOMIC_CHANGE(atomicAdd, float, before + value)
MOEGEN_HOST_ATOMIC_CHANGE(atomicExch, float, (void(before), value))
MOEGEN_HOST_ATOMIC_CHANGE(atomicInc, unsigned, before >= value ? 0 : before + 1)
MOEGEN_HOST_ATOMIC_CHANGE(atomicDec, unsigned, before == 0 || before > value ? value : before - 1)

#undef MOEGEN_HOST_ATOMIC_WORD
#undef MOEGEN_HOST_ATOMIC_CAS
#undef MOEGEN_HOST_ATOMIC_CHANGE
#undef MOEGEN_HOST_ATOMIC
