// SPDX-License-Identifier: Apache-2.0
// The asynchronous proxy: bulk copies are queued and made as late as their wait allows, or at a seeded moment before.
#include <algorithm>
#include <cstring>
#include <moegen/block.hpp>

namespace moegen::host {

namespace {

constexpr int64_t kMaxPhaseBytes = (1 << 20) - 1;  // PTX ISA, mbarrier: range of the tx-count
constexpr uint32_t kMaxArrivals = kMaxThreads;

bool is_multiple_of_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void check_copy(Block& block, const void* shared, const void* global, uint32_t bytes, const char* name, Place place) {
    if (!is_multiple_of_16(shared) || !is_multiple_of_16(global))
        block.fail(std::string(name) + " from or to an address that is not a multiple of 16", place);
    if (bytes == 0 || bytes % 16 != 0)
        block.fail(std::string(name) + " of " + std::to_string(bytes) + " bytes, which is not a multiple of 16", place);
    block.check_shared(shared, bytes, name, place);
}

template <typename T>
void erase_at(std::vector<T>& list, std::size_t index) {
    list.erase(list.begin() + long(index));
}

}  // namespace

// ---- mbarriers ----------------------------------------------------------------------------------

// The word in shared memory holds the block's serial number and the barrier's place in the block's list.
Mbarrier& Block::find_mbarrier(const unsigned long long* word, Place place) {
    const uint64_t content = *word;
    const uint32_t index = uint32_t(content);
    if (content >> 32 != serial || index >= mbarriers.size() || mbarriers[index].address != word)
        fail("uses an mbarrier before mbarrier_init, or after its 8 bytes were overwritten", place);
    return mbarriers[index];
}

void Block::finish_phase_if_due(Mbarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.parity ^= 1;
    barrier.pending = barrier.arrivals;
    barrier.acquired_done = barrier.acquired_now;
    barrier.acquired_now = 0;
    progressed();
}

void mbarrier_init(unsigned long long* word, unsigned arrivals, Place place) {
    Block& block = this_block();
    if (reinterpret_cast<uintptr_t>(word) % 8 != 0)
        block.fail("mbarrier_init at an address not a multiple of 8", place);
    block.check_shared(word, 8, "an mbarrier", place);
    if (arrivals == 0 || arrivals > kMaxArrivals) block.fail("mbarrier_init takes 1 to 1024 arrivals", place);
    for (const Mbarrier& barrier : block.mbarriers)
        if (barrier.address == word) block.fail("mbarrier_init of an mbarrier that is in use", place);
    *word = uint64_t(block.serial) << 32 | block.mbarriers.size();
    block.mbarriers.push_back({word, arrivals, arrivals, 0, 0, 0, 0, {}});
}

void mbarrier_arrive(unsigned long long* word, unsigned bytes, Place place) {
    switch_point();
    Block& block = this_block();
    Fiber& self = this_fiber();
    Mbarrier& barrier = block.find_mbarrier(word, place);
    if (barrier.pending == 0) block.fail("more arrivals in a phase than mbarrier_init announced", place);
    barrier.bytes += bytes;
    if (barrier.bytes > kMaxPhaseBytes) block.fail("an mbarrier's phase expects more than 1,048,575 bytes", place);
    barrier.acquired_now = std::max(barrier.acquired_now, self.acquired);
    tsan_release(&barrier.order[barrier.parity]);
    --barrier.pending;
    block.finish_phase_if_due(barrier);
}

bool mbarrier_test(unsigned long long* word, unsigned parity, Place place) {
    switch_point();
    Block& block = this_block();
    Fiber& self = this_fiber();
    Mbarrier& barrier = block.find_mbarrier(word, place);
    if (parity > 1) block.fail("mbarrier_test takes parity 0 or 1", place);
    const uint32_t index = uint32_t(*word);
    for (std::size_t i = 0; barrier.parity == parity && barrier.pending == 0 && i < block.loads.size();)
        block.loads[i].mbarrier == index ? block.make_load(i) : void(++i);
    const bool done = barrier.parity != parity;
    note_load(word, done, false, place);
    if (done) {
        self.acquired = std::max(self.acquired, barrier.acquired_done);
        tsan_acquire(&barrier.order[parity]);
    }
    return done;
}

// ---- loads --------------------------------------------------------------------------------------

void fence_proxy() { this_fiber().fenced = this_fiber().acquired; }

void bulk_load(void* shared, const void* global, unsigned bytes, unsigned long long* word, Place place) {
    Block& block = this_block();
    Fiber& self = this_fiber();
    check_copy(block, shared, global, bytes, "bulk_load", place);
    if (self.acquired > self.fenced) block.fail("bulk load after an acquire without fence_proxy_async", place);
    block.find_mbarrier(word, place);
    block.loads.push_back({shared, global, bytes, uint32_t(*word), &self});
    switch_point();
}

void Block::make_load(std::size_t index) {
    const BulkLoad load = loads[index];
    erase_at(loads, index);
    Mbarrier& barrier = mbarriers[load.mbarrier];
    run_as(load.owner->context, [&] {
        std::memcpy(load.shared, load.global, load.bytes);
        tsan_release(&barrier.order[barrier.parity]);
    });
    barrier.bytes -= load.bytes;
    finish_phase_if_due(barrier);
}

// ---- stores -------------------------------------------------------------------------------------

void bulk_store(void* global, const void* shared, unsigned bytes, Place place) {
    Block& block = this_block();
    Fiber& self = this_fiber();
    check_copy(block, shared, global, bytes, "bulk_store", place);
    block.stores.push_back({global, shared, bytes, self.committed_groups, &self, nullptr});
    switch_point();
}

void bulk_commit() { ++this_fiber().committed_groups; }

void Block::read_store(BulkStore& store) {
    if (store.staged) return;
    store.staged = std::make_unique_for_overwrite<unsigned char[]>(store.bytes);
    run_as(store.owner->context, [&] { std::memcpy(store.staged.get(), store.shared, store.bytes); });
}

void Block::make_store(std::size_t index) {
    read_store(stores[index]);
    const BulkStore store = std::move(stores[index]);
    erase_at(stores, index);
    run_as(store.owner->context, [&] { std::memcpy(store.global, store.staged.get(), store.bytes); });
}

void bulk_wait(unsigned pending, bool only_reads) {
    Block& block = this_block();
    Fiber& self = this_fiber();
    for (std::size_t i = 0; i < block.stores.size();) {
        BulkStore& store = block.stores[i];
        const bool due = store.owner == &self && store.group + pending < self.committed_groups;
        if (due && !only_reads) {
            block.make_store(i);
            continue;
        }
        if (due) block.read_store(store);
        ++i;
    }
    switch_point();
}

// At the end of a thread: a store whose shared memory was waited for may still be on its way, others may not.
void Block::drain_stores(Fiber& self) {
    for (std::size_t i = 0; i < stores.size();) {
        const BulkStore& store = stores[i];
        if (store.owner != &self) {
            ++i;
            continue;
        }
        if (store.group >= self.committed_groups)
            fail("exits with a bulk store that was not committed", Place(nullptr, 0));
        if (!store.staged) fail("exits with a bulk store that was not waited for", Place(nullptr, 0));
        make_store(i);
    }
}

// ---- seeded moments -----------------------------------------------------------------------------

void Block::make_some_bulk_copy() {
    if (!random.one_in(8)) return;
    const uint32_t chosen = random.below(uint32_t(loads.size() + stores.size()));
    if (chosen < loads.size())
        make_load(chosen);
    else
        make_store(chosen - loads.size());
}

}  // namespace moegen::host
