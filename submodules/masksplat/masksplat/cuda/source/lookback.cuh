// SPDX-License-Identifier: Apache-2.0
// Prefix sums over blocks in one pass (decoupled look-back, Merrill and Garland 2016).
//
// A block publishes its own total, then adds up its predecessors' words until one carries a whole prefix. The words
// start as zeros. Blocks number themselves by a ticket in the order in which they start, so a predecessor is always
// running or done, and waiting for it ends. A word holds flag and value, so that no fence is needed.
#pragma once

#include "common.cuh"

typedef unsigned long long Word;

constexpr int WORD_FLAG_SHIFT = 62;
constexpr Word WORD_TOTAL = 1ull << WORD_FLAG_SHIFT;     // the block's own sum
constexpr Word WORD_PREFIX = 2ull << WORD_FLAG_SHIFT;    // the sum of this block and all before it
constexpr Word WORD_VALUE = WORD_TOTAL - 1;

// This block's number. All threads take part; a barrier is inside. `shared` is one int of shared memory.
__device__ __forceinline__ int take_ticket(int* ticket, int* shared) {
    if (thread_rank() == 0) *shared = atomicAdd(ticket, 1);
    __syncthreads();
    return *shared;
}

__device__ __forceinline__ Word read_word(const Word* words, int index) {
    return index < 0 ? WORD_PREFIX : *reinterpret_cast<const volatile Word*>(words + index);
}

__device__ __forceinline__ void write_word(Word* words, int index, Word value) {
    *reinterpret_cast<volatile Word*>(words + index) = value;
}

// Sum of the totals of the blocks before `block`, in every lane of the one warp that calls this; `total` < 2^62.
__device__ __forceinline__ Word sum_before_block(Word* words, int block, Word total) {
    const int lane = lane_index();
    if (lane == 0) write_word(words, block, (block == 0 ? WORD_PREFIX : WORD_TOTAL) | total);
    if (block == 0) return 0;
    Word before = 0;
    for (int nearest = block - 1;; nearest -= WARP) {
        Word word = read_word(words, nearest - lane);
        while (__any_sync(ALL_LANES, (word >> WORD_FLAG_SHIFT) == 0)) word = read_word(words, nearest - lane);
        const unsigned prefixes = __ballot_sync(ALL_LANES, (word & WORD_PREFIX) != 0);
        const int first = prefixes == 0 ? WARP : __ffs(prefixes) - 1;
        before += warp_sum(lane <= first ? word & WORD_VALUE : Word(0));
        if (prefixes != 0) break;
    }
    if (lane == 0) write_word(words, block, WORD_PREFIX | (before + total));
    return before;
}

// Sum over the threads before this one of a block of `THREADS`; `total` becomes the block's sum. Barriers are inside;
// `shared` has THREADS / 32 elements and is free again after the next barrier.
template <int THREADS, typename T>
__device__ __forceinline__ T block_exclusive_sum(T value, T* shared, T& total) {
    const T inclusive = warp_inclusive_sum(value);
    if (lane_index() == WARP - 1) shared[warp_index()] = inclusive;
    __syncthreads();
    T before = 0;
    total = 0;
#pragma unroll
    for (int warp = 0; warp < THREADS / WARP; ++warp) {
        if (warp == warp_index()) before = total;
        total += shared[warp];
    }
    return before + inclusive - value;
}
