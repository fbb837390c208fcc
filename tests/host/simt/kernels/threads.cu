// SPDX-License-Identifier: Apache-2.0
#include "params.cuh"

extern "C" __global__ void thread_ids(const __grid_constant__ Params params) {
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    params.out[2 * thread] = blockIdx.x << 16 | threadIdx.x;
    params.out[2 * thread + 1] = gridDim.x << 24 | warp_id() << 16 | lane_id();
}

extern "C" __global__ void shared_reverse(const __grid_constant__ Params params) {
    __shared__ uint32_t fixed[128];
    auto* dynamic = reinterpret_cast<uint32_t*>(dynamic_shared_memory());
    const uint32_t last = blockDim.x - 1 - threadIdx.x;
    uint32_t value = blockIdx.x * 1000 + threadIdx.x;
    for (uint32_t round = 0; round < params.n; ++round) {
        fixed[threadIdx.x] = value;
        __syncthreads();
        dynamic[threadIdx.x] = fixed[last] + 1;
        __syncthreads();
        value = dynamic[last];
    }
    params.out[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

extern "C" __global__ void shared_before_use(const __grid_constant__ Params params) {
    __shared__ uint32_t fixed[2];
    auto* dynamic = reinterpret_cast<uint32_t*>(dynamic_shared_memory());
    params.out[0] = fixed[0];
    params.out[1] = dynamic[0];
    fixed[0] = dynamic[0] = 7;
}

extern "C" __global__ void beyond_shared(const __grid_constant__ Params) { dynamic_shared_memory()[100] = 1; }

extern "C" __global__ void sync_votes(const __grid_constant__ Params params) {
    const int any = __syncthreads_or(threadIdx.x == params.n);
    const int all = __syncthreads_and(threadIdx.x != params.n);
    const int count = __syncthreads_count(threadIdx.x < params.n);
    params.out[threadIdx.x] = uint32_t(any << 16 | all << 17 | count);
}

// Warps 0 and 1 hand a word to warps 2 and 3 and take one back, `n` times; 4 and 5 have a barrier of their own.
extern "C" __global__ void named_barriers(const __grid_constant__ Params params) {
    __shared__ uint32_t there[64], back[64];
    uint32_t value = threadIdx.x;
    for (uint32_t round = 0; round < params.n; ++round) {
        if (warp_id() >= 4) {
            barrier_sync(3, 64);
            continue;
        }
        const uint32_t place = threadIdx.x % 64;
        if (warp_id() < 2) there[place] = value + 1;
        barrier_sync(1, 128);
        if (warp_id() >= 2) back[place] = there[63 - place] + 1;
        barrier_sync(2, 128);
        value = back[place];
    }
    params.out[threadIdx.x] = value;
}

extern "C" __global__ void early_exit(const __grid_constant__ Params params) {
    if (threadIdx.x >= 40) return;
    if (warp_id() == 0) __syncwarp();
    if (threadIdx.x == 33) return;
    params.out[threadIdx.x] = threadIdx.x + 1;
}

extern "C" __global__ void order(const __grid_constant__ Params params) {
    __shared__ uint32_t next;
    if (threadIdx.x == 0) next = 0;
    __syncthreads();
    params.out[threadIdx.x] = atomicAdd(&next, 1u);
    __syncthreads();
    params.out[blockDim.x] = next;
}

// ---- errors -------------------------------------------------------------------------------------

extern "C" __global__ void deadlock(const __grid_constant__ Params) {
    if (warp_id() == 0) __syncthreads();
    if (warp_id() == 1) barrier_sync(5, 64);
    if (warp_id() == 2 && lane_id() < 30) __syncwarp();
    if (warp_id() == 2) barrier_sync(6, 64);
}

extern "C" __global__ void divergent_barrier(const __grid_constant__ Params) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

extern "C" __global__ void error_in_one_block(const __grid_constant__ Params params) {
    if (blockIdx.x == params.n && threadIdx.x == 5)
        load_whole_relaxed_sys(reinterpret_cast<const uint4*>(params.a + 4));
    while (load_acquire_sys(params.out) == 0) poll_pause();
}

extern "C" __global__ void poll_without_pause(const __grid_constant__ Params params) {
    while (load_acquire_sys(params.out) == 0) {
    }
}
