// SPDX-License-Identifier: Apache-2.0
// Conversions between stored numbers and the fp32 in which all sums are formed.
#pragma once

#include <moegen/ptx.cuh>

namespace moegen {

__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

}  // namespace moegen
