// SPDX-License-Identifier: Apache-2.0
// CUDA's warp functions. Included by cuda.hpp only.
#pragma once

namespace moegen::host {

template <typename T>
__forceinline__ unsigned long long to_bits(T value) {
    if constexpr (sizeof(T) == 4)
        return __builtin_bit_cast(unsigned, value);
    else
        return __builtin_bit_cast(unsigned long long, value);
}

template <typename T>
__forceinline__ T from_bits(unsigned long long bits) {
    if constexpr (sizeof(T) == 4)
        return __builtin_bit_cast(T, unsigned(bits));
    else
        return __builtin_bit_cast(T, bits);
}

__forceinline__ unsigned lane() { return threadIdx.x % 32; }

// The lane that a shuffle reads within segments of `width` lanes; the caller's own where that leaves the segment.
__forceinline__ unsigned lane_of(unsigned source, unsigned width) {
    return (lane() & ~(width - 1)) | (source & (width - 1));
}
__forceinline__ unsigned lane_below(unsigned delta, unsigned width) {
    return (lane() & (width - 1)) < delta ? lane() : lane() - delta;
}
__forceinline__ unsigned lane_above(unsigned delta, unsigned width) {
    return delta >= width - (lane() & (width - 1)) ? lane() : lane() + delta;
}
__forceinline__ unsigned lane_across(unsigned bits, unsigned width) {
    const unsigned source = lane() ^ bits;
    return source > (lane() | (width - 1)) ? lane() : source;
}

template <typename T>
__forceinline__ T shuffle(unsigned mask, T value, unsigned source, int width, Place place) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) [[unlikely]]
        fail("shuffle width is not a power of two from 1 to 32", place);
    return from_bits<T>(collective(Collective::shuffle, mask, to_bits(value), source, place));
}

}  // namespace moegen::host

#define MOEGEN_HOST_SHUFFLES(type)                                                                       \
    __forceinline__ type __shfl_sync(unsigned mask, type value, int source, int width = 32,              \
                                     moegen::host::Place place = {}) {                                   \
        return moegen::host::shuffle(mask, value, moegen::host::lane_of(source, width), width, place);   \
    }                                                                                                    \
    __forceinline__ type __shfl_up_sync(unsigned mask, type value, unsigned delta, int width = 32,       \
                                        moegen::host::Place place = {}) {                                \
        return moegen::host::shuffle(mask, value, moegen::host::lane_below(delta, width), width, place); \
    }                                                                                                    \
    __forceinline__ type __shfl_down_sync(unsigned mask, type value, unsigned delta, int width = 32,     \
                                          moegen::host::Place place = {}) {                              \
        return moegen::host::shuffle(mask, value, moegen::host::lane_above(delta, width), width, place); \
    }                                                                                                    \
    __forceinline__ type __shfl_xor_sync(unsigned mask, type value, int bits, int width = 32,            \
                                         moegen::host::Place place = {}) {                               \
        return moegen::host::shuffle(mask, value, moegen::host::lane_across(bits, width), width, place); \
    }

MOEGEN_HOST_SHUFFLES(int)
MOEGEN_HOST_SHUFFLES(unsigned)
MOEGEN_HOST_SHUFFLES(long)
MOEGEN_HOST_SHUFFLES(unsigned long)
MOEGEN_HOST_SHUFFLES(long long)
MOEGEN_HOST_SHUFFLES(unsigned long long)
MOEGEN_HOST_SHUFFLES(float)
MOEGEN_HOST_SHUFFLES(double)
#undef MOEGEN_HOST_SHUFFLES

__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, moegen::host::Place place = {}) {
    moegen::host::collective(moegen::host::Collective::sync, mask, 0, 0, place);
}

// Any set that holds the caller is right on a GPU; the smallest one catches code that assumes more.
__forceinline__ unsigned __activemask() { return 1u << moegen::host::lane(); }

__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate, moegen::host::Place place = {}) {
    return unsigned(moegen::host::collective(moegen::host::Collective::ballot, mask, predicate != 0, 0, place));
}
__forceinline__ int __any_sync(unsigned mask, int predicate, moegen::host::Place place = {}) {
    return int(moegen::host::collective(moegen::host::Collective::any, mask, predicate != 0, 0, place));
}
__forceinline__ int __all_sync(unsigned mask, int predicate, moegen::host::Place place = {}) {
    return int(moegen::host::collective(moegen::host::Collective::all, mask, predicate != 0, 0, place));
}

#define MOEGEN_HOST_MATCHES(type)                                                                                     \
    __forceinline__ unsigned __match_any_sync(unsigned mask, type value, moegen::host::Place place = {}) {            \
        using namespace moegen::host;                                                                                 \
        return unsigned(collective(Collective::match_any, mask, to_bits(value), 0, place));                           \
    }                                                                                                                 \
    __forceinline__ unsigned __match_all_sync(unsigned mask, type value, int* same, moegen::host::Place place = {}) { \
        using namespace moegen::host;                                                                                 \
        const unsigned lanes = unsigned(collective(Collective::match_all, mask, to_bits(value), 0, place));           \
        *same = lanes != 0;                                                                                           \
        return lanes;                                                                                                 \
    }

MOEGEN_HOST_MATCHES(int)
MOEGEN_HOST_MATCHES(unsigned)
MOEGEN_HOST_MATCHES(long)
MOEGEN_HOST_MATCHES(unsigned long)
MOEGEN_HOST_MATCHES(long long)
MOEGEN_HOST_MATCHES(unsigned long long)
MOEGEN_HOST_MATCHES(float)
MOEGEN_HOST_MATCHES(double)
#undef MOEGEN_HOST_MATCHES

#define MOEGEN_HOST_REDUCE(name, type, operation)                                                      \
    __forceinline__ type name(unsigned mask, type value, moegen::host::Place place = {}) {             \
        using moegen::host::Collective;                                                                \
        return type(moegen::host::collective(Collective::operation, mask, unsigned(value), 0, place)); \
    }

MOEGEN_HOST_REDUCE(__reduce_add_sync, int, add)
MOEGEN_HOST_REDUCE(__reduce_add_sync, unsigned, add)
MOEGEN_HOST_REDUCE(__reduce_min_sync, int, min_signed)
MOEGEN_HOST_REDUCE(__reduce_min_sync, unsigned, min_unsigned)
MOEGEN_HOST_REDUCE(__reduce_max_sync, int, max_signed)
MOEGEN_HOST_REDUCE(__reduce_max_sync, unsigned, max_unsigned)
MOEGEN_HOST_REDUCE(__reduce_and_sync, unsigned, bit_and)
MOEGEN_HOST_REDUCE(__reduce_or_sync, unsigned, bit_or)
MOEGEN_HOST_REDUCE(__reduce_xor_sync, unsigned, bit_xor)
#undef MOEGEN_HOST_REDUCE
