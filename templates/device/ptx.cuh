// SPDX-License-Identifier: Apache-2.0
// Everything that a kernel needs and CUDA C++ has no word for: memory order, bulk copies, clocks.
// Inline PTX lives here and nowhere else. `templates/host/ptx.cuh` is this file's twin for the CPU: the
// same names, with the C++ memory order of the PTX written here.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;

#include <moegen/e4m3.cuh>

namespace moegen {

constexpr uint32_t kWarpSize = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;

// ---- where am I ---------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t lane_id() { return threadIdx.x % kWarpSize; }
__device__ __forceinline__ uint32_t warp_id() { return threadIdx.x / kWarpSize; }

// Dynamic shared memory of the block, 128-byte aligned.
__device__ __forceinline__ uint8_t* dynamic_shared_memory() {
    extern __shared__ __align__(128) uint8_t bytes[];
    return bytes;
}

// Barrier `id` (1..15; 0 is __syncthreads) among `threads` threads, a multiple of the warp size.
__device__ __forceinline__ void barrier_sync(uint32_t id, uint32_t threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- launches -----------------------------------------------------------------------------------

// Waits until what was launched before this on its stream is over and its writes are seen. From sm_90 on a launch
// begins before that (programmatic dependent launch): every kernel calls this first, and reads nothing ahead of it.
__device__ __forceinline__ void await_launch_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- memory order -------------------------------------------------------------------------------
// `sys` reaches a peer's GPU and the host; `gpu` reaches the other blocks of this launch only.

__device__ __forceinline__ uint32_t load_acquire_sys(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint64_t load_acquire_sys(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint32_t load_relaxed_sys(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint64_t load_relaxed_sys(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ void store_release_sys(uint32_t* address, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_release_sys(uint64_t* address, uint64_t value) {
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed_sys(uint32_t* address, uint32_t value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed_sys(uint64_t* address, uint64_t value) {
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

// One 16-byte access that is never seen in halves (PTX ISA 8.3, .b128): data and its epoch travel together,
// so no order between two accesses is needed.
__device__ __forceinline__ uint4 load_whole_relaxed_sys(const uint4* address) {
    uint64_t low, high;
    asm volatile(
        "{\n\t.reg .b128 whole;\n\t"
        "ld.relaxed.sys.global.b128 whole, [%2];\n\t"
        "mov.b128 {%0, %1}, whole;\n\t}"
        : "=l"(low), "=l"(high)
        : "l"(address)
        : "memory");
    return make_uint4(uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32));
}

__device__ __forceinline__ void store_whole_relaxed_sys(uint4* address, uint4 value) {
    const uint64_t low = uint64_t(value.y) << 32 | value.x;
    const uint64_t high = uint64_t(value.w) << 32 | value.z;
    asm volatile(
        "{\n\t.reg .b128 whole;\n\t"
        "mov.b128 whole, {%1, %2};\n\t"
        "st.relaxed.sys.global.b128 [%0], whole;\n\t}" ::"l"(address),
        "l"(low), "l"(high)
        : "memory");
}

__device__ __forceinline__ uint32_t atomic_add_acq_rel_gpu(uint32_t* address, uint32_t value) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
    return before;
}

// Returns what stood there; the exchange took place if that equals `expected`.
__device__ __forceinline__ uint32_t atomic_cas_acq_rel_gpu(uint32_t* address, uint32_t expected, uint32_t desired) {
    uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.cas.b32 %0, [%1], %2, %3;"
                 : "=r"(before)
                 : "l"(address), "r"(expected), "r"(desired)
                 : "memory");
    return before;
}

// ---- plain copies -------------------------------------------------------------------------------

// An input that nobody writes during the launch: read once, kept out of L1. Volatile, so that it is asked for where the
// kernel says so, long before it is used.
__device__ __forceinline__ uint4 load_input(const uint4* address) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}

// ---- numbers ------------------------------------------------------------------------------------

// Two floats rounded to nearest even, `low` in the lower half.
__device__ __forceinline__ uint32_t round_to_bf16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Two floats rounded to nearest even fp16, `low` in the lower half; and back.
__device__ __forceinline__ uint32_t round_to_f16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ float low_f16(uint32_t pair) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(uint16_t(pair)));
    return value;
}

__device__ __forceinline__ float high_f16(uint32_t pair) { return low_f16(pair >> 16); }

// Two floats rounded to FP8 e4m3 (saturating), `low` in the lower byte.
__device__ __forceinline__ uint32_t round_to_e4m3x2(float low, float high) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return round_to_e4m3(high) << 8 | round_to_e4m3(low);
#endif
}

// ---- bulk copies (TMA), their barriers and the proxy fence ----------------------------------------
// Bulk copies work in the asynchronous proxy. A bulk load of bytes that a peer's signal announced needs
// fence_proxy_async() in the issuing thread after the signal was acquired.

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return uint32_t(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Bulk copies exist from sm_90 on. A kernel for older chips is rendered with copy=vec and calls none of these.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the phase wait for `bytes` more bytes of bulk loads.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// True once the phase of this parity (0 for a new barrier's first) is complete.
__device__ __forceinline__ bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// Global to shared; 16-byte aligned, a multiple of 16 bytes; completes on `barrier`.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Shared to global; 16-byte aligned, a multiple of 16 bytes; belongs to the issuing thread's bulk group.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's bulk groups are under way: their writes are then made.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same, but only until the shared memory they read may be written again.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

#endif

// ---- clocks -------------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t global_timer_ns() {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
    return now;
}

// Called once per failed poll. The CPU switches to another thread here; a GPU polls on.
__device__ __forceinline__ void poll_pause() {}

}  // namespace moegen
