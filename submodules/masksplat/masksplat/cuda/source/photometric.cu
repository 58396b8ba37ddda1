// SPDX-License-Identifier: Apache-2.0
// L1 and SSIM (11 x 11 Gaussian window, sigma 1.5, zero padding; Wang 2004) with their gradient, in two kernels.
//
// With B the blur, mu = B x, and the SSIM map S(mu_x, B xx, B xy),
//     dS/dx = B(dS/dmu_x) + 2 x B(dS/dBxx) + y B(dS/dBxy)        (B is its own adjoint under zero padding).
// `compare` gives S, its weighted derivatives and both sums; `gradient` blurs the derivatives. The contract of strips:
// masksplat/cpu/photometric.py. The blur is separable: an image row of w pixels is 3 w consecutive floats, a horizontal
// tap is an offset of three. A thread has one column of floats and goes down the rows; the vertical blur is a chain of
// running sums in its registers, so that every row is read and blurred horizontally once (and 10 rows more a block).
#include "common.cuh"

constexpr int COLUMNS = 128;  // of floats, one a thread
constexpr int RADIUS = 5, TAPS = 2 * RADIUS + 1, PAD = 3 * RADIUS;
constexpr int SPAN = COLUMNS + 2 * PAD;
constexpr int BLURRED = 5;      // x, y, xx, yy, xy
constexpr int DERIVATIVES = 3;  // of S by mu_x, B xx, B xy
constexpr float C1 = 0.01f * 0.01f, C2 = 0.03f * 0.03f;

// Weight of tap k: exp(-(k - 5)^2 / 4.5) over their sum.
__device__ __forceinline__ constexpr float tap(int k) {
    const int offset = k < RADIUS ? RADIUS - k : k - RADIUS;
    return offset == 0   ? 0.26601172486179436f
           : offset == 1 ? 0.2130055377112537f
           : offset == 2 ? 0.10936068950970002f
           : offset == 3 ? 0.03600077212843083f
           : offset == 4 ? 0.007598758135239185f
                         : 0.00102838008447911f;
}

// Running sums of the vertical blur: value[j] is what the rows so far give the output row `newest - RADIUS + j`.
struct Chain {
    float value[TAPS];
};

__device__ __forceinline__ void push(Chain& chain, float horizontal) {
#pragma unroll
    for (int j = 0; j + 1 < TAPS; ++j) chain.value[j] = fmaf(tap(j), horizontal, chain.value[j + 1]);
    chain.value[TAPS - 1] = tap(TAPS - 1) * horizontal;
}

template <int COUNT>
__device__ __forceinline__ void clear(Chain (&chains)[COUNT]) {
#pragma unroll
    for (int q = 0; q < COUNT; ++q) {
#pragma unroll
        for (int j = 0; j < TAPS; ++j) chains[q].value[j] = 0.0f;
    }
}

// A region of `height` rows of `size` floats, of which the rows [own_first, own_last) count.
struct Region {
    int height, size, own_first, own_last;
};

__device__ __forceinline__ float target_value(const unsigned char* target, long long place) {
    return static_cast<float>(target[place]) * (1.0f / 255.0f);
}

// (x, y) at a row and column, 0 beyond the region.
__device__ __forceinline__ float2 fetch(const float* rgb, const unsigned char* target, const Region& region, int row,
                                        int column) {
    if (row < 0 || row >= region.height || column < 0 || column >= region.size) return make_float2(0.0f, 0.0f);
    const long long place = static_cast<long long>(row) * region.size + column;
    return make_float2(rgb[place], target_value(target, place));
}

// Sum over the block in a fixed order, in thread 0.
__device__ __forceinline__ double block_sum(double value, double* scratch) {
    value = warp_sum(value);
    if (lane_index() == 0) scratch[warp_index()] = value;
    __syncthreads();
    double total = 0.0;
    for (int warp = 0; warp < COLUMNS / WARP; ++warp) total += scratch[warp];
    __syncthreads();
    return total;
}

// S at one pixel and channel from the five blurred values; its derivatives times `weight`.
__device__ __forceinline__ float similarity(const Chain (&blurred)[BLURRED], float weight,
                                            float (&derivatives)[DERIVATIVES]) {
    const float mx = blurred[0].value[0], my = blurred[1].value[0];
    const float xx = blurred[2].value[0] - mx * mx, yy = blurred[3].value[0] - my * my;
    const float xy = blurred[4].value[0] - mx * my;
    const float a1 = 2.0f * mx * my + C1, a2 = 2.0f * xy + C2;
    const float b1 = mx * mx + my * my + C1, b2 = xx + yy + C2;
    const float inverse = 1.0f / (b1 * b2);
    const float s = a1 * a2 * inverse;
    const float d_xx = -s * b1 * inverse, d_xy = 2.0f * a1 * inverse;
    const float d_mx = 2.0f * (my * a2 - mx * s * b2) * inverse;
    derivatives[0] = weight * (d_mx - 2.0f * mx * d_xx - my * d_xy);
    derivatives[1] = weight * d_xx;
    derivatives[2] = weight * d_xy;
    return s;
}

// Horizontal blur of x, y, xx, yy and xy around a place of the line, pushed into the chains.
__device__ __forceinline__ void push_line(const float2* line, int place, Chain (&chains)[BLURRED]) {
    float sums[BLURRED] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < TAPS; ++k) {
        const float2 v = line[place + 3 * k];
        const float wx = tap(k) * v.x, wy = tap(k) * v.y;
        sums[0] += wx;
        sums[1] += wy;
        sums[2] = fmaf(wx, v.x, sums[2]);
        sums[3] = fmaf(wy, v.y, sums[3]);
        sums[4] = fmaf(wx, v.y, sums[4]);
    }
#pragma unroll
    for (int q = 0; q < BLURRED; ++q) push(chains[q], sums[q]);
}

// Block (i, j) takes the columns [128 i, 128 (i + 1)) of the own rows [own_first + j rows_a_block, ...).
// derivatives (3, h, size), own rows only; sums (blocks, 2): L1 and SSIM of each block's floats.
extern "C" __global__ void __launch_bounds__(COLUMNS, 4)
    compare(const float* __restrict__ rgb, const unsigned char* __restrict__ target, int height, int size,
            int own_first, int own_last, int rows_a_block, float ssim_weight, float* __restrict__ derivatives,
            double* __restrict__ sums) {
    __shared__ float2 lines[2][SPAN];
    __shared__ double scratch[COLUMNS / WARP];
    const Region region = {height, size, own_first, own_last};
    const int local = threadIdx.x, start = blockIdx.x * COLUMNS, column = start + local;
    const int top = own_first + blockIdx.y * rows_a_block, bottom = min(top + rows_a_block, own_last);
    const bool is_inside = column < size;
    Chain chains[BLURRED];
    clear(chains);
    double absolute = 0.0, similar = 0.0;
    float2 next = fetch(rgb, target, region, top - RADIUS, column - PAD), next_far = make_float2(0.0f, 0.0f);
    if (local < 2 * PAD) next_far = fetch(rgb, target, region, top - RADIUS, column - PAD + COLUMNS);
    for (int row = top - RADIUS; row < bottom + RADIUS; ++row) {
        float2* line = lines[(row - top + RADIUS) & 1];
        line[local] = next;
        if (local < 2 * PAD) line[local + COLUMNS] = next_far;
        __syncthreads();
        next = fetch(rgb, target, region, row + 1, column - PAD);
        if (local < 2 * PAD) next_far = fetch(rgb, target, region, row + 1, column - PAD + COLUMNS);
        push_line(line, local, chains);
        if (is_inside && row >= top && row < bottom) {
            absolute += static_cast<double>(fabsf(line[local + PAD].x - line[local + PAD].y));
        }
        if (is_inside && row - RADIUS >= top) {
            float found[DERIVATIVES];
            similar += static_cast<double>(similarity(chains, ssim_weight, found));
            const long long plane = static_cast<long long>(height) * size;
            float* out = derivatives + static_cast<long long>(row - RADIUS) * size + column;
#pragma unroll
            for (int q = 0; q < DERIVATIVES; ++q) out[q * plane] = found[q];
        }
    }
    absolute = block_sum(absolute, scratch);
    similar = block_sum(similar, scratch);
    if (local == 0) {
        double* out = sums + 2 * (static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x);
        out[0] = absolute;
        out[1] = similar;
    }
}

// One of the derivatives at an own row and a column, 0 elsewhere.
__device__ __forceinline__ float fetch_derivative(const float* derivatives, const Region& region, int q, int row,
                                                  int column) {
    if (row < region.own_first || row >= region.own_last || column < 0 || column >= region.size) return 0.0f;
    return derivatives[(static_cast<long long>(q) * region.height + row) * region.size + column];
}

// result = (L1, SSIM): the blocks' sums in a fixed order, over the number of values.
__device__ __forceinline__ void finish_sums(const double* sums, int num_sums, double num_values, double* scratch,
                                            double* result) {
    double absolute = 0.0, similar = 0.0;
    for (int k = threadIdx.x; k < num_sums; k += COLUMNS) {
        absolute += sums[2 * k];
        similar += sums[2 * k + 1];
    }
    absolute = block_sum(absolute, scratch);
    similar = block_sum(similar, scratch);
    if (threadIdx.x == 0) {
        result[0] = absolute / num_values;
        result[1] = similar / num_values;
    }
}

// d_rgb (h, size) of the weighted loss, all rows of the region, from what `compare` wrote; result (2), L1 and SSIM.
// Blocks as there, but over all rows.
extern "C" __global__ void __launch_bounds__(COLUMNS, 6)
    gradient(const float* __restrict__ rgb, const unsigned char* __restrict__ target,
             const float* __restrict__ derivatives, int height, int size, int own_first, int own_last,
             int rows_a_block, float l1_weight, const double* __restrict__ sums, int num_sums, long long num_values,
             float* __restrict__ d_rgb, double* __restrict__ result) {
    __shared__ float lines[2][DERIVATIVES][SPAN];
    __shared__ double scratch[COLUMNS / WARP];
    const Region region = {height, size, own_first, own_last};
    const int local = threadIdx.x, column = blockIdx.x * COLUMNS + local;
    const int top = blockIdx.y * rows_a_block, bottom = min(top + rows_a_block, height);
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        finish_sums(sums, num_sums, static_cast<double>(num_values), scratch, result);
    }
    Chain chains[DERIVATIVES];
    clear(chains);
    float next[DERIVATIVES], next_far[DERIVATIVES];
#pragma unroll
    for (int q = 0; q < DERIVATIVES; ++q) {
        next[q] = fetch_derivative(derivatives, region, q, top - RADIUS, column - PAD);
        next_far[q] = 0.0f;
        if (local < 2 * PAD) next_far[q] = fetch_derivative(derivatives, region, q, top - RADIUS, column - PAD + COLUMNS);
    }
    for (int row = top - RADIUS; row < bottom + RADIUS; ++row) {
        float(*line)[SPAN] = lines[(row - top + RADIUS) & 1];
#pragma unroll
        for (int q = 0; q < DERIVATIVES; ++q) {
            line[q][local] = next[q];
            if (local < 2 * PAD) line[q][local + COLUMNS] = next_far[q];
        }
        __syncthreads();
        const int out_row = row - RADIUS;
        const bool is_output = out_row >= top && column < size;
        const float2 pixel = is_output ? fetch(rgb, target, region, out_row, column) : make_float2(0.0f, 0.0f);
#pragma unroll
        for (int q = 0; q < DERIVATIVES; ++q) {
            next[q] = fetch_derivative(derivatives, region, q, row + 1, column - PAD);
            if (local < 2 * PAD) {
                next_far[q] = fetch_derivative(derivatives, region, q, row + 1, column - PAD + COLUMNS);
            }
            float sum = 0.0f;
#pragma unroll
            for (int k = 0; k < TAPS; ++k) sum = fmaf(tap(k), line[q][local + 3 * k], sum);
            push(chains[q], sum);
        }
        if (is_output) {
            const float difference = pixel.x - pixel.y;
            const float weight = out_row >= own_first && out_row < own_last ? l1_weight : 0.0f;
            const float sign = difference > 0.0f ? weight : difference < 0.0f ? -weight : 0.0f;
            d_rgb[static_cast<long long>(out_row) * size + column] =
                sign + chains[0].value[0] + 2.0f * pixel.x * chains[1].value[0] + pixel.y * chains[2].value[0];
        }
    }
}
