// SPDX-License-Identifier: Apache-2.0
// Rows of the coefficients shN, which are too long for coalesced reads by one thread each, on their way through shared
// memory: whole 16-byte words are copied by all lanes of a warp, then every lane reads its own row there.
#pragma once

#include "common.cuh"

// Starts a copy of 16 bytes from global to shared memory; `wait_for_copies` and a barrier of the warp end it.
__device__ __forceinline__ void copy_word(float4* shared, const float4* global) {
#ifndef EMULATED
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
    *shared = *global;
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#ifndef EMULATED
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Start copying the first `used` floats of the rows r < num_rows <= 32 of `values` for which bit r of `wanted` is set to
// staged[r * stride]. What lies between may be written, too. All lanes of a warp call it; `values` (rows of `stride` >= 3
// floats) and `staged` are aligned to 16 bytes.
__device__ __forceinline__ void stage_rows(const float* __restrict__ values, int num_rows, int stride, int used,
                                           unsigned wanted, float* staged) {
    constexpr int STEP = 4 * WARP;  // floats that the warp copies at once
    const int num_floats = num_rows * stride, num_words = num_floats / 4;
    const int row_step = STEP / stride, column_step = STEP % stride;
    int row = 4 * lane_index() / stride, column = 4 * lane_index() % stride;
    for (int word = lane_index(); word < num_words; word += WARP) {
        const unsigned here = wanted >> row;  // bit 0: its row, bit 1: the next one
        if (((here & 1u) != 0 && column < used) || ((here & 2u) != 0 && column + 3 >= stride)) {
            copy_word(reinterpret_cast<float4*>(staged) + word, reinterpret_cast<const float4*>(values) + word);
        }
        row += row_step;
        column += column_step;
        if (column >= stride) {
            column -= stride;
            ++row;
        }
    }
#pragma unroll 1  // the last rows of all at most
    for (int k = 4 * num_words + lane_index(); k < num_floats; k += WARP) staged[k] = values[k];
}
