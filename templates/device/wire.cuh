// SPDX-License-Identifier: Apache-2.0
// Wire formats: how a row crosses the link, and how its receiver learns that it is there.
#pragma once

#include <moegen/packets.cuh>

namespace moegen {

enum class WireFormat {
    kInline,  // in packets, each of which announces itself
    kRow,     // in plain vectors; the tag of the row's slot, released behind all of them, announces the row
};

// A thread moves 16 bytes at once: a unit. Of a row's kUnits units each thread has every Group::kSize-th.
template <WireFormat kFormat, class Group, uint32_t kRowVectors>
struct RowWire {
    static constexpr bool kInPackets = kFormat == WireFormat::kInline;
    static constexpr uint32_t kUnitWords = kInPackets ? kPacketWords : 4;  // of payload
    static constexpr uint32_t kUnits = (4 * kRowVectors + kUnitWords - 1) / kUnitWords;
    static constexpr uint32_t kSteps = (kUnits + Group::kSize - 1) / Group::kSize;

    // A row in a warp group's registers: each thread has one vector per step, or none; on the link, one unit.
    struct Row {
        uint4 vectors[kSteps];
    };

    static __device__ __forceinline__ uint32_t unit_of_step(uint32_t step) {
        return step * Group::kSize + Group::thread();
    }

    // kRowVectors and above: the thread has no vector. Four threads send three vectors in their packets.
    static __device__ __forceinline__ uint32_t vector_at(uint32_t step) {
        if constexpr (kInPackets) {
            const uint32_t unit = unit_of_step(step);
            // Not unit / 4 * 3 + unit % 4: NVRTC 13.5 lost the second term with 64 registers a thread (2x16 warps,
            // FP8).
            return unit % 4 == 3 ? kRowVectors : unit - unit / 4;
        } else {
            return unit_of_step(step) < kUnits ? unit_of_step(step) : kRowVectors;
        }
    }

    // Of the words 4j.. that the threads j = 0, 1, 2 of four hold, thread j gets the words 3j..3j+2.
    static __device__ __forceinline__ uint4 pack_vector(uint4 vector, uint32_t flag) {
        const uint32_t y = __shfl_up_sync(kFullWarp, vector.y, 1);
        const uint32_t z = __shfl_up_sync(kFullWarp, vector.z, 1);
        const uint32_t w = __shfl_up_sync(kFullWarp, vector.w, 1);
        const uint32_t j = lane_id() % 4;
        return make_uint4(j == 0   ? vector.x
                          : j == 1 ? w
                          : j == 2 ? z
                                   : y,
                          j == 0   ? vector.y
                          : j == 1 ? vector.x
                          : j == 2 ? w
                                   : z,
                          j == 0   ? vector.z
                          : j == 1 ? vector.y
                          : j == 2 ? vector.x
                                   : w,
                          flag);
    }

    // And back.
    static __device__ __forceinline__ uint4 unpack_vector(uint4 packet) {
        const uint32_t x = __shfl_down_sync(kFullWarp, packet.x, 1);
        const uint32_t y = __shfl_down_sync(kFullWarp, packet.y, 1);
        const uint32_t z = __shfl_down_sync(kFullWarp, packet.z, 1);
        const uint32_t j = lane_id() % 4;
        return make_uint4(j == 0   ? packet.x
                          : j == 1 ? packet.y
                                   : packet.z,
                          j == 0   ? packet.y
                          : j == 1 ? packet.z
                                   : x,
                          j == 0   ? packet.z
                          : j == 1 ? x
                                   : y,
                          j == 0   ? x
                          : j == 1 ? y
                                   : z);
    }

    // ---- sending: `flag` is that of packets ----

    static __device__ __forceinline__ uint4 to_unit(const uint32_t* words, uint32_t flag) {
        if constexpr (kInPackets) {
            return make_uint4(words[0], words[1], words[2], flag);
        } else {
            return make_uint4(words[0], words[1], words[2], words[3]);
        }
    }

    static __device__ __forceinline__ Row to_units(const Row& row, uint32_t flag) {
        Row units;
#pragma unroll
        for (uint32_t step = 0; step < kSteps; ++step) {
            if constexpr (kInPackets) {
                units.vectors[step] = pack_vector(row.vectors[step], flag);
            } else {
                units.vectors[step] = row.vectors[step];
            }
        }
        return units;
    }

    static __device__ __forceinline__ void send_unit(uint4* to, uint4 unit) {
        if constexpr (kInPackets) {
            store_whole_relaxed_sys(to, unit);
        } else {
            *to = unit;
        }
    }

    static __device__ __forceinline__ void send_units(const Row& units, uint4* to) {
#pragma unroll
        for (uint32_t step = 0; step < kSteps; ++step) {
            if (unit_of_step(step) < kUnits) send_unit(to + unit_of_step(step), units.vectors[step]);
        }
    }

    // ---- receiving: a tag is acquired before, and all of its row is there ----

    template <class Watch>
    static __device__ __forceinline__ bool receive_unit(const uint4* from, const Watch& watch, Awaited what,
                                                        uint32_t flag, uint4& unit) {
        if constexpr (kInPackets) {
            return await_flagged(watch, what, from, unit, flag);
        } else {
            unit = *from;
            return true;
        }
    }

    // Loads what is there of a row.
    static __device__ __forceinline__ Row load_units(const uint4* from) {
        Row units;
#pragma unroll
        for (uint32_t step = 0; step < kSteps; ++step) {
            if constexpr (kInPackets) {
                units.vectors[step] =
                    unit_of_step(step) < kUnits ? load_whole_relaxed_sys(from + unit_of_step(step)) : uint4{};
            } else {
                units.vectors[step] = unit_of_step(step) < kUnits ? from[unit_of_step(step)] : uint4{};
            }
        }
        return units;
    }

    // One lane of each warp polls for the last packet that its warp is sent; most others are there before.
    template <class Watch>
    static __device__ __forceinline__ void await_last_packet(const uint4* from, const Watch& watch, Awaited what,
                                                             uint32_t flag) {
        if (lane_id() == 0 && unit_of_step(0) < kUnits) {
            const uint32_t last_step = (kUnits - 1 - Group::thread()) / Group::kSize;
            uint4 packet;
            receive_unit(from + unit_of_step(last_step), watch, what, flag, packet);
        }
        __syncwarp();
    }

    // Makes a row of the units that were loaded, and waits for those that were not there; whether all of this thread's
    // have come.
    template <class Watch>
    static __device__ __forceinline__ bool complete_row(const uint4* from, const Watch& watch, Awaited what,
                                                        uint32_t flag, Row& row) {
        bool came = true;
        if constexpr (kInPackets) {
#pragma unroll
            for (uint32_t step = 0; step < kSteps; ++step) {
                uint4& unit = row.vectors[step];
                if (unit_of_step(step) < kUnits && unit.w != flag) {
                    came &= receive_unit(from + unit_of_step(step), watch, what, flag, unit);
                }
                unit = unpack_vector(unit);
            }
        }
        return came;
    }
};

}  // namespace moegen
