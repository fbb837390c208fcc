// SPDX-License-Identifier: Apache-2.0
// Kernels that a sanitizer must find a fault in.
#include "params.cuh"

extern "C" __global__ void neighbours(const __grid_constant__ Params params) {
    __shared__ uint32_t words[64];
    words[threadIdx.x] = threadIdx.x;
    if (params.flag == 0) __syncthreads();
    params.out[threadIdx.x] = words[(threadIdx.x + 1) % blockDim.x];
}

extern "C" __global__ void lanes(const __grid_constant__ Params params) {
    __shared__ uint32_t words[64];
    words[threadIdx.x] = threadIdx.x;
    if (params.flag == 0)
        __syncwarp();
    else
        __any_sync(kFullWarp, 1);  // delivers its value and orders nothing else
    params.out[threadIdx.x] = words[threadIdx.x ^ 1];
}

extern "C" __global__ void beyond_the_end(const __grid_constant__ Params params) {
    store_relaxed_sys(&params.out[params.n + threadIdx.x], 1u);
}
