// SPDX-License-Identifier: Apache-2.0
#include "params.cuh"

extern "C" __global__ void atomics(const __grid_constant__ Params params) {
    uint32_t* out = params.out;
    auto* wide = reinterpret_cast<unsigned long long*>(params.a);
    auto* real = reinterpret_cast<float*>(params.b);
    const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    atomicAdd(&out[0], 1u);
    atomicMax(&out[1], thread);
    atomicMin(reinterpret_cast<int*>(&out[2]), -int(thread));
    atomicOr(&out[3], 1u << threadIdx.x % 32);
    atomicAnd(&out[4], ~(1u << threadIdx.x % 32));
    atomic_add_acq_rel_gpu(&out[5], 2u);
    uint32_t seen = out[6];
    for (uint32_t before; (before = atomicCAS(&out[6], seen, seen + 3)) != seen;) seen = before;
    if (atomic_cas_acq_rel_gpu(&out[7], 0, thread + 1) == 0) atomicAdd(&out[8], 1u);
    atomicAdd(wide, 1ull << 32);
    atomicAdd(real, 0.5f);
    if (atomicExch(&out[9], 1u) == 0) atomicAdd(&out[10], 1u);
}

// Two launches that run at once: words in `a` and flags in `out`, n messages.
extern "C" __global__ void send_messages(const __grid_constant__ Params params) {
    auto* words = reinterpret_cast<uint32_t*>(params.a);
    for (uint32_t message = 1; message <= params.n; ++message) {
        words[threadIdx.x] = message * 1000 + threadIdx.x;
        __syncthreads();
        if (threadIdx.x == 0) {
            params.flag ? store_relaxed_sys(&params.out[0], message) : store_release_sys(&params.out[0], message);
            while (load_acquire_sys(&params.out[1]) != message) poll_pause();
        }
        __syncthreads();
    }
}

extern "C" __global__ void receive_messages(const __grid_constant__ Params params) {
    const auto* words = reinterpret_cast<const uint32_t*>(params.a);
    uint32_t wrong = 0;
    for (uint32_t message = 1; message <= params.n; ++message) {
        if (threadIdx.x == 0)
            while (load_acquire_sys(&params.out[0]) != message) poll_pause();
        __syncthreads();
        wrong += words[threadIdx.x] != message * 1000 + threadIdx.x;
        __syncthreads();
        if (threadIdx.x == 0) store_release_sys(&params.out[1], message);
    }
    if (wrong) atomicAdd(&params.out[2], wrong);
}

// Until the reader has seen n different words.
extern "C" __global__ void write_whole(const __grid_constant__ Params params) {
    auto* word = reinterpret_cast<uint4*>(params.a);
    uint32_t i = 0;
    do {
        for (uint32_t end = i + 1000; i != end; ++i) store_whole_relaxed_sys(word, make_uint4(i, i, i, i));
        poll_pause();
    } while (load_acquire_sys(params.out) == 0);
}

extern "C" __global__ void read_whole(const __grid_constant__ Params params) {
    const auto* word = reinterpret_cast<const uint4*>(params.a);
    uint32_t torn = 0, changes = 0, before = 0;
    while (changes < params.n) {
        for (uint32_t i = 0; i < 1000; ++i) {
            const uint4 value = load_whole_relaxed_sys(word);
            torn += value.x != value.y || value.x != value.z || value.x != value.w;
            changes += value.x != before;
            before = value.x;
        }
        poll_pause();
    }
    params.out[1] = torn;
    __threadfence_system();
    store_release_sys(params.out, 1u);
}

// Every lane waits for a word of its own, and the warp votes on it: nothing tells the scheduler of progress.
extern "C" __global__ void poll_by_vote(const __grid_constant__ Params params) {
    while (!__all_sync(kFullWarp, load_relaxed_sys(&params.out[lane_id()]) != 0)) poll_pause();
    params.out[64 + lane_id()] = params.out[lane_id()];
}

extern "C" __global__ void set_words_late(const __grid_constant__ Params params) {
    const uint64_t start = global_timer_ns();
    while (global_timer_ns() - start < params.n * 1000ull) poll_pause();
    store_relaxed_sys(&params.out[lane_id()], lane_id() + 1);
}

// Rank `flag` of 4, two blocks each. out[rank * 64 + block * 4 + peer] is what `peer` last told this block.
extern "C" __global__ void all_ranks_meet(const __grid_constant__ Params params) {
    for (uint32_t round = 1; round <= params.n; ++round) {
        if (threadIdx.x < 4) {
            store_release_sys(&params.out[threadIdx.x * 64 + blockIdx.x * 4 + params.flag], round);
            while (load_acquire_sys(&params.out[params.flag * 64 + blockIdx.x * 4 + threadIdx.x]) < round) poll_pause();
        }
        __syncthreads();
    }
}

extern "C" __global__ void timer(const __grid_constant__ Params params) {
    const uint64_t start = global_timer_ns();
    uint32_t pauses = 0;
    uint64_t now = start;
    for (; now - start < 2'000'000; now = global_timer_ns(), ++pauses) poll_pause();
    params.out[0] = uint32_t(now - start);
    params.out[1] = pauses;
}

extern "C" __global__ void many_syncs(const __grid_constant__ Params params) {
    for (uint32_t i = 0; i < params.n; ++i) __syncthreads();
}

extern "C" __global__ void many_warp_syncs(const __grid_constant__ Params params) {
    const uint32_t mask = blockDim.x == 2 ? 3u : kFullWarp;
    for (uint32_t i = 0; i < params.n; ++i) __syncwarp(mask);
}

extern "C" __global__ void unaligned_word(const __grid_constant__ Params params) {
    store_release_sys(reinterpret_cast<uint32_t*>(params.a + 2), 1u);
}
