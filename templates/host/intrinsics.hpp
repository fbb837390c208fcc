// SPDX-License-Identifier: Apache-2.0
// CUDA's integer and float intrinsics. Included by cuda.hpp only.
#pragma once

// ---- bits ---------------------------------------------------------------------------------------

__forceinline__ int __popc(unsigned value) { return __builtin_popcount(value); }
__forceinline__ int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
__forceinline__ int __ffs(int value) { return __builtin_ffs(value); }
__forceinline__ int __ffsll(long long value) { return __builtin_ffsll(value); }
__forceinline__ int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }
__forceinline__ int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll((unsigned long long)(value)); }
__forceinline__ unsigned __brev(unsigned value) {
    value = (value >> 1 & 0x55555555u) | (value & 0x55555555u) << 1;
    value = (value >> 2 & 0x33333333u) | (value & 0x33333333u) << 2;
    value = (value >> 4 & 0x0f0f0f0fu) | (value & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(value);
}
__forceinline__ unsigned long long __brevll(unsigned long long value) {
    return (unsigned long long)(__brev(unsigned(value))) << 32 | __brev(unsigned(value >> 32));
}
__forceinline__ unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    const unsigned long long both = (unsigned long long)(high) << 32 | low;
    return unsigned(both << (shift & 31) >> 32);
}
__forceinline__ unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    const unsigned long long both = (unsigned long long)(high) << 32 | low;
    return unsigned(both >> (shift & 31));
}
__forceinline__ unsigned __byte_perm(unsigned low, unsigned high, unsigned selectors) {
    const unsigned long long both = (unsigned long long)(high) << 32 | low;
    unsigned result = 0;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned selected = selectors >> 4 * i & 7;
        result |= unsigned(both >> 8 * selected & 0xff) << 8 * i;
    }
    return result;
}
__forceinline__ unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)(a)*b >> 32); }
__forceinline__ int __mulhi(int a, int b) { return int((long long)(a)*b >> 32); }
__forceinline__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)(a)*b >> 64);
}

// ---- floats -------------------------------------------------------------------------------------

__forceinline__ float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
__forceinline__ unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
__forceinline__ float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
__forceinline__ int __float_as_int(float value) { return __builtin_bit_cast(int, value); }
__forceinline__ double __longlong_as_double(long long bits) { return __builtin_bit_cast(double, bits); }
__forceinline__ long long __double_as_longlong(double value) { return __builtin_bit_cast(long long, value); }

__forceinline__ float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
__forceinline__ float __fadd_rn(float a, float b) { return a + b; }
__forceinline__ float __fsub_rn(float a, float b) { return a - b; }
__forceinline__ float __fmul_rn(float a, float b) { return a * b; }
__forceinline__ float __fdiv_rn(float a, float b) { return a / b; }
__forceinline__ float __frcp_rn(float a) { return 1.0f / a; }
__forceinline__ float __fsqrt_rn(float a) { return sqrtf(a); }
__forceinline__ float rsqrtf(float a) { return 1.0f / sqrtf(a); }
__forceinline__ float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }

__forceinline__ bool isnan(float value) { return __builtin_isnan(value); }
__forceinline__ bool isinf(float value) { return __builtin_isinf(value); }
__forceinline__ bool isfinite(float value) { return __builtin_isfinite(value); }

// The GPU saturates where C++ leaves the conversion undefined, and turns NaN into 0.
__forceinline__ int __float2int_rn(float value) {
    if (!(value == value)) return 0;
    if (value >= 2147483648.0f) return 2147483647;
    return value < -2147483648.0f ? -2147483647 - 1 : int(rintf(value));
}
__forceinline__ unsigned __float2uint_rn(float value) {
    if (!(value > 0.0f)) return 0;
    return value >= 4294967296.0f ? 0xffffffffu : unsigned(rintf(value));
}
__forceinline__ float __int2float_rn(int value) { return float(value); }
__forceinline__ float __uint2float_rn(unsigned value) { return float(value); }

// ---- min, max, loads ----------------------------------------------------------------------------

#define MOEGEN_HOST_MIN_MAX(result, left, right) \
    constexpr result min(left a, right b) {      \
        const result c = a, d = b;               \
        return c < d ? c : d;                    \
    }                                            \
    constexpr result max(left a, right b) {      \
        const result c = a, d = b;               \
        return c > d ? c : d;                    \
    }

MOEGEN_HOST_MIN_MAX(int, int, int)
MOEGEN_HOST_MIN_MAX(unsigned, unsigned, unsigned)
MOEGEN_HOST_MIN_MAX(unsigned, int, unsigned)
MOEGEN_HOST_MIN_MAX(unsigned, unsigned, int)
MOEGEN_HOST_MIN_MAX(long, long, long)
MOEGEN_HOST_MIN_MAX(unsigned long, unsigned long, unsigned long)
MOEGEN_HOST_MIN_MAX(long long, long long, long long)
MOEGEN_HOST_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef MOEGEN_HOST_MIN_MAX
__forceinline__ float min(float a, float b) { return fminf(a, b); }
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }

template <typename T>
__forceinline__ T __ldg(const T* address) {
    return *address;
}

[[noreturn]] __forceinline__ void __trap(moegen::host::Place place = {}) { moegen::host::fail("trap", place); }
