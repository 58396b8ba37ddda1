// SPDX-License-Identifier: Apache-2.0
// The few numbers of a step that ranks tell each other: put into one vector of 8-byte words, and taken out of all ranks'.
// What is in it: distributed/totals.py. The host side: cuda/rank_numbers.py.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int LOSS_WORDS = 2;

// A region's losses (2) and its pairs by row of tiles (rows).
struct Part {
    const double* losses;
    const long long* pairs;
    int rows;
};

// Writes num_rows, *num_drawn, the status (status_words, an even number), the losses and pairs of all regions and num_splats
// (B) to `words`, one behind the other; what is null is left out. Up to four regions, which begin with number first_region
// and row of pairs first_row of num_regions and all_rows; only with the first ones the rest is written. One block.
extern "C" __global__ void __launch_bounds__(THREADS)
    pack(long long num_rows, const long long* __restrict__ num_drawn, const int* __restrict__ status, int status_words,
         const int* __restrict__ num_splats, int num_views, int num_regions, int all_rows, int first_region,
         int first_row, const double* losses_0, const long long* pairs_0, int rows_0, const double* losses_1,
         const long long* pairs_1, int rows_1, const double* losses_2, const long long* pairs_2, int rows_2,
         const double* losses_3, const long long* pairs_3, int rows_3, long long* __restrict__ words) {
    const Part parts[] = {{losses_0, pairs_0, rows_0},
                          {losses_1, pairs_1, rows_1},
                          {losses_2, pairs_2, rows_2},
                          {losses_3, pairs_3, rows_3}};
    const int behind_rows = 1 + (num_drawn == nullptr ? 0 : 1);
    const int first_loss = behind_rows + (status == nullptr ? 0 : status_words / 2);
    const int first_pair = first_loss + LOSS_WORDS * num_regions;
    if (first_region == 0) {
        if (threadIdx.x == 0) {
            words[0] = num_rows;
            if (num_drawn != nullptr) words[1] = *num_drawn;
        }
        int* status_copy = reinterpret_cast<int*>(words + behind_rows);
        for (int i = threadIdx.x; status != nullptr && i < status_words; i += THREADS) status_copy[i] = status[i];
        int* splats_copy = reinterpret_cast<int*>(words + first_pair + all_rows);
        for (int i = threadIdx.x; i < num_views; i += THREADS) splats_copy[i] = num_splats[i];
    }
    double* losses = reinterpret_cast<double*>(words + first_loss + LOSS_WORDS * first_region);
    long long* pairs = words + first_pair + first_row;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (parts[k].losses == nullptr) break;
        if (threadIdx.x < LOSS_WORDS) losses[LOSS_WORDS * k + threadIdx.x] = parts[k].losses[threadIdx.x];
        for (int i = threadIdx.x; i < parts[k].rows; i += THREADS) pairs[i] = parts[k].pairs[i];
        pairs += parts[k].rows;
    }
}

// From the vectors of all ranks, (W, stride): adds up what was drawn (null: nothing was), and sets the first word of the
// status (null: there is none) to the largest of all. One warp.
extern "C" __global__ void __launch_bounds__(WARP)
    combine(const long long* __restrict__ words, int num_ranks, int stride, long long* __restrict__ all_drawn,
            int* __restrict__ status) {
    long long drawn = 0;
    int stop = 0;
    for (int rank = threadIdx.x; rank < num_ranks; rank += WARP) {
        const long long* mine = words + static_cast<long long>(rank) * stride;
        if (all_drawn != nullptr) drawn += mine[1];
        if (status != nullptr) stop = max(stop, *reinterpret_cast<const int*>(mine + (all_drawn == nullptr ? 1 : 2)));
    }
    drawn = warp_sum(drawn);
    stop = warp_max(stop);
    if (threadIdx.x != 0) return;
    if (all_drawn != nullptr) *all_drawn = drawn;
    if (status != nullptr) status[STATUS_OVERFLOW] = stop;
}
