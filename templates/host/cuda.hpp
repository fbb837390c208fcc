// SPDX-License-Identifier: Apache-2.0
// The words of CUDA C++ that kernels use, for a plain C++20 compiler: keywords, vector types, intrinsics.
#pragma once

#include <moegen/simt.hpp>
#include <moegen/whole.hpp>

// ---- keywords -----------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ const
// Fibers never leave their OS thread, and a block is one OS thread.
#define __shared__ static thread_local

#define threadIdx (::moegen::host::current_fiber->thread)
#define blockIdx (::moegen::host::current_fiber->block->index)
#define blockDim (::moegen::host::current_fiber->block->size)
#define gridDim (::moegen::host::current_fiber->block->grid)

constexpr int warpSize = 32;

using size_t = decltype(sizeof(0));

extern "C" {
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float fabsf(float) noexcept;
float sqrtf(float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float rintf(float) noexcept;
float roundf(float) noexcept;
float truncf(float) noexcept;
float exp2f(float) noexcept;
float log2f(float) noexcept;
float expf(float) noexcept;
float logf(float) noexcept;
float ldexpf(float, int) noexcept;
float copysignf(float, float) noexcept;
void* memcpy(void*, const void*, size_t) noexcept;
void* memset(void*, int, size_t) noexcept;
int printf(const char*, ...);
}

// ---- vector types: those with members x, y and x, y, z, w, aligned as on the GPU ---------------------------

#define MOEGEN_HOST_VECTOR2(name, type, alignment) \
    struct alignas(alignment) name {               \
        type x, y;                                 \
    };                                             \
    inline name make_##name(type x, type y) { return {x, y}; }
#define MOEGEN_HOST_VECTOR4(name, type, alignment) \
    struct alignas(alignment) name {               \
        type x, y, z, w;                           \
    };                                             \
    inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

MOEGEN_HOST_VECTOR2(char2, signed char, 2)
MOEGEN_HOST_VECTOR2(uchar2, unsigned char, 2)
MOEGEN_HOST_VECTOR2(short2, short, 4)
MOEGEN_HOST_VECTOR2(ushort2, unsigned short, 4)
MOEGEN_HOST_VECTOR2(int2, int, 8)
MOEGEN_HOST_VECTOR2(uint2, unsigned, 8)
MOEGEN_HOST_VECTOR2(float2, float, 8)
MOEGEN_HOST_VECTOR2(longlong2, long long, 16)
MOEGEN_HOST_VECTOR2(ulonglong2, unsigned long long, 16)
MOEGEN_HOST_VECTOR2(double2, double, 16)
MOEGEN_HOST_VECTOR4(char4, signed char, 4)
MOEGEN_HOST_VECTOR4(uchar4, unsigned char, 4)
MOEGEN_HOST_VECTOR4(short4, short, 8)
MOEGEN_HOST_VECTOR4(ushort4, unsigned short, 8)
MOEGEN_HOST_VECTOR4(int4, int, 16)
MOEGEN_HOST_VECTOR4(uint4, unsigned, 16)
MOEGEN_HOST_VECTOR4(float4, float, 16)

namespace moegen::host {

__forceinline__ uint4 load_16_bytes(const uint4* address) {
    return __builtin_bit_cast(uint4, load_whole(reinterpret_cast<const Whole*>(address)));
}

__forceinline__ void store_16_bytes(uint4* address, uint4 value) {
    store_whole(reinterpret_cast<Whole*>(address), __builtin_bit_cast(Whole, value));
}

}  // namespace moegen::host

// ---- barriers and fences ----------------------------------------------------------------------------------

__forceinline__ void __syncthreads(moegen::host::Place place = {}) {
    moegen::host::block_barrier(moegen::host::Vote::none, 0, place);
}
__forceinline__ int __syncthreads_or(int predicate, moegen::host::Place place = {}) {
    return int(moegen::host::block_barrier(moegen::host::Vote::any, predicate, place));
}
__forceinline__ int __syncthreads_and(int predicate, moegen::host::Place place = {}) {
    return int(moegen::host::block_barrier(moegen::host::Vote::all, predicate, place));
}
__forceinline__ int __syncthreads_count(int predicate, moegen::host::Place place = {}) {
    return int(moegen::host::block_barrier(moegen::host::Vote::count, predicate, place));
}
__forceinline__ void __threadfence_block() { __sync_synchronize(); }
__forceinline__ void __threadfence() { __sync_synchronize(); }
__forceinline__ void __threadfence_system() { __sync_synchronize(); }

#include <moegen/atomics.hpp>
#include <moegen/intrinsics.hpp>
#include <moegen/warp.hpp>
