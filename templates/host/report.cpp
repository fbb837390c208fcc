// SPDX-License-Identifier: Apache-2.0
// Texts of errors.
#include <cstdio>
#include <cstring>
#include <map>
#include <moegen/block.hpp>

namespace moegen::host {

namespace {

// "0-31, 64"
std::string ranges_of(const std::vector<uint32_t>& ascending) {
    std::string text;
    for (std::size_t i = 0; i < ascending.size();) {
        std::size_t end = i + 1;
        while (end < ascending.size() && ascending[end] == ascending[end - 1] + 1) ++end;
        text += (text.empty() ? "" : ", ") + std::to_string(ascending[i]);
        if (end - i > 1) text += "-" + std::to_string(ascending[end - 1]);
        i = end;
    }
    return text;
}

std::string describe(const Wait& wait, const Block& block) {
    char mask[16];
    std::snprintf(mask, sizeof mask, "0x%08x", wait.id_or_mask);
    if (wait.in_collective)
        return std::string("wait in ") + name_of(wait.operation) + " with mask " + mask + text_of(wait.place);
    const std::string came = std::to_string(block.barriers[wait.id_or_mask].arrived) + " of " +
                             std::to_string(wait.expected) + " threads came";
    const std::string which =
        wait.id_or_mask == 0 ? "__syncthreads" : "barrier_sync " + std::to_string(wait.id_or_mask);
    return "wait at " + which + " (" + came + ")" + text_of(wait.place);
}

}  // namespace

std::string text_of(Place place) {
    if (place.file == nullptr) return "";
    const char* slash = std::strrchr(place.file, '/');
    return std::string(", ") + (slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string Block::describe_waits() const {
    std::map<std::string, std::vector<uint32_t>> groups;
    for (const Fiber& fiber : fibers)
        groups[fiber.state == State::exited ? "exited" : describe(fiber.wait, *this)].push_back(fiber.number);
    std::string text;
    for (const auto& [what, threads] : groups)
        text += (text.empty() ? ": " : "; ") + std::string("threads ") + ranges_of(threads) + " " + what;
    return text;
}

void Launch::record_failure(const std::string& text) {
    const std::lock_guard lock(mutex);
    if (failed.load(std::memory_order_relaxed)) return;
    error = text;
    failed.store(true, std::memory_order_relaxed);
}

}  // namespace moegen::host
