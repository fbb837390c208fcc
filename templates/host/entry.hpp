// SPDX-License-Identifier: Apache-2.0
// The entry point of a kernel compiled for the CPU. A generated wrapper is
//     #include "<stem>.cu"
//     #include <moegen/entry.hpp>
//     MOEGEN_HOST_ENTRY(moegen_<stem>, Params)
// and defines `moegen_launch`, a moegen_host_entry, and `moegen_launch_params_bytes()`, for callers that fill Params
// by hand. MOEGEN_HOST_ENTRY_AS gives them another name, where several kernels share a library or an executable.
#pragma once

#include <moegen/simt.hpp>

// Found in the library's thread-local memory, which is then known to be its `__shared__` variables.
static thread_local unsigned char moegen_host_shared_anchor;

#define MOEGEN_HOST_ENTRY(kernel, Params) MOEGEN_HOST_ENTRY_AS(moegen_launch, kernel, Params)

// An executable may hold many kernels, whose helpers can have one name and different contents. Every object is then
// linked by itself (g++ -r -nostdlib -Wl,--force-group-allocation) and all but its entry made local
// (objcopy --wildcard --keep-global-symbol='moegen_launch_*').
// Everything but the entry is static: Params is another type in every kernel, and an executable may hold many.
#define MOEGEN_HOST_ENTRY_AS(name, kernel, Params)                                                                   \
    static_assert(sizeof(Params) <= 32764, "a GPU takes at most 32,764 bytes of kernel parameters");                 \
    static void name##_thread(const void* params) { kernel(*static_cast<const Params*>(params)); }                   \
    static void* name##_shared_anchor() { return &moegen_host_shared_anchor; }                                       \
    extern "C" __attribute__((visibility("default"))) unsigned long name##_params_bytes() { return sizeof(Params); } \
    extern "C" __attribute__((visibility("default"))) int name(const moegen_host_launch* launch, char* error,        \
                                                               unsigned long error_bytes) {                          \
        static moegen_host_kernel description = {name##_thread, name##_shared_anchor, 0, 0, 0};                      \
        return moegen_host_run(&description, launch, error, error_bytes);                                            \
    }                                                                                                                \
    static_assert(true)
