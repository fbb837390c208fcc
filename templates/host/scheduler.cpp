// SPDX-License-Identifier: Apache-2.0
// Which fiber of a block runs next.
#include <sched.h>
#include <time.h>

#include <moegen/block.hpp>
#include <utility>

namespace moegen::host {

constinit thread_local FiberView* current_fiber = nullptr;

namespace {

constexpr uint32_t kYieldsBeforeSleep = 8;
constexpr uint32_t kLongestSleepShift = 8;  // 1 us << 8 = 256 us
// Fibers that run on without polling may not keep the polling ones from their turn for ever.
constexpr uint32_t kSwitchesPerThread = 16;
// A loop that polls without poll_pause() would keep the whole block from running.
constexpr uint32_t kMaxRepeats = 1u << 24;

void sleep_ns(long nanoseconds) {
    const timespec duration = {0, nanoseconds};
    nanosleep(&duration, nullptr);
}

void idle_wait(uint32_t round) {
    if (round < kYieldsBeforeSleep) {
        sched_yield();
        return;
    }
    const uint32_t shift = round - kYieldsBeforeSleep;
    sleep_ns(1000l << (shift < kLongestSleepShift ? shift : kLongestSleepShift));
}

}  // namespace

uint64_t Random::next() {  // SplitMix64 (Steele, Lea, Flood, 2014)
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

Fiber* RunQueue::pop() {
    Fiber* fiber = ring_[head_];
    head_ = wrap(head_ + 1);
    --size_;
    return fiber;
}

void RunQueue::shuffle_front(Random& random) { std::swap(ring_[head_], ring_[wrap(head_ + random.below(size_))]); }

Fiber& this_fiber() { return static_cast<Fiber&>(*current_fiber); }

// ---- choosing -----------------------------------------------------------------------------------

// Null if the block is over.
Fiber* Block::choose() {
    for (;;) {
        if (launch->failed.load(std::memory_order_relaxed)) return nullptr;
        if (view.seed != 0 && !(loads.empty() && stores.empty())) make_some_bulk_copy();
        const bool round_due = !paused_.empty() && ++switches_ > kSwitchesPerThread * view.size.x;
        if (!runnable_.empty() && !round_due) {
            if (view.seed != 0) runnable_.shuffle_front(random);
            return runnable_.pop();
        }
        if (runnable_.empty() && paused_.empty()) {
            if (live_ != 0)
                launch->record_failure("deadlock in block " + std::to_string(view.index.x) + describe_waits());
            return nullptr;
        }
        start_round();
    }
}

// Every fiber that can run at all is polling: gives the processor to other OS threads, then lets each poll again.
void Block::start_round() {
    if (progress_ || !runnable_.empty())
        idle_rounds_ = 0;
    else
        idle_wait(idle_rounds_++);
    progress_ = false;
    switches_ = 0;
    while (!paused_.empty()) {
        Fiber* fiber = paused_.pop();
        fiber->state = State::runnable;
        runnable_.push(fiber);
    }
}

void Block::leave(Fiber& self, bool ends) {
    Fiber* next = choose();
    if (next == &self) return;
    if (next == nullptr) {
        switch_context(self.context, main_, true);
        __builtin_unreachable();
    }
    current_fiber = next;
    switch_context(self.context, next->context, ends);
}

void Block::abandon(Fiber& self) {
    switch_context(self.context, main_, true);
    __builtin_unreachable();
}

void Block::pause(Fiber& self) {
    self.state = State::paused;
    paused_.push(&self);
    leave(self, false);
}

void Block::yield(Fiber& self) {
    runnable_.push(&self);
    leave(self, false);
}

void Block::park(Fiber& self, const Wait& wait) {
    self.state = State::waiting;
    self.wait = wait;
    leave(self, false);
}

void Block::wake(Fiber& fiber) {
    fiber.state = State::runnable;
    runnable_.push(&fiber);
}

void Block::fail(std::string text, Place place) {
    Fiber& self = this_fiber();
    launch->record_failure("block " + std::to_string(view.index.x) + ", thread " + std::to_string(self.number) + ": " +
                           text + text_of(place));
    std::string().swap(text);  // this frame is never left
    abandon(self);
}

void Block::exit(Fiber& self) {
    drain_stores(self);
    Warp& warp = warps[self.number / kLanes];
    for (const Meeting& meeting : warp.meetings)
        if (meeting.mask & self.lane_bit())
            fail(std::string("exited, but other lanes wait for it in ") + name_of(meeting.operation),
                 Place(nullptr, 0));
    warp.exited |= self.lane_bit();
    self.state = State::exited;
    progress_ = true;
    --live_;
    leave(self, true);
}

void Block::run_fiber(void* argument) {
    enter_context();
    Fiber& self = *static_cast<Fiber*>(argument);
    Block& block = this_block();
    block.launch->kernel->thread(block.launch->request.params);
    block.exit(self);
}

// ---- the whole block ----------------------------------------------------------------------------

void Block::run(Launch& its_launch, uint32_t index) {
    launch = &its_launch;
    if (!prepare(index)) return;
    Fiber* first = choose();
    if (first != nullptr) {
        current_fiber = first;
        switch_context(main_, first->context, false);
        current_fiber = nullptr;
    }
    for (Fiber& fiber : fibers) {
        run_as(fiber.context, [this] { tsan_release(this); });
        discard_context(fiber.context);
    }
    tsan_acquire(this);
    check_end();
}

bool Block::prepare(uint32_t index) {
    const moegen_host_launch& request = launch->request;
    const uint32_t threads = request.block;
    if (!stacks_.reserve(threads) || !shared_.prepare(request.shared_bytes)) {
        launch->record_failure("no memory for the stacks of " + std::to_string(threads) +
                               " threads (each takes 64 KiB of address space and two mappings; see vm.max_map_count)");
        return false;
    }
    view.index.x = index;
    view.size = {threads, 1, 1};
    view.grid = {request.grid, 1, 1};
    view.dynamic_shared = shared_.begin();
    view.seed = request.seed;
    random.state = request.seed + index * 0xd1342543de82ef95u;
    static std::atomic<uint32_t> serials = 0;
    serial = serials.fetch_add(1, std::memory_order_relaxed) * 0x9e3779b1u ^ 0x6d6f6567u;
    poison_static_shared();
    if (main_.stack_pointer == nullptr) describe_this_thread(main_);

    barriers = {};
    warps.assign((threads + kLanes - 1) / kLanes, {});
    mbarriers.clear(), loads.clear(), stores.clear();
    mbarriers.reserve(64);
    acquires = 0;
    runnable_.reset(threads), paused_.reset(threads);
    live_ = threads, switches_ = idle_rounds_ = 0, progress_ = false;
    fibers.clear();
    fibers.resize(threads);
    for (uint32_t i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.number = i;
        fiber.thread.x = i;
        fiber.block = &view;
        warps[i / kLanes].existing |= fiber.lane_bit();
        prepare_context(fiber.context, stacks_.lowest(i), i, run_fiber, &fiber);
        runnable_.push(&fiber);
    }
    return true;
}

void Block::check_end() {
    const std::string where = "block " + std::to_string(view.index.x);
    if (!launch->failed.load(std::memory_order_relaxed) && !loads.empty())
        launch->record_failure(where + " ended while bulk loads were under way");
    if (!shared_.intact()) launch->record_failure(where + " wrote beyond its dynamic shared memory");
}

// ---- what kernels call --------------------------------------------------------------------------

void fail(const char* text, Place place) { this_block().fail(text, place); }

void poll_pause() {
    Fiber& self = this_fiber();
    if (self.polls != self.polls_before_pause || self.stores != 0) this_block().progressed();
    self.polls_before_pause = self.polls;
    self.polls = self.stores = 0;
    self.repeats = 0;
    this_block().pause(self);
}

void note_load(const void* address, unsigned long long value, bool acquired, Place place) {
    Fiber& self = this_fiber();
    if (acquired) self.acquired = ++this_block().acquires;
    self.polls = (self.polls ^ reinterpret_cast<uint64_t>(address) ^ value) * 0x9e3779b97f4a7c15u;
    self.repeats = address == self.last_address && value == self.last_value ? self.repeats + 1 : 0;
    self.last_address = address;
    self.last_value = value;
    if (self.repeats > kMaxRepeats) fail("polls for ever without poll_pause()", place);
}

void may_switch() {
    Block& block = this_block();
    if (block.random.one_in(8)) block.yield(this_fiber());
}

void may_pause(unsigned one_in) {
    Block& block = this_block();
    if (!block.random.one_in(one_in)) return may_switch();
    sleep_ns(1000 + block.random.below(49000));
}

unsigned long long clock_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

}  // namespace moegen::host
