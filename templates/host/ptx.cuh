// SPDX-License-Identifier: Apache-2.0
// The twin of `device/ptx.cuh` for the CPU: the same names, each with the C++ memory order of its PTX. Every access
// is an acquire or release operation of its own, never a fence beside a relaxed access: ThreadSanitizer cannot judge
// fences.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

#include <moegen/cuda.hpp>
#include <moegen/e4m3.cuh>

namespace moegen {

constexpr uint32_t kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

namespace host {

__device__ __forceinline__ void check_aligned(const void* address, unsigned long bytes, const char* text, Place place) {
    if (reinterpret_cast<unsigned long>(address) % bytes != 0) [[unlikely]]
        fail(text, place);
}

template <typename Word>
__device__ __forceinline__ Word load_word(const Word* address, int order, Place place) {
    check_aligned(address, sizeof(Word), "load from an address that is not a multiple of its size", place);
    switch_point();
    const Word value = __atomic_load_n(address, order);
    note_load(address, value, order == __ATOMIC_ACQUIRE, place);
    return value;
}

template <typename Word>
__device__ __forceinline__ void store_word(Word* address, Word value, int order, Place place) {
    check_aligned(address, sizeof(Word), "store to an address that is not a multiple of its size", place);
    if (order == __ATOMIC_RELEASE) pause_point(64);
    __atomic_store_n(address, value, order);
    ++current_fiber->stores;
    switch_point();
}

}  // namespace host

// ---- launches -----------------------------------------------------------------------------------

__device__ __forceinline__ void await_launch_before() {}  // here a launch is over when it returns

// ---- where am I ---------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t lane_id() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ uint32_t warp_id() { return threadIdx.x / kWarpSize; }

__device__ __forceinline__ uint8_t* dynamic_shared_memory() { return host::current_fiber->block->dynamic_shared; }

__device__ __forceinline__ void barrier_sync(uint32_t id, uint32_t threads, host::Place place = {}) {
    host::named_barrier(id, threads, place);
}

// ---- memory order -------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t load_acquire_sys(const uint32_t* address, host::Place place = {}) {
    return host::load_word(address, __ATOMIC_ACQUIRE, place);
}

__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* address, host::Place place = {}) {
    return host::load_word(address, __ATOMIC_ACQUIRE, place);
}

__device__ __forceinline__ uint32_t load_relaxed_sys(const uint32_t* address, host::Place place = {}) {
    return host::load_word(address, __ATOMIC_RELAXED, place);
}

__device__ __forceinline__ uint64_t load_relaxed_sys(const uint64_t* address, host::Place place = {}) {
    return host::load_word(address, __ATOMIC_RELAXED, place);
}

__device__ __forceinline__ void store_release_sys(uint32_t* address, uint32_t value, host::Place place = {}) {
    host::store_word(address, value, __ATOMIC_RELEASE, place);
}

__device__ __forceinline__ void store_release_sys(uint64_t* address, uint64_t value, host::Place place = {}) {
    host::store_word(address, value, __ATOMIC_RELEASE, place);
}

__device__ __forceinline__ void store_relaxed_sys(uint32_t* address, uint32_t value, host::Place place = {}) {
    host::store_word(address, value, __ATOMIC_RELAXED, place);
}

__device__ __forceinline__ void store_relaxed_sys(uint64_t* address, uint64_t value, host::Place place = {}) {
    host::store_word(address, value, __ATOMIC_RELAXED, place);
}

__device__ __forceinline__ uint4 load_whole_relaxed_sys(const uint4* address, host::Place place = {}) {
    host::check_aligned(address, 16, "16-byte load from an address that is not a multiple of 16", place);
    host::switch_point();
    const uint4 value = host::load_16_bytes(address);
    host::note_load(address, value.w + 0x9e3779b97f4a7c15ull * value.x, false, place);
    return value;
}

__device__ __forceinline__ void store_whole_relaxed_sys(uint4* address, uint4 value, host::Place place = {}) {
    host::check_aligned(address, 16, "16-byte store to an address that is not a multiple of 16", place);
    host::pause_point(256);
    host::store_16_bytes(address, value);
    ++host::current_fiber->stores;
    host::switch_point();
}

__device__ __forceinline__ uint32_t atomic_add_acq_rel_gpu(uint32_t* address, uint32_t value) {
    host::switch_point();
    return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}

__device__ __forceinline__ uint32_t atomic_cas_acq_rel_gpu(uint32_t* address, uint32_t expected, uint32_t desired) {
    host::switch_point();
    __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    return expected;
}

// ---- plain copies -------------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_input(const uint4* address, host::Place place = {}) {
    host::check_aligned(address, 16, "16-byte load from an address that is not a multiple of 16", place);
    return *address;
}

// ---- bulk copies (TMA), their barriers and the proxy fence ----------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return uint32_t(reinterpret_cast<unsigned long>(pointer));
}

__device__ __forceinline__ void fence_proxy_async() { host::fence_proxy(); }

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals, host::Place place = {}) {
    host::mbarrier_init(barrier, arrivals, place);
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, host::Place place = {}) {
    host::mbarrier_arrive(barrier, 0, place);
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes, host::Place place = {}) {
    host::mbarrier_arrive(barrier, bytes, place);
}

__device__ __forceinline__ bool mbarrier_test(uint64_t* barrier, uint32_t parity, host::Place place = {}) {
    return host::mbarrier_test(barrier, parity, place);
}

__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                          host::Place place = {}) {
    host::bulk_load(shared, global, bytes, barrier, place);
}

__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes, host::Place place = {}) {
    host::bulk_store(global, shared, bytes, place);
}

__device__ __forceinline__ void bulk_commit() { host::bulk_commit(); }

template <int kPending>
__device__ __forceinline__ void bulk_wait() {
    host::bulk_wait(kPending, false);
}

template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
    host::bulk_wait(kPending, true);
}

// ---- numbers ------------------------------------------------------------------------------------

// As cvt.rn.bf16x2.f32: to nearest, ties to even, every NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t round_to_bf16(float value) {
    const uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

__device__ __forceinline__ uint32_t round_to_bf16x2(float low, float high) {
    return round_to_bf16(high) << 16 | round_to_bf16(low);
}

// As cvt.rn.f16x2.f32: to nearest, ties to even, every NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t round_to_f16(float value) {
    const uint32_t bits = __float_as_uint(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7fff;
    if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above
    if (magnitude < 113u << 23) {                         // below 2**-14: a multiple of 2**-24, the last place of 0.5
        return sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f));
    }
    return sign | (((magnitude + 0xfffu + (magnitude >> 13 & 1)) >> 13) - (112u << 10));
}

__device__ __forceinline__ uint32_t round_to_f16x2(float low, float high) {
    return round_to_f16(high) << 16 | round_to_f16(low);
}

__device__ __forceinline__ float low_f16(uint32_t pair) {
    const uint32_t magnitude = pair & 0x7fffu;
    // Its exponent, put where a float has its own, is 112 too small; 31 stands for infinity and no number there.
    const float value = magnitude >= 0x7c00u ? __uint_as_float(0x7f800000u | (magnitude & 0x3ffu) << 13)
                                             : __uint_as_float(magnitude << 13) * __uint_as_float((127u + 112) << 23);
    return (pair & 0x8000u) != 0 ? -value : value;
}

__device__ __forceinline__ float high_f16(uint32_t pair) { return low_f16(pair >> 16); }

__device__ __forceinline__ uint32_t round_to_e4m3x2(float low, float high) {
    return round_to_e4m3(high) << 8 | round_to_e4m3(low);
}

// ---- clocks -------------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t global_timer_ns() { return host::clock_ns(); }

__device__ __forceinline__ void poll_pause() { host::poll_pause(); }

}  // namespace moegen
