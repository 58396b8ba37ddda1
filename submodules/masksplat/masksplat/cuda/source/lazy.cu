// SPDX-License-Identifier: Apache-2.0
// Adam updates of shN that rows without a gradient have not had yet, replayed in the roundings of adam_value: the same
// bits (masksplat/lazy.py). A warp takes a row at a time, a value or two a lane, so that rows are read as they lie and
// nobody replays longer than its neighbours.
#include "adam.cuh"
#include "harmonics.cuh"

constexpr int BLOCK = 128;

// The rows (N, stride <= 64) with their moments; the last update that each has had; the factors of update u in row
// u % LAZY_CAPACITY of `ring`; and the update up to which rows are brought.
struct LazyRows {
    float *param, *first, *second;
    int* updates;
    const AdamFactors* ring;
    int stride, last;
};

struct Value {
    float param, first, second;
};

__device__ __forceinline__ Value load_value(const LazyRows& rows, long long at, bool is_mine) {
    return is_mine ? Value{rows.param[at], rows.first[at], rows.second[at]} : Value{0.0f, 0.0f, 0.0f};
}

__device__ __forceinline__ void store_value(const LazyRows& rows, long long at, bool is_mine, const Value& value) {
    if (!is_mine) return;
    rows.param[at] = value.param;
    rows.first[at] = value.first;
    rows.second[at] = value.second;
}

// Updates had + 1 to `last`, for both values of a lane.
__device__ __forceinline__ void replay(const LazyRows& rows, int had, Value& one, Value& two) {
    for (int update = had + 1; update <= rows.last; ++update) {
        const AdamFactors factors = rows.ring[update % LAZY_CAPACITY];
        adam_without_gradient(one.param, one.first, one.second, factors);
        adam_without_gradient(two.param, two.first, two.second, factors);
    }
}

// The warp brings those of its rows up to date that are wanted and behind: row `first` + lane is this lane's. The next row
// is on its way while one is replayed.
__device__ __forceinline__ void catch_up_warp(const LazyRows& rows, long long first, bool is_wanted) {
    const int lane = lane_index();
    const bool has_one = lane < rows.stride, has_two = lane + WARP < rows.stride;
    const int had = is_wanted ? rows.updates[first + lane] : rows.last;
    unsigned left = __ballot_sync(ALL_LANES, had < rows.last);
    if (left == 0) return;
    int row = __ffs(left) - 1;
    long long at = (first + row) * rows.stride + lane;
    Value one = load_value(rows, at, has_one), two = load_value(rows, at + WARP, has_two);
    while (left != 0) {
        left &= left - 1;
        const int next_row = left != 0 ? __ffs(left) - 1 : row;
        const long long next_at = (first + next_row) * rows.stride + lane;
        const Value next_one = load_value(rows, next_at, has_one && left != 0);
        const Value next_two = load_value(rows, next_at + WARP, has_two && left != 0);
        replay(rows, __shfl_sync(ALL_LANES, had, row), one, two);
        store_value(rows, at, has_one, one);
        store_value(rows, at + WARP, has_two, two);
        row = next_row;
        at = next_at;
        one = next_one;
        two = next_two;
    }
    if (had < rows.last) rows.updates[first + lane] = rows.last;
}

// All rows, a warp 32 of them.
extern "C" __global__ void __launch_bounds__(BLOCK)
    catch_up(float* __restrict__ param, float* __restrict__ first, float* __restrict__ second,
             int* __restrict__ updates, const float* __restrict__ ring, int num_rows, int stride, int last,
             const int* __restrict__ status) {
    if (is_stopped(status)) return;
    const LazyRows rows = {param, first, second, updates, reinterpret_cast<const AdamFactors*>(ring), stride, last};
    const long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x;
    catch_up_warp(rows, i - lane_index(), i < num_rows);
}

// Colours of the drawn, once their rows are up to date, into their packed rows. The warp reads what it has just written:
// the barrier makes that visible within the warp.
template <int DEGREE>
__device__ __forceinline__ void colour(const LazyRows& lazy, const float* __restrict__ means,
                                       const float* __restrict__ sh0, const Camera* __restrict__ cameras,
                                       const int* __restrict__ slots, int num_gaussians, int num_views,
                                       float* __restrict__ packed) {
    constexpr int USED = 3 * higher_bases(DEGREE);
    extern __shared__ float staged[];  // (BLOCK, USED)
    const long long i = static_cast<long long>(blockIdx.x) * BLOCK + threadIdx.x, first = i - lane_index();
    bool is_drawn = false;
    for (int view = 0; view < num_views && i < num_gaussians; ++view) {
        is_drawn = is_drawn || slots[static_cast<long long>(view) * num_gaussians + i] >= 0;
    }
    const unsigned drawn = __ballot_sync(ALL_LANES, is_drawn);
    if (drawn == 0) return;
    catch_up_warp(lazy, first, is_drawn);
    __syncwarp();
    float* warp_staged = staged + (threadIdx.x - lane_index()) * USED;
    for (unsigned left = drawn; left != 0; left &= left - 1) {
        const int row = __ffs(left) - 1;
        const float* source = lazy.param + (first + row) * lazy.stride;
        for (int k = lane_index(); k < USED; k += WARP) warp_staged[row * USED + k] = source[k];
    }
    __syncwarp();
    if (!is_drawn) return;
    const Vector mean = load_vector(means, i), constant = load_vector(sh0, i);
    for (int view = 0; view < num_views; ++view) {
        const int slot = slots[static_cast<long long>(view) * num_gaussians + i];
        if (slot < 0) continue;
        float inverse;
        const Basis<DEGREE> basis = basis_at<DEGREE>(view_direction(cameras[view], mean, inverse));
        const Vector sum = harmonics_sum<DEGREE>(basis, constant, warp_staged + lane_index() * USED);
        float* row = packed + static_cast<long long>(slot) * NUM_ROW_COLUMNS;
        row[RED] = fmaxf(sum.x + 0.5f, 0.0f);
        row[GREEN] = fmaxf(sum.y + 0.5f, 0.0f);
        row[BLUE] = fmaxf(sum.z + 0.5f, 0.0f);
    }
}

// After a projection that took degree 0. Arguments: those of `catch_up`; means (N, 3), sh0 (N, 3), cameras (B), slots
// (B, N), N, B; the splats' rows.
#define COLOUR_KERNEL(NAME, DEGREE)                                                                                   \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                               \
        NAME(float* param, float* first, float* second, int* updates, const float* ring, int stride, int last,        \
             const int* status, const float* means, const float* sh0, const float* cameras, const int* slots,         \
             int num_gaussians, int num_views, float* packed) {                                                       \
        if (is_stopped(status)) return;                                                                               \
        const LazyRows rows = {param, first, second, updates, reinterpret_cast<const AdamFactors*>(ring), stride,     \
                               last};                                                                                 \
        colour<DEGREE>(rows, means, sh0, reinterpret_cast<const Camera*>(cameras), slots, num_gaussians, num_views,   \
                       packed);                                                                                       \
    }

COLOUR_KERNEL(colour_degree_1, 1)
COLOUR_KERNEL(colour_degree_2, 2)
COLOUR_KERNEL(colour_degree_3, 3)
