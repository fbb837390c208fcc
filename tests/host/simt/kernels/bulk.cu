// SPDX-License-Identifier: Apache-2.0
#include "params.cuh"

namespace {

struct Buffers {
    uint64_t full;
    uint64_t padding;
    uint8_t bytes[1024];
};

__device__ __forceinline__ Buffers* buffers() { return reinterpret_cast<Buffers*>(dynamic_shared_memory()); }
__device__ __forceinline__ uint32_t* words() { return reinterpret_cast<uint32_t*>(buffers()->bytes); }

__device__ __forceinline__ void start(uint32_t arrivals) {
    if (threadIdx.x == 0) mbarrier_init(&buffers()->full, arrivals);
    __syncthreads();
}

__device__ __forceinline__ void wait(uint32_t parity) {
    while (!mbarrier_test(&buffers()->full, parity)) poll_pause();
}

}  // namespace

// n chunks of 1,024 bytes from a to b through shared memory, word by word plus 1.
extern "C" __global__ void bulk_pipeline(const __grid_constant__ Params params) {
    start(1);
    for (uint32_t chunk = 0; chunk < params.n; ++chunk) {
        if (threadIdx.x == 0) {
            bulk_wait_read<0>();
            mbarrier_arrive_expect(&buffers()->full, 1024);
            bulk_load(buffers()->bytes, params.a + 1024 * chunk, 512, &buffers()->full);
            bulk_load(buffers()->bytes + 512, params.a + 1024 * chunk + 512, 512, &buffers()->full);
        }
        wait(chunk % 2);
        for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x) words()[i] += 1;
        fence_proxy_async();
        __syncthreads();
        if (threadIdx.x == 0) {
            bulk_store(params.b + 1024 * chunk, buffers()->bytes, 1024);
            bulk_commit();
        }
    }
    if (threadIdx.x == 0) {
        bulk_wait<0>();
        store_release_sys(params.out, 1u);
    }
}

// One thread. out[0]: what the load brought, though the source changed after it began.
extern "C" __global__ void load_is_late(const __grid_constant__ Params params) {
    start(1);
    auto* source = reinterpret_cast<uint32_t*>(params.a);
    source[0] = 1;
    mbarrier_arrive_expect(&buffers()->full, 16);
    bulk_load(buffers()->bytes, source, 16, &buffers()->full);
    for (uint32_t i = 0; i < params.n; ++i) __syncthreads();
    source[0] = 2;
    wait(0);
    params.out[0] = words()[0];
}

// One thread. out[0]: the target before bulk_wait; a[0]: after it.
extern "C" __global__ void store_is_late(const __grid_constant__ Params params) {
    auto* target = reinterpret_cast<uint32_t*>(params.a);
    words()[0] = 1;
    bulk_store(target, buffers()->bytes, 16);
    bulk_commit();
    if (params.flag) bulk_wait_read<0>();
    words()[0] = 2;
    params.out[0] = target[0];
    bulk_wait<0>();
}

extern "C" __global__ void groups_in_order(const __grid_constant__ Params params) {
    for (uint32_t i = 0; i < 4; ++i) {
        words()[4 * i] = i + 1;
        bulk_store(params.a + 16 * i, words() + 4 * i, 16);
        bulk_commit();
    }
    bulk_wait<2>();
    for (uint32_t i = 0; i < 4; ++i) params.out[i] = reinterpret_cast<uint32_t*>(params.a)[4 * i];
    bulk_wait_read<0>();
}

// Three arrivals a phase; out[round] counts threads that saw the phase end.
extern "C" __global__ void phases(const __grid_constant__ Params params) {
    start(3);
    for (uint32_t round = 0; round < params.n; ++round) {
        if (threadIdx.x < 3) mbarrier_arrive(&buffers()->full);
        wait(round % 2);
        atomicAdd(&params.out[round], 1u);
        __syncthreads();
    }
}

// The same with buffers and barrier that have fixed places.
extern "C" __global__ void bulk_through_fixed_memory(const __grid_constant__ Params params) {
    struct __align__(16) Row {
        uint32_t words[32];
    };
    __shared__ __align__(128) Row rows[2];
    __shared__ uint64_t full;
    if (threadIdx.x == 0) mbarrier_init(&full, 2);
    __syncthreads();
    if (threadIdx.x < 2) {
        mbarrier_arrive_expect(&full, sizeof(Row));
        bulk_load(&rows[threadIdx.x], params.a + sizeof(Row) * threadIdx.x, sizeof(Row), &full);
    }
    while (!mbarrier_test(&full, 0)) poll_pause();
    params.out[threadIdx.x] = rows[1 - threadIdx.x / 32].words[threadIdx.x % 32];
    if (threadIdx.x == 0) params.out[64] = uint32_t(reinterpret_cast<size_t>(rows) % 128);
}

// ---- errors -------------------------------------------------------------------------------------

extern "C" __global__ void load_without_fence(const __grid_constant__ Params params) {
    start(1);
    if (threadIdx.x == 1) {
        load_acquire_sys(params.out);
        if (params.flag == 1) fence_proxy_async();  // the wrong thread's
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (params.flag == 2) fence_proxy_async();
    mbarrier_arrive_expect(&buffers()->full, 16);
    bulk_load(buffers()->bytes, params.a, 16, &buffers()->full);
    wait(0);
}

extern "C" __global__ void misaligned_bulk(const __grid_constant__ Params params) {
    start(1);
    if (params.n == 0) bulk_load(buffers()->bytes + 4, params.a, 16, &buffers()->full);
    if (params.n == 1) bulk_load(buffers()->bytes, params.a + 8, 16, &buffers()->full);
    if (params.n == 2) bulk_load(buffers()->bytes, params.a, 24, &buffers()->full);
    if (params.n == 3) bulk_store(params.a + 8, buffers()->bytes, 16);
    if (params.n == 4) bulk_store(params.a, params.b, 16);
}

extern "C" __global__ void mbarrier_misuse(const __grid_constant__ Params params) {
    if (params.n == 0) mbarrier_arrive(&buffers()->full);
    start(1);
    if (params.n == 1) mbarrier_init(&buffers()->full, 1);
    if (params.n == 2) mbarrier_arrive_expect(&buffers()->full, 16), mbarrier_arrive(&buffers()->full);
    if (params.n == 3) mbarrier_init(&buffers()->full + 1, 0);
    if (params.n == 4) bulk_load(buffers()->bytes, params.a, 16, &buffers()->full);
}

extern "C" __global__ void unfinished_store(const __grid_constant__ Params params) {
    bulk_store(params.a, buffers()->bytes, 16);
    if (params.n == 1) bulk_commit();
}
