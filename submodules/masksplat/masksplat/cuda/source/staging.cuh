// SPDX-License-Identifier: Apache-2.0
// Rows of the coefficients shN, which are too long for coalesced reads by one thread each, on their way through shared
// memory: whole 16-byte words are copied by all threads of a block, then every thread reads its own row there.
#pragma once

#include "common.cuh"

// Starts a copy of 16 bytes from global to shared memory; `wait_for_copies` and a barrier end it.
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

// True when bit `row` of the ballots is set.
__device__ __forceinline__ bool is_set(const unsigned* ballots, int row) {
    return (ballots[row / WARP] >> (row % WARP)) & 1u;
}

// Start copying the first `used` floats of the rows `first_row + r`, r < num_rows, for which bit r of `wanted` is set,
// to staged[r * stride]. What lies between may be written, too. All threads of the block call it; `first_row` is a
// multiple of 4 and `values` (rows of `stride` >= 3 floats) 16-byte aligned, so that words are.
__device__ __forceinline__ void stage_rows(const float* __restrict__ values, long long first_row, int num_rows,
                                           int stride, int used, const unsigned* wanted, float* staged) {
    const float* source = values + first_row * stride;
    const int num_floats = num_rows * stride, num_words = num_floats / 4;
    const float inverse = 1.0f / static_cast<float>(stride);
    for (int word = thread_rank(); word < num_words; word += blockDim.x) {
        // Exact: the half keeps the quotient of numbers this small away from whole ones.
        const int row = static_cast<int>((4 * word + 0.5f) * inverse), next = row + 1;
        const int column = 4 * word - row * stride;
        const bool reaches_next = column + 3 >= stride && is_set(wanted, next);
        if (reaches_next || (column < used && is_set(wanted, row))) {
            copy_word(reinterpret_cast<float4*>(staged) + word, reinterpret_cast<const float4*>(source) + word);
        }
    }
    for (int k = 4 * num_words + thread_rank(); k < num_floats; k += blockDim.x) staged[k] = source[k];
}
