// SPDX-License-Identifier: Apache-2.0
// Barriers of a block and collectives of a warp: a fiber parks until all that take part have come.
#include <algorithm>
#include <cstdio>
#include <moegen/block.hpp>

namespace moegen::host {

namespace {

constexpr uint64_t kUndefined = 0x7fb77fb77fb77fb7u;

std::string in_hex(uint32_t mask) {
    char text[16];
    std::snprintf(text, sizeof text, "0x%08x", mask);
    return text;
}

// ---- barriers -----------------------------------------------------------------------------------

uint32_t outcome(const Barrier& barrier) {
    switch (barrier.vote) {
        case Vote::any:
            return barrier.count != 0;
        case Vote::all:
            return barrier.count == barrier.expected;
        default:
            return barrier.count;
    }
}

// The last to come gathers what all have seen and hands it, and the outcome, to each.
uint32_t release(Block& block, Fiber& last, Barrier& barrier) {
    const uint32_t result = outcome(barrier);
    uint64_t acquired = last.acquired;
    for (Fiber* fiber = barrier.waiting; fiber != nullptr; fiber = fiber->next_waiting) {
        tsan_acquire(fiber);
        acquired = std::max(acquired, fiber->acquired);
    }
    last.acquired = acquired;
    for (Fiber* fiber = barrier.waiting; fiber != nullptr; fiber = fiber->next_waiting) {
        fiber->acquired = acquired;
        fiber->value = result;
        tsan_release(&fiber->value);
        block.wake(*fiber);
    }
    barrier = {};
    return result;
}

uint32_t arrive(uint32_t id, uint32_t expected, Vote vote, bool predicate, Place place) {
    Block& block = this_block();
    Fiber& self = this_fiber();
    Barrier& barrier = block.barriers[id];
    if (barrier.arrived == 0) {
        barrier.expected = expected;
        barrier.vote = vote;
        barrier.place = place;
    }
    if (barrier.expected != expected)
        block.fail("comes to barrier " + std::to_string(id) + " for " + std::to_string(expected) +
                       " threads, where others wait for " + std::to_string(barrier.expected),
                   place);
    const bool elsewhere = barrier.place.line != place.line || barrier.place.file != place.file;
    if (id == 0 && (elsewhere || barrier.vote != vote))
        block.fail("divergent barrier: other threads wait at another __syncthreads" + text_of(barrier.place), place);
    barrier.count += predicate;
    if (++barrier.arrived == expected) {
        const uint32_t result = release(block, self, barrier);
        if (block.view.seed != 0) block.yield(self);
        return result;
    }
    self.next_waiting = barrier.waiting;
    barrier.waiting = &self;
    tsan_release(&self);
    block.park(self, {false, id, expected, Collective::sync, place});
    tsan_acquire(&self.value);
    return uint32_t(self.value);
}

// ---- warp collectives ---------------------------------------------------------------------------

struct Members {
    Fiber* lanes;  // the warp's first fiber
    uint32_t mask;

    template <typename Visit>
    void each(Visit visit) const {
        for (uint32_t left = mask; left != 0; left &= left - 1) visit(lanes[__builtin_ctz(left)]);
    }
};

uint32_t combine(Collective operation, uint32_t a, uint32_t b) {
    switch (operation) {
        case Collective::add:
            return a + b;
        case Collective::min_signed:
            return int32_t(a) < int32_t(b) ? a : b;
        case Collective::max_signed:
            return int32_t(a) > int32_t(b) ? a : b;
        case Collective::min_unsigned:
            return a < b ? a : b;
        case Collective::max_unsigned:
            return a > b ? a : b;
        case Collective::bit_and:
            return a & b;
        case Collective::bit_or:
            return a | b;
        default:
            return a ^ b;
    }
}

void give_each(Members members, uint64_t result) {
    members.each([&](Fiber& fiber) { fiber.value = result; });
}

void shuffle(Members members) {
    uint64_t brought[kLanes];
    for (uint64_t& value : brought) value = kUndefined;
    members.each([&](Fiber& fiber) { brought[fiber.lane()] = fiber.value; });
    members.each([&](Fiber& fiber) { fiber.value = brought[fiber.source]; });
}

void match_any(Members members) {
    uint32_t equal[kLanes] = {};
    members.each([&](Fiber& fiber) {
        members.each([&](Fiber& other) {
            if (other.value == fiber.value) equal[fiber.lane()] |= other.lane_bit();
        });
    });
    members.each([&](Fiber& fiber) { fiber.value = equal[fiber.lane()]; });
}

void reduce(Members members, Collective operation) {
    bool first = true;
    uint32_t total = 0;
    members.each([&](Fiber& fiber) {
        total = first ? uint32_t(fiber.value) : combine(operation, total, uint32_t(fiber.value));
        first = false;
    });
    give_each(members, total);
}

void match_all(Members members) {
    const uint64_t first = members.lanes[__builtin_ctz(members.mask)].value;
    bool same = true;
    members.each([&](Fiber& fiber) { same &= fiber.value == first; });
    give_each(members, same ? members.mask : 0);
}

void compute(Collective operation, Members members) {
    uint32_t ballot = 0;
    switch (operation) {
        case Collective::sync:
            return;
        case Collective::shuffle:
            return shuffle(members);
        case Collective::match_any:
            return match_any(members);
        case Collective::match_all:
            return match_all(members);
        case Collective::ballot:
        case Collective::any:
        case Collective::all:
            members.each([&](Fiber& fiber) { ballot |= fiber.value ? fiber.lane_bit() : 0; });
            if (operation == Collective::any) return give_each(members, ballot != 0);
            if (operation == Collective::all) return give_each(members, ballot == members.mask);
            return give_each(members, ballot);
        default:
            return reduce(members, operation);
    }
}

// Only __syncwarp orders memory; the others deliver their values and nothing else.
void release(Block& block, Fiber& last, Collective operation, Members members) {
    compute(operation, members);
    uint64_t acquired = 0;
    members.each([&](Fiber& fiber) {
        acquired = std::max(acquired, fiber.acquired);
        if (operation == Collective::sync && &fiber != &last) tsan_acquire(&fiber);
    });
    members.each([&](Fiber& fiber) {
        fiber.acquired = acquired;
        if (&fiber == &last) return;
        if (operation == Collective::sync) tsan_release(&fiber.value);
        block.wake(fiber);
    });
}

void check_mask(Block& block, const Warp& warp, const Fiber& self, Collective operation, uint32_t mask, Place place) {
    const std::string call = std::string(name_of(operation)) + " with mask " + in_hex(mask);
    if (!(mask & self.lane_bit())) block.fail(call + ", which leaves out the calling lane", place);
    if (mask & warp.exited) block.fail(call + " names lanes that exited: " + in_hex(mask & warp.exited), place);
}

// The place of this collective in the warp's list; a new one if this lane is the first to come.
std::size_t find_meeting(Block& block, Warp& warp, const Fiber& self, Collective operation, uint32_t mask,
                         Place place) {
    for (std::size_t i = 0; i < warp.meetings.size(); ++i) {
        const Meeting& other = warp.meetings[i];
        if (other.mask == mask && other.operation == operation) return i;
        const bool expects_us = other.mask & self.lane_bit();
        const bool expected_by_us = mask & other.arrived;
        if (expects_us && expected_by_us)
            block.fail(std::string("comes to ") + name_of(operation) + " with mask " + in_hex(mask) + ", but lanes " +
                           in_hex(other.arrived) + " wait for it in " + name_of(other.operation) + " with mask " +
                           in_hex(other.mask),
                       place);
    }
    warp.meetings.push_back({mask, 0, operation});
    return warp.meetings.size() - 1;
}

}  // namespace

unsigned block_barrier(Vote vote, int predicate, Place place) {
    return arrive(0, this_block().view.size.x, vote, predicate != 0, place);
}

void named_barrier(unsigned id, unsigned threads, Place place) {
    Block& block = this_block();
    if (id == 0 || id >= kBarriers) block.fail("barrier_sync takes ids 1 to 15, not " + std::to_string(id), place);
    if (threads == 0 || threads % kLanes != 0 || threads > block.view.size.x)
        block.fail("barrier_sync for " + std::to_string(threads) +
                       " threads: it takes a multiple of 32, at most the block's threads",
                   place);
    arrive(id, threads, Vote::none, false, place);
}

unsigned long long collective(Collective operation, unsigned mask, unsigned long long value, unsigned source,
                              Place place) {
    Block& block = this_block();
    Fiber& self = this_fiber();
    Warp& warp = block.warps[self.number / kLanes];
    if (!(mask & self.lane_bit()) || (mask & warp.exited)) check_mask(block, warp, self, operation, mask, place);
    self.value = value;
    self.source = source;
    const std::size_t index = find_meeting(block, warp, self, operation, mask, place);
    Meeting& meeting = warp.meetings[index];
    meeting.arrived |= self.lane_bit();
    if (meeting.arrived == (mask & warp.existing)) {
        const Members members{&block.fibers[self.number - self.lane()], meeting.arrived};
        warp.meetings.erase(warp.meetings.begin() + long(index));
        release(block, self, operation, members);
        if (block.view.seed != 0) {
            const uint64_t result = self.value;
            block.yield(self);
            return result;
        }
        return self.value;
    }
    if (operation == Collective::sync) tsan_release(&self);
    block.park(self, {true, mask, 0, operation, place});
    if (operation == Collective::sync) tsan_acquire(&self.value);
    return self.value;
}

const char* name_of(Collective operation) {
    switch (operation) {
        case Collective::sync:
            return "__syncwarp";
        case Collective::shuffle:
            return "a shuffle";
        case Collective::ballot:
            return "__ballot_sync";
        case Collective::any:
            return "__any_sync";
        case Collective::all:
            return "__all_sync";
        case Collective::match_any:
            return "__match_any_sync";
        case Collective::match_all:
            return "__match_all_sync";
        default:
            return "a __reduce_sync";
    }
}

}  // namespace moegen::host
