// SPDX-License-Identifier: Apache-2.0
// A block under way: its fibers, whom each waits for, and what is queued in its asynchronous proxy.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <moegen/fiber.hpp>
#include <moegen/simt.hpp>
#include <mutex>
#include <string>
#include <vector>

namespace moegen::host {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kMaxThreads = 1024;
constexpr uint32_t kMaxBlocks = 256;
constexpr uint32_t kMaxShared = 232448;
constexpr uint32_t kBarriers = 16;

// What a launch's blocks share.
struct Launch {
    const moegen_host_kernel* kernel = nullptr;
    moegen_host_launch request = {};
    std::atomic<bool> failed = false;
    std::mutex mutex;
    std::condition_variable block_done;
    uint32_t running = 0;
    std::string error;

    void record_failure(const std::string& text);
};

struct Random {
    uint64_t state = 0;
    uint64_t next();
    uint32_t below(uint32_t limit) { return uint32_t((next() >> 32) * limit >> 32); }
    bool one_in(uint32_t count) { return below(count) == 0; }
};

enum class State : uint8_t { runnable, paused, waiting, exited };

// Why a fiber waits, for the text of a deadlock.
struct Wait {
    bool in_collective = false;
    uint32_t id_or_mask = 0;
    uint32_t expected = 0;
    Collective operation = Collective::sync;
    Place place;
};

struct Fiber : FiberView {
    uint32_t number = 0;
    State state = State::runnable;
    Wait wait;
    Fiber* next_waiting = nullptr;

    uint64_t value = 0;  // what it brings to a collective, and what it takes from it
    uint32_t source = 0;

    // Acquires are counted over the block: a fence covers all that the fiber knew of when it fenced.
    uint64_t acquired = 0, fenced = 0;

    uint64_t polls = 0, polls_before_pause = 0;  // digests of what it loaded since, and before, the last pause
    const void* last_address = nullptr;
    uint64_t last_value = 0;
    uint32_t repeats = 0;

    uint32_t committed_groups = 0;
    Context context;

    uint32_t lane() const { return number % kLanes; }
    uint32_t lane_bit() const { return 1u << lane(); }
};

struct Barrier {
    uint32_t expected = 0, arrived = 0, count = 0;
    Vote vote = Vote::none;
    Place place;
    Fiber* waiting = nullptr;
};

struct Meeting {  // a warp collective that has begun
    uint32_t mask, arrived;
    Collective operation;
};

struct Warp {
    uint32_t existing = 0, exited = 0;
    std::vector<Meeting> meetings;
};

struct Mbarrier {
    const unsigned long long* address;
    uint32_t arrivals, pending;
    int64_t bytes;    // that bulk loads still owe to this phase
    uint32_t parity;  // of the phase under way
    uint64_t acquired_now, acquired_done;
    uint64_t order[2];  // addresses for ThreadSanitizer, by parity
};

struct BulkLoad {
    void* shared;
    const void* global;
    uint32_t bytes, mbarrier;
    Fiber* owner;
};

struct BulkStore {
    void* global;
    const void* shared;
    uint32_t bytes, group;
    Fiber* owner;
    std::unique_ptr<unsigned char[]> staged;  // its bytes, once the shared memory has been read
};

class RunQueue {
  public:
    void reset(std::size_t capacity) { ring_.assign(capacity, nullptr), head_ = size_ = 0; }
    bool empty() const { return size_ == 0; }
    uint32_t size() const { return size_; }
    void push(Fiber* fiber) { ring_[wrap(head_ + size_++)] = fiber; }
    Fiber* pop();
    // Brings a member chosen by `random` to the front.
    void shuffle_front(Random& random);

  private:
    std::size_t wrap(std::size_t index) const { return index < ring_.size() ? index : index - ring_.size(); }
    std::vector<Fiber*> ring_;
    std::size_t head_ = 0;
    uint32_t size_ = 0;
};

// Memory of a block, kept by its OS thread for the next block.
class SharedMemory {
  public:
    ~SharedMemory();
    bool prepare(uint32_t bytes);
    bool intact() const;
    unsigned char* begin() const { return memory_; }

  private:
    unsigned char* memory_ = nullptr;
    uint32_t bytes_ = 0, capacity_ = 0;
};

class Block {
  public:
    void run(Launch& launch, uint32_t index);

    // Called from fibers.
    void pause(Fiber& self);
    void yield(Fiber& self);
    void park(Fiber& self, const Wait& wait);
    void wake(Fiber& fiber);
    void exit(Fiber& self);
    [[noreturn]] void fail(std::string text, Place place);
    void progressed() { progress_ = true; }

    // bulk.cpp
    Mbarrier& find_mbarrier(const unsigned long long* word, Place place);
    void finish_phase_if_due(Mbarrier& barrier);
    void make_load(std::size_t index);
    void read_store(BulkStore& store);
    void make_store(std::size_t index);
    void make_some_bulk_copy();
    void drain_stores(Fiber& self);
    void check_shared(const void* pointer, uint32_t bytes, const char* text, Place place);

    std::string describe_waits() const;  // report.cpp

    BlockView view;
    Launch* launch = nullptr;
    Random random;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::array<Barrier, kBarriers> barriers;
    uint64_t acquires = 0;

    std::vector<Mbarrier> mbarriers;
    std::vector<BulkLoad> loads;
    std::vector<BulkStore> stores;
    uint32_t serial = 0;  // tells this block's mbarriers from what an earlier one left in the same memory

  private:
    bool prepare(uint32_t index);
    void poison_static_shared();
    void check_end();
    Fiber* choose();
    void start_round();
    void leave(Fiber& self, bool ends);
    [[noreturn]] void abandon(Fiber& self);
    static void run_fiber(void* fiber);

    Stacks stacks_;
    Context main_;
    SharedMemory shared_;
    unsigned char* static_shared_ = nullptr;
    std::size_t static_bytes_ = 0;
    RunQueue runnable_, paused_;
    uint32_t live_ = 0, switches_ = 0, idle_rounds_ = 0;
    bool progress_ = false;
};

// The block and fiber that this OS thread executes.
Block& this_block();
Fiber& this_fiber();
const char* name_of(Collective operation);
std::string text_of(Place place);

}  // namespace moegen::host
