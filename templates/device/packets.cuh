// SPDX-License-Identifier: Apache-2.0
// Packets: 16 bytes that are written and read as one, so that the flag in them announces the rest. No fence, no second
// flight, a third more bytes.
#pragma once

#include <moegen/launch.cuh>

namespace moegen {

constexpr uint32_t kPacketWords = 3;  // of payload

struct alignas(16) Packet {
    uint32_t words[kPacketWords];
    uint32_t flag;  // the epoch of the launch that sends it; in combine of family `ll` with a bit of the call word
};

// Packets for so many words.
__device__ __forceinline__ constexpr uint32_t packets_for(uint32_t words) {
    return (words + kPacketWords - 1) / kPacketWords;
}

// The packet with the words 3 * number and on of a message, as `word_at` gives them.
template <class WordAt>
__device__ __forceinline__ Packet packet_of(uint32_t number, uint32_t flag, WordAt word_at) {
    Packet packet;
#pragma unroll
    for (uint32_t word = 0; word < kPacketWords; ++word) packet.words[word] = word_at(number * kPacketWords + word);
    packet.flag = flag;
    return packet;
}

__device__ __forceinline__ void unpack(const Packet& packet, uint32_t* words) {
    words[0] = packet.words[0];
    words[1] = packet.words[1];
    words[2] = packet.words[2];
}

// A word whose number is not known before: registers have no index.
__device__ __forceinline__ uint32_t word_of(const Packet& packet, uint32_t word) {
    const uint32_t first = packet.words[0], second = packet.words[1], third = packet.words[2];
    return word == 0 ? first : word == 1 ? second : third;
}

__device__ __forceinline__ void send_packet(Packet* to, const Packet& packet) {
    store_whole_relaxed_sys(reinterpret_cast<uint4*>(to),
                            make_uint4(packet.words[0], packet.words[1], packet.words[2], packet.flag));
}

__device__ __forceinline__ Packet to_packet(uint4 whole) { return Packet{{whole.x, whole.y, whole.z}, whole.w}; }

// What is there now: a packet of this launch, or of one before.
__device__ __forceinline__ Packet load_packet(const Packet* from) {
    return to_packet(load_whole_relaxed_sys(reinterpret_cast<const uint4*>(from)));
}

// Waits for 16 bytes to end with `flag`. All that wait for such bytes call this, so that they share what polls.
template <class Watch>
__device__ __forceinline__ bool await_flag(const Watch& watch, Awaited what, const uint4* from, uint32_t flag) {
    return keep_polling([=] { return load_whole_relaxed_sys(from).w; }, watch, what, flag);
}

// Waits for a packet of this launch; nothing in it is valid if it does not come.
template <class Watch>
__device__ __forceinline__ bool await_packet(const Watch& watch, Awaited what, const Packet* from, Packet& packet) {
    packet = load_packet(from);
    if (packet.flag == watch.epoch) return true;
    if (!await_flag(watch, what, reinterpret_cast<const uint4*>(from), watch.epoch)) return false;
    packet = load_packet(from);
    return true;
}

// The same of 16 bytes that end with `flag`.
template <class Watch>
__device__ __forceinline__ bool await_flagged(const Watch& watch, Awaited what, const uint4* from, uint4& whole,
                                              uint32_t flag) {
    whole = load_whole_relaxed_sys(from);
    if (whole.w == flag) return true;
    if (!await_flag(watch, what, from, flag)) return false;
    whole = load_whole_relaxed_sys(from);
    return true;
}

}  // namespace moegen
