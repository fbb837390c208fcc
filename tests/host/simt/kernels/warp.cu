// SPDX-License-Identifier: Apache-2.0
#include "params.cuh"

// Each kernel writes one row of `blockDim.x` words per result.
namespace {
struct Rows {
    uint32_t* next;
    __device__ void add(uint32_t value) {
        next[threadIdx.x] = value;
        next += blockDim.x;
    }
};
}  // namespace

extern "C" __global__ void shuffles(const __grid_constant__ Params params) {
    Rows rows{params.out};
    const uint32_t value = 100 * warp_id() + lane_id();
    rows.add(__shfl_sync(kFullWarp, value, 5));
    rows.add(__shfl_sync(kFullWarp, value, int(lane_id()) + 1, 8));
    rows.add(__shfl_up_sync(kFullWarp, value, 3));
    rows.add(__shfl_down_sync(kFullWarp, value, 3, 16));
    rows.add(__shfl_xor_sync(kFullWarp, value, 17));
    rows.add(uint32_t(__shfl_sync(kFullWarp, uint64_t(value) << 40, 31) >> 40));
    rows.add(uint32_t(__shfl_xor_sync(kFullWarp, float(value) + 0.5f, 1)));
    // The two halves of a warp, each at its own pace.
    const uint32_t half = lane_id() < 16 ? 0xffffu : 0xffff0000u;
    uint32_t sum = lane_id();
    for (int bits = 1; bits < 16; bits *= 2) sum += __shfl_xor_sync(half, sum, bits);
    if (lane_id() < 16)
        for (int i = 0; i < 5; ++i) sum += __shfl_sync(half, 1, 0);
    rows.add(sum);
}

extern "C" __global__ void votes(const __grid_constant__ Params params) {
    Rows rows{params.out};
    rows.add(__ballot_sync(kFullWarp, lane_id() % 3 == 0));
    rows.add(uint32_t(__any_sync(kFullWarp, lane_id() == 40)));
    rows.add(uint32_t(__any_sync(kFullWarp, lane_id() == 30)));
    rows.add(uint32_t(__all_sync(kFullWarp, lane_id() < 32)));
    rows.add(uint32_t(__all_sync(kFullWarp, lane_id() < 31)));
    const uint32_t even = 0x55555555u;
    rows.add(lane_id() % 2 == 0 ? __ballot_sync(even, lane_id() < 8) : __ballot_sync(~even, lane_id() >= 8));
    rows.add(__match_any_sync(kFullWarp, int(lane_id() / 5)));
    rows.add(__match_any_sync(kFullWarp, uint64_t(lane_id() % 2) << 40));
    int same = 0;
    rows.add(__match_all_sync(kFullWarp, 7, &same));
    rows.add(uint32_t(same));
    rows.add(__activemask() >> lane_id() & 1);
}

extern "C" __global__ void reductions(const __grid_constant__ Params params) {
    Rows rows{params.out};
    const int value = int(lane_id()) - 10;
    rows.add(uint32_t(__reduce_add_sync(kFullWarp, value)));
    rows.add(uint32_t(__reduce_min_sync(kFullWarp, value)));
    rows.add(uint32_t(__reduce_max_sync(kFullWarp, value)));
    rows.add(__reduce_max_sync(kFullWarp, uint32_t(value)));
    rows.add(__reduce_or_sync(kFullWarp, 1u << lane_id()));
    uint32_t few = 0;
    if (lane_id() < 3) few = __reduce_add_sync(7u, lane_id() + 1);
    rows.add(few);
}

extern "C" __global__ void intrinsics(const __grid_constant__ Params params) {
    uint32_t* out = params.out;
    *out++ = uint32_t(__popc(0xf0f0u)), *out++ = uint32_t(__popcll(1ull << 40 | 1));
    *out++ = uint32_t(__ffs(8)), *out++ = uint32_t(__ffsll(1ll << 40)), *out++ = uint32_t(__ffs(0));
    *out++ = uint32_t(__clz(1)), *out++ = uint32_t(__clz(0)), *out++ = __brev(1u), *out++ = __brev(0x12345678u);
    *out++ = __funnelshift_l(0x80000000u, 1u, 4), *out++ = __funnelshift_r(0x10u, 0xau, 4);
    *out++ = __byte_perm(0x33221100u, 0x77665544u, 0x7531u);
    *out++ = __float_as_uint(1.0f), *out++ = uint32_t(__uint_as_float(0x40400000u));
    *out++ = uint32_t(fmaf(2.0f, 3.0f, 4.0f)), *out++ = uint32_t(rsqrtf(0.0625f));
    *out++ = uint32_t(__float2int_rn(2.5f)), *out++ = min(3u, 5u), *out++ = max(3u, 5u);
    *out++ = sizeof(uint64_t) * 100 + alignof(uint4);
}

// ---- errors -------------------------------------------------------------------------------------

extern "C" __global__ void mask_without_caller(const __grid_constant__ Params) { __syncwarp(0xfffffffeu); }

extern "C" __global__ void mask_of_exited_lane(const __grid_constant__ Params) {
    if (lane_id() == 9) return;
    __any_sync(kFullWarp, 1);
}

extern "C" __global__ void two_masks(const __grid_constant__ Params) {
    __ballot_sync(lane_id() < 4 ? kFullWarp : 0xfffffff0u | 1u << lane_id() | 1u, 1);
}

extern "C" __global__ void two_operations(const __grid_constant__ Params) {
    if (lane_id() < 7)
        __any_sync(kFullWarp, 1);
    else
        __all_sync(kFullWarp, 1);
}
