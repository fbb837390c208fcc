// SPDX-License-Identifier: Apache-2.0
// One parameter struct for all kernels of these tests; what a field means is each kernel's own affair.
#pragma once

#include <moegen/ptx.cuh>

struct Params {
    uint32_t* out;
    uint8_t* a;
    uint8_t* b;
    uint32_t n;
    uint32_t flag;
};

using namespace moegen;
