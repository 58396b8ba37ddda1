// SPDX-License-Identifier: Apache-2.0
// Stable radix sort of 32-bit keys with one or two 32-bit values, one kernel a digit (Adinets and Merrill, "Onesweep").
//
// sort_one, sort_two(keys_in, keys_out, values..., totals, histograms, words, tickets, pass, bits)
//   sort_one sorts the splats of a view, sort_two its instances. Their number is on the device (totals.cuh): the grid
//   covers the capacity, and blocks beyond the keys end at once.
//   pass: sorts by the digit of `bits` <= 8 bits from bit pass * bits on.
//   histograms: (passes, 256) keys of each value of the digit.
//   words: (passes, blocks, 256) zeros; tickets: (passes) zeros (lookback.cuh; here a word is 32 bits, its value 30: at
//   most 2^30 keys).
//   A null values_in stands for 0, 1, 2, ...
// order_ties(keys, order, ids, totals): within runs of equal keys, sorts `order` by ids[order]. `keys` may be read up to
// a multiple of four.
//
// Stages of a pass: 1 rank the keys of each warp by digit, 2 count digits over the block, 3 add what the blocks before
// have, 4 bring the block into order in shared memory, 5 write it out, neighbours together.

#include "common.cuh"
#include "lookback.cuh"
#include "totals.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int KEYS_WITH_ONE = 8, KEYS_WITH_TWO = 16;   // of a thread, by the number of values
constexpr int DIGITS = 256;                     // one thread a digit
constexpr int BLOCKS_WITH_ONE = 4, BLOCKS_WITH_TWO = 3;  // on a multiprocessor: leaves 64 and 80 registers to a thread
constexpr int LOOK_BACK = 4;                    // words of predecessors read at once

constexpr unsigned DIGIT_TOTAL = 1u << 30, DIGIT_PREFIX = 2u << 30, DIGIT_VALUE = DIGIT_TOTAL - 1;

template <int KEYS>
struct PassShared {
    unsigned warp_counts[WARPS][DIGITS];        // then: keys of the digit in the block's warps before
    union {
        unsigned peers[WARPS][DIGITS];          // lanes with the digit, zeros in between
        unsigned staged[KEYS * THREADS];
    };
    unsigned starts[DIGITS];                    // of a digit within the block
    unsigned targets[DIGITS];                   // where in the output, less `starts`
    unsigned partial[WARPS], partial_of_all[WARPS];
    int block;
};

// Keys of `digit` in all blocks before `block`, which has published its `total` of them.
__device__ __forceinline__ unsigned digits_before(volatile unsigned* words, int block, int digit, unsigned total) {
    if (block == 0) return 0;
    unsigned before = 0;
    bool is_complete = false;
    for (int nearest = block - 1; !is_complete; nearest -= LOOK_BACK) {
        unsigned word[LOOK_BACK];
#pragma unroll
        for (int k = 0; k < LOOK_BACK; ++k) {
            word[k] = nearest < k ? DIGIT_PREFIX : words[(nearest - k) * DIGITS + digit];
        }
#pragma unroll
        for (int k = 0; k < LOOK_BACK; ++k) {
            if (is_complete) break;
            while (word[k] == 0) word[k] = words[(nearest - k) * DIGITS + digit];
            before += word[k] & DIGIT_VALUE;
            is_complete = (word[k] & DIGIT_PREFIX) != 0;
        }
    }
    words[block * DIGITS + digit] = DIGIT_PREFIX | (before + total);
    return before;
}

// Stage 1: ranks[k] = keys with the same digit before item k of this lane within the warp; counts stay in shared. Lanes
// with one digit find each other through `of_digits`, which takes less than eight ballots.
template <int KEYS>
__device__ __forceinline__ void rank_in_warp(const unsigned (&keys)[KEYS], int shift, unsigned mask, unsigned* counts,
                                             unsigned* of_digits, unsigned (&ranks)[KEYS]) {
    const unsigned lanes_before = (1u << lane_index()) - 1;
#pragma unroll
    for (int k = 0; k < KEYS; ++k) {
        const unsigned digit = (keys[k] >> shift) & mask;
        atomicOr(of_digits + digit, 1u << lane_index());
        __syncwarp();
        const unsigned peers = of_digits[digit], before = counts[digit];
        __syncwarp();
        if ((peers & lanes_before) == 0) {
            counts[digit] = before + __popc(peers);
            of_digits[digit] = 0;
        }
        __syncwarp();
        ranks[k] = before + __popc(peers & lanes_before);
    }
}

// Stages 2 and 3: fills starts and targets; thread d cares for digit d.
template <int KEYS>
__device__ __forceinline__ void place_digits(PassShared<KEYS>& shared, const unsigned* histogram,
                                             volatile unsigned* words) {
    const int digit = threadIdx.x, block = shared.block;
    unsigned total = 0, sum;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        const unsigned count = shared.warp_counts[warp][digit];
        shared.warp_counts[warp][digit] = total;
        total += count;
    }
    words[block * DIGITS + digit] = (block == 0 ? DIGIT_PREFIX : DIGIT_TOTAL) | total;
    const unsigned start = block_exclusive_sum<THREADS>(total, shared.partial, sum);
    const unsigned start_of_all = block_exclusive_sum<THREADS>(histogram[digit], shared.partial_of_all, sum);
    shared.starts[digit] = start;
    shared.targets[digit] = start_of_all + digits_before(words, block, digit, total) - start;
    __syncthreads();
}

// Stages 4 and 5 for one array: `from` in the order of the input, `local` the places within the block.
template <int KEYS>
__device__ __forceinline__ void move_values(PassShared<KEYS>& shared, const unsigned (&values)[KEYS],
                                            const unsigned (&local)[KEYS], const unsigned (&targets)[KEYS], int count,
                                            unsigned* out) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < KEYS; ++k) shared.staged[local[k]] = values[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < KEYS; ++k) {
        const int place = k * THREADS + threadIdx.x;
        if (place < count) out[targets[k]] = shared.staged[place];
    }
}

template <int KEYS>
__device__ __forceinline__ void load_chunk(const unsigned* from, int first, int num_keys, unsigned (&values)[KEYS]) {
#pragma unroll
    for (int k = 0; k < KEYS; ++k) {
        const int place = first + k * WARP;
        values[k] = place < num_keys ? (from == nullptr ? unsigned(place) : from[place]) : ALL_LANES;
    }
}

template <int NUM_VALUES, int KEYS>
__device__ __forceinline__ void sort_pass(const unsigned* keys_in, unsigned* keys_out,
                                          const unsigned* const* values_in, unsigned* const* values_out,
                                          int num_keys, const unsigned* histograms, unsigned* words,
                                          int* tickets, int pass, int bits) {
    constexpr int CHUNK = THREADS * KEYS;
    __shared__ PassShared<KEYS> shared;
    const int shift = pass * bits;
    const unsigned mask = (1u << bits) - 1;
    if (int(blockIdx.x) * CHUNK >= num_keys) return;  // as many take a ticket as there are chunks
    for (int k = lane_index(); k < DIGITS; k += WARP) shared.warp_counts[warp_index()][k] = shared.peers[warp_index()][k] = 0;
    const int block = take_ticket(tickets + pass, &shared.block);
    const int start = block * CHUNK;
    // Missing keys at the end of the last block are all ones: behind every key, so that they are not written.
    const int first = start + warp_index() * KEYS * WARP + lane_index();
    unsigned keys[KEYS], ranks[KEYS], targets[KEYS];
    load_chunk(keys_in, first, num_keys, keys);
    rank_in_warp(keys, shift, mask, shared.warp_counts[warp_index()], shared.peers[warp_index()], ranks);
    __syncthreads();
    place_digits(shared, histograms + pass * DIGITS, words + pass * gridDim.x * DIGITS);
#pragma unroll
    for (int k = 0; k < KEYS; ++k) {
        const unsigned digit = (keys[k] >> shift) & mask;
        ranks[k] += shared.starts[digit] + shared.warp_counts[warp_index()][digit];
    }
    const int count = min(CHUNK, num_keys - start);
#pragma unroll
    for (int k = 0; k < KEYS; ++k) shared.staged[ranks[k]] = keys[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < KEYS; ++k) {
        const int place = k * THREADS + threadIdx.x;
        const unsigned key = shared.staged[place];
        targets[k] = shared.targets[(key >> shift) & mask] + place;
        if (place < count) keys_out[targets[k]] = key;
    }
#pragma unroll
    for (int column = 0; column < NUM_VALUES; ++column) {
        load_chunk(values_in[column], first, num_keys, keys);
        move_values(shared, keys, ranks, targets, count, values_out[column]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_WITH_ONE)
sort_one(const unsigned* __restrict__ keys_in, unsigned* __restrict__ keys_out,
         const unsigned* __restrict__ values_in, unsigned* __restrict__ values_out, const int* __restrict__ totals,
         const unsigned* __restrict__ histograms, unsigned* words, int* tickets, int pass, int bits) {
    const unsigned* from[1] = {values_in};
    unsigned* to[1] = {values_out};
    sort_pass<1, KEYS_WITH_ONE>(keys_in, keys_out, from, to, totals[TOTAL_SPLATS], histograms, words, tickets, pass, bits);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_WITH_TWO)
sort_two(const unsigned* __restrict__ keys_in, unsigned* __restrict__ keys_out,
         const unsigned* __restrict__ first_in, unsigned* __restrict__ first_out,
         const unsigned* __restrict__ second_in, unsigned* __restrict__ second_out, const int* __restrict__ totals,
         const unsigned* __restrict__ histograms, unsigned* words, int* tickets, int pass, int bits) {
    const unsigned* from[2] = {first_in, second_in};
    unsigned* to[2] = {first_out, second_out};
    sort_pass<2, KEYS_WITH_TWO>(keys_in, keys_out, from, to, totals[TOTAL_INSTANCES], histograms, words, tickets, pass, bits);
}

constexpr int SHORT_RUN = 32;                   // sorted by one thread; longer runs by the whole block
constexpr int TIE_KEYS = 4;                     // of a thread of `order_ties`

// One past the last key equal to keys[start], by doubling steps and bisection.
__device__ int end_of_run(const unsigned* keys, int start, int num_keys) {
    const unsigned key = keys[start];
    int inside = start, step = 1;
    while (inside + step < num_keys && keys[inside + step] == key) {
        inside += step;
        step *= 2;
    }
    for (; step > 0; step /= 2) {
        if (inside + step < num_keys && keys[inside + step] == key) inside += step;
    }
    return inside + 1;
}

__device__ void sort_short_run(unsigned* order, const long long* ids, int start, int stop) {
    for (int at = start + 1; at < stop; ++at) {
        const unsigned moved = order[at];
        const long long id = ids[moved];
        int place = at;
        for (; place > start && ids[order[place - 1]] > id; --place) order[place] = order[place - 1];
        order[place] = moved;
    }
}

__device__ __forceinline__ void swap_if_greater(unsigned* order, const long long* ids, int low, int high) {
    const unsigned one = order[low], two = order[high];
    if (ids[one] > ids[two]) {
        order[low] = two;
        order[high] = one;
    }
}

// Bitonic sort of any length by the whole block: every comparator puts the smaller first, so that what lies beyond the
// end counts as infinite and stays there. n log^2 n, and nothing to do for a run that is in order.
__device__ void sort_long_run(unsigned* order, const long long* ids, int length) {
    bool is_unordered = false;
    for (int at = threadIdx.x; at + 1 < length; at += THREADS) {
        is_unordered = is_unordered || ids[order[at]] > ids[order[at + 1]];
    }
    if (__syncthreads_or(is_unordered) == 0) return;
    for (int half = 1; half < length; half *= 2) {
        for (int pair = threadIdx.x; pair < length; pair += THREADS) {
            const int base = pair / half * 2 * half, inner = pair % half, high = base + 2 * half - 1 - inner;
            if (high < length) swap_if_greater(order, ids, base + inner, high);
        }
        __syncthreads();
        for (int step = half / 2; step > 0; step /= 2) {
            for (int pair = threadIdx.x; pair < length; pair += THREADS) {
                const int low = pair / step * 2 * step + pair % step;
                if (low + step < length) swap_if_greater(order, ids, low, low + step);
            }
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
order_ties(const unsigned* __restrict__ keys, unsigned* order, const long long* __restrict__ ids,
           const int* __restrict__ totals) {
    __shared__ int2 long_runs[TIE_KEYS * THREADS / SHORT_RUN + 1];
    __shared__ int num_long_runs;
    const int total = totals[TOTAL_SPLATS], first = (blockIdx.x * THREADS + threadIdx.x) * TIE_KEYS;
    if (int(blockIdx.x) * THREADS * TIE_KEYS >= total) return;
    if (threadIdx.x == 0) num_long_runs = 0;
    uint4 four = make_uint4(0, 0, 0, 0);
    if (first < total) four = *reinterpret_cast<const uint4*>(keys + first);
    const bool has_next = first + TIE_KEYS < total, has_previous = first > 0 && first < total;
    const unsigned here[TIE_KEYS + 1] = {four.x, four.y, four.z, four.w, has_next ? keys[first + TIE_KEYS] : 0};
    unsigned previous = has_previous ? keys[first - 1] : ~four.x;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < TIE_KEYS; ++k) {
        const int at = first + k;
        if (at + 1 < total && here[k] == here[k + 1] && previous != here[k]) {
            const int stop = end_of_run(keys, at, total);
            if (stop - at <= SHORT_RUN) {
                sort_short_run(order, ids, at, stop);
            } else {
                long_runs[atomicAdd(&num_long_runs, 1)] = make_int2(at, stop);
            }
        }
        previous = here[k];
    }
    __syncthreads();
    for (int run = 0; run < num_long_runs; ++run) {
        sort_long_run(order + long_runs[run].x, ids, long_runs[run].y - long_runs[run].x);
    }
}
