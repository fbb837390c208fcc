// SPDX-License-Identifier: Apache-2.0
// Shared memory of a block: a poison pattern before it begins, a margin behind it that must stay as it was.
#include <link.h>

#include <cstdlib>
#include <cstring>
#include <moegen/block.hpp>

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace moegen::host {

namespace {

// NaN as float, bfloat16 and half, and as an integer larger than any index.
constexpr uint16_t kPoison = 0x7fb7;
constexpr unsigned char kMargin = 0xd5;
constexpr uint32_t kMarginBytes = 256;
constexpr uint32_t kAlignment = 128;

void poison(unsigned char* memory, std::size_t bytes) {
    for (std::size_t i = 0; i + 1 < bytes; i += 2) std::memcpy(memory + i, &kPoison, 2);
}

bool detect_whole_accesses() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx");
#else
    constexpr unsigned long kLse2 = 1ul << 25;  // HWCAP_USCAT
    return (getauxval(AT_HWCAP) & kLse2) != 0;
#endif
}

// The thread-local memory that one loaded object has in the calling thread.
struct ThreadMemory {
    uintptr_t holds;
    unsigned char* begin = nullptr;
    std::size_t bytes = 0;
};

int match_object(dl_phdr_info* object, std::size_t, void* data) {
    auto& wanted = *static_cast<ThreadMemory*>(data);
    const auto begin = reinterpret_cast<uintptr_t>(object->dlpi_tls_data);
    if (begin == 0) return 0;
    for (int i = 0; i < object->dlpi_phnum; ++i) {
        const auto& header = object->dlpi_phdr[i];
        if (header.p_type != PT_TLS || wanted.holds < begin || wanted.holds >= begin + header.p_memsz) continue;
        wanted.begin = static_cast<unsigned char*>(object->dlpi_tls_data);
        wanted.bytes = header.p_memsz;
        return 1;
    }
    return 0;
}

ThreadMemory thread_memory_of(const void* variable) {
    ThreadMemory found{reinterpret_cast<uintptr_t>(variable)};
    dl_iterate_phdr(match_object, &found);
    return found;
}

// Once per kernel library, whose fields it fills. An executable has this thread-local memory in common with the
// runtime: then it holds more than `__shared__` variables and stays untouched.
void inspect(moegen_host_kernel& kernel, unsigned char* anchor) {
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    if (kernel.inspected) return;
    const ThreadMemory memory = thread_memory_of(anchor);
    const auto runtime = reinterpret_cast<uintptr_t>(&current_fiber) - reinterpret_cast<uintptr_t>(memory.begin);
    if (memory.begin != nullptr && runtime >= memory.bytes) {
        kernel.anchor_offset = std::size_t(anchor - memory.begin);
        kernel.static_bytes = memory.bytes;
    }
    __atomic_store_n(&kernel.inspected, 1, __ATOMIC_RELEASE);
}

}  // namespace

const bool has_whole_accesses = detect_whole_accesses();

void Block::poison_static_shared() {
    auto& kernel = const_cast<moegen_host_kernel&>(*launch->kernel);
    auto* anchor = static_cast<unsigned char*>(kernel.shared_anchor());
    if (!__atomic_load_n(&kernel.inspected, __ATOMIC_ACQUIRE)) inspect(kernel, anchor);
    static_bytes_ = kernel.static_bytes;
    static_shared_ = anchor - kernel.anchor_offset;
    poison(static_shared_, static_bytes_);
}

void Block::check_shared(const void* pointer, uint32_t bytes, const char* text, Place place) {
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    const auto within = [&](const unsigned char* begin, std::size_t size) {
        const auto from = reinterpret_cast<uintptr_t>(begin);
        return address >= from && address + bytes <= from + size;
    };
    if (within(shared_.begin(), launch->request.shared_bytes)) return;
    if (static_bytes_ == 0 || within(static_shared_, static_bytes_)) return;
    fail(std::string(text) + " does not lie within the block's shared memory", place);
}

bool SharedMemory::prepare(uint32_t bytes) {
    const uint32_t needed = (bytes + kMarginBytes + kAlignment - 1) / kAlignment * kAlignment;
    if (needed > capacity_) {
        std::free(memory_);
        memory_ = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, needed));
        capacity_ = memory_ == nullptr ? 0 : needed;
        if (memory_ == nullptr) return false;
    }
    bytes_ = bytes;
    poison(memory_, bytes);
    std::memset(memory_ + bytes, kMargin, kMarginBytes);
    return true;
}

bool SharedMemory::intact() const {
    for (uint32_t i = 0; i < kMarginBytes; ++i)
        if (memory_[bytes_ + i] != kMargin) return false;
    return true;
}

SharedMemory::~SharedMemory() { std::free(memory_); }

}  // namespace moegen::host
