// SPDX-License-Identifier: Apache-2.0
// L1 and SSIM (11 x 11 Gaussian window, sigma 1.5, zero padding; Wang 2004) with their gradient, in two kernels.
//
// With B the blur, mu = B x, and the SSIM map S(mu_x, B xx, B xy),
//     dS/dx = B(dS/dmu_x) + 2 x B(dS/dBxx) + y B(dS/dBxy)        (B is its own adjoint under zero padding).
// `compare` gives S, its weighted derivatives and both sums; `gradient` blurs the derivatives. The contract of strips:
// masksplat/cpu/photometric.py. The blur is separable: an image row of w pixels is 3 w consecutive floats, a horizontal
// tap is an offset of three. A thread has two neighbouring pixels of one channel, so that what it reads serves both, and
// goes down the rows; the vertical blur is a chain of running sums in its registers, so that every row is read and
// blurred horizontally once (and 10 rows more a block).
//
// S needs xx and yy only as their sum. With u = x + y and v = x - y, xx + yy = (uu + vv) / 2 and xy = (uu - vv) / 4, of
// the blurred squares and of the variances alike: four blurs in place of five, and two products in place of three.
#include "common.cuh"

constexpr int BLOCK = 96;                       // threads: the channels of pairs of pixels
constexpr int STRIP = 2 * BLOCK / 3;            // pixels of a block
constexpr int RADIUS = 5, TAPS = 2 * RADIUS + 1;
constexpr int LINE = 3 * (STRIP + 2 * RADIUS);  // floats of a row that a block reads
constexpr int LOADS = (LINE + BLOCK - 1) / BLOCK;
// A line in shared memory: even pixels, then odd ones, so that neighbouring threads, which have every other pixel, find
// neighbouring floats. A half is as long as keeps stores of neighbouring floats in different banks.
constexpr int HALF = 122;
constexpr int LINE_PLACES = HALF + 3 * (STRIP + 2 * RADIUS + 2) / 2;
constexpr int BLURRED = 4;                      // u, v, uu, vv
constexpr int DERIVATIVES = 3;                  // of S by mu_x, B xx, B xy
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

// The chains of both pixels of a thread.
template <int COUNT>
struct Chains {
    Chain of[2][COUNT];
};

template <int COUNT>
__device__ __forceinline__ void clear(Chains<COUNT>& chains) {
#pragma unroll
    for (int k = 0; k < 2 * COUNT; ++k) {
#pragma unroll
        for (int j = 0; j < TAPS; ++j) chains.of[k / COUNT][k % COUNT].value[j] = 0.0f;
    }
}

// Where a thread stands in its block: the float `column` of its first pixel, the other is three further; the first
// float that it loads of a line, and the place of that in shared memory. Others follow BLOCK floats, so STRIP / 2 pixels,
// further.
struct Station {
    int column, source, place;
};

constexpr int PLACE_STEP = BLOCK / 2;

__device__ __forceinline__ Station station_of(int strip, int thread) {
    const int first = 3 * STRIP * strip, pixel = thread / 3 + 1;
    return {first + 6 * (thread / 3) + thread % 3, first - 3 * RADIUS + thread,
            (pixel & 1) * HALF + pixel / 2 * 3 + thread % 3};
}

// Place of the j-th of the twelve pixels that a thread needs; its own are the sixth and the seventh.
__device__ __forceinline__ constexpr int needed_place(int j) { return ((j + 1) & 1) * HALF + (j + 1) / 2 * 3; }

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
    for (int warp = 0; warp < BLOCK / WARP; ++warp) total += scratch[warp];
    __syncthreads();
    return total;
}

// S at one pixel and channel from its blurred values; its derivatives times `weight`.
__device__ __forceinline__ float similarity(const Chain (&blurred)[BLURRED], float weight,
                                            float (&derivatives)[DERIVATIVES]) {
    const float mu = blurred[0].value[0], mv = blurred[1].value[0];
    const float uu = blurred[2].value[0] - mu * mu, vv = blurred[3].value[0] - mv * mv;
    const float mx = 0.5f * (mu + mv), my = 0.5f * (mu - mv);
    const float a1 = 2.0f * mx * my + C1, a2 = 0.5f * (uu - vv) + C2;
    const float b1 = mx * mx + my * my + C1, b2 = 0.5f * (uu + vv) + C2;
    const float inverse = reciprocal_approximate(b1 * b2);
    const float s = a1 * a2 * inverse;
    const float d_xx = -s * b1 * inverse, d_xy = 2.0f * a1 * inverse;
    const float d_mx = 2.0f * (my * a2 - mx * s * b2) * inverse;
    derivatives[0] = weight * (d_mx - 2.0f * mx * d_xx - my * d_xy);
    derivatives[1] = weight * d_xx;
    derivatives[2] = weight * d_xy;
    return s;
}

// Horizontal blur of u, v, uu and vv at both pixels, pushed into the chains; returns |x - y| at each.
__device__ __forceinline__ float2 push_line(const float2* line, Chains<BLURRED>& chains) {
    float sums[2][BLURRED] = {};
    float2 absolute = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int j = 0; j <= TAPS; ++j) {
        const float2 uv = line[needed_place(j)];
        const float values[BLURRED] = {uv.x, uv.y, uv.x * uv.x, uv.y * uv.y};
#pragma unroll
        for (int q = 0; q < BLURRED; ++q) {
            if (j < TAPS) sums[0][q] = fmaf(tap(j), values[q], sums[0][q]);
            if (j > 0) sums[1][q] = fmaf(tap(j - 1), values[q], sums[1][q]);
        }
        if (j == RADIUS) absolute.x = fabsf(uv.y);
        if (j == RADIUS + 1) absolute.y = fabsf(uv.y);
    }
#pragma unroll
    for (int q = 0; q < BLURRED; ++q) {
        push(chains.of[0][q], sums[0][q]);
        push(chains.of[1][q], sums[1][q]);
    }
    return absolute;
}

// The floats of a row that a thread loads.
struct LineLoad {
    float2 xy[LOADS];
};

__device__ __forceinline__ LineLoad load_line(const float* rgb, const unsigned char* target, const Region& region,
                                              int row, const Station& station) {
    LineLoad load;
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
        const bool is_used = k + 1 < LOADS || threadIdx.x < LINE - (LOADS - 1) * BLOCK;
        load.xy[k] = make_float2(0.0f, 0.0f);
        if (is_used) load.xy[k] = fetch(rgb, target, region, row, station.source + k * BLOCK);
    }
    return load;
}

// Block (i, j) takes the pixels [STRIP i, STRIP (i + 1)) of the own rows [own_first + j rows_a_block, ...).
// pairs (h, size, 2), thirds (h, size): derivatives at own rows; sums (blocks, 2): L1 and SSIM of each block's floats.
extern "C" __global__ void __launch_bounds__(BLOCK, 4)
    compare(const float* __restrict__ rgb, const unsigned char* __restrict__ target, int height, int size,
            int own_first, int own_last, int rows_a_block, float ssim_weight, float2* __restrict__ pairs,
            float* __restrict__ thirds, double* __restrict__ sums) {
    __shared__ float2 lines[2][LINE_PLACES];
    __shared__ double scratch[BLOCK / WARP];
    const Region region = {height, size, own_first, own_last};
    const Station station = station_of(blockIdx.x, threadIdx.x);
    const int top = own_first + blockIdx.y * rows_a_block, bottom = min(top + rows_a_block, own_last);
    const bool is_inside[2] = {station.column < size, station.column + 3 < size};
    Chains<BLURRED> chains;
    clear(chains);
    double absolute = 0.0, similar = 0.0;
    LineLoad next = load_line(rgb, target, region, top - RADIUS, station);
#pragma unroll 2  // without it, every running sum is moved to its place at the end of a row
    for (int row = top - RADIUS; row < bottom + RADIUS; ++row) {
        float2* line = lines[(row - top + RADIUS) & 1];
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const bool is_used = k + 1 < LOADS || threadIdx.x < LINE - (LOADS - 1) * BLOCK;
            const float2 xy = next.xy[k];
            if (is_used) line[station.place + k * PLACE_STEP] = make_float2(xy.x + xy.y, xy.x - xy.y);
        }
        __syncthreads();
        next = load_line(rgb, target, region, row + 1, station);
        const float2 differences = push_line(line + threadIdx.x, chains);
        if (row >= top && row < bottom) {
            absolute += (is_inside[0] ? differences.x : 0.0f) + (is_inside[1] ? differences.y : 0.0f);
        }
        if (row - RADIUS < top) continue;
        const long long place = static_cast<long long>(row - RADIUS) * size + station.column;
        float both = 0.0f;
#pragma unroll
        for (int pixel = 0; pixel < 2; ++pixel) {
            float found[DERIVATIVES];
            const float s = similarity(chains.of[pixel], ssim_weight, found);
            if (!is_inside[pixel]) continue;
            both += s;
            pairs[place + 3 * pixel] = make_float2(found[0], found[1]);
            thirds[place + 3 * pixel] = found[2];
        }
        similar += both;
    }
    absolute = block_sum(absolute, scratch);
    similar = block_sum(similar, scratch);
    if (threadIdx.x == 0) {
        double* out = sums + 2 * (static_cast<long long>(blockIdx.y) * gridDim.x + blockIdx.x);
        out[0] = absolute;
        out[1] = similar;
    }
}

// The derivatives of a row that a thread loads: 0 beyond the own rows and the image.
struct DerivativeLoad {
    float2 pairs[LOADS];
    float thirds[LOADS];
};

__device__ __forceinline__ DerivativeLoad load_derivatives(const float2* pairs, const float* thirds,
                                                           const Region& region, int row, const Station& station) {
    DerivativeLoad load;
    const bool is_own = row >= region.own_first && row < region.own_last;
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
        const int column = station.source + k * BLOCK;
        const bool is_used = k + 1 < LOADS || threadIdx.x < LINE - (LOADS - 1) * BLOCK;
        const bool is_there = is_own && is_used && column >= 0 && column < region.size;
        const long long place = static_cast<long long>(row) * region.size + column;
        load.pairs[k] = is_there ? pairs[place] : make_float2(0.0f, 0.0f);
        load.thirds[k] = is_there ? thirds[place] : 0.0f;
    }
    return load;
}

// Horizontal blur of the derivatives at both pixels, pushed into the chains.
__device__ __forceinline__ void push_derivatives(const float2* pairs, const float* thirds,
                                                 Chains<DERIVATIVES>& chains) {
    float sums[2][DERIVATIVES] = {};
#pragma unroll
    for (int j = 0; j <= TAPS; ++j) {
        const float2 pair = pairs[needed_place(j)];
        const float values[DERIVATIVES] = {pair.x, pair.y, thirds[needed_place(j)]};
#pragma unroll
        for (int q = 0; q < DERIVATIVES; ++q) {
            if (j < TAPS) sums[0][q] = fmaf(tap(j), values[q], sums[0][q]);
            if (j > 0) sums[1][q] = fmaf(tap(j - 1), values[q], sums[1][q]);
        }
    }
#pragma unroll
    for (int q = 0; q < DERIVATIVES; ++q) {
        push(chains.of[0][q], sums[0][q]);
        push(chains.of[1][q], sums[1][q]);
    }
}

// result = (L1, SSIM): the blocks' sums in a fixed order, over the number of values.
__device__ __forceinline__ void finish_sums(const double* sums, int num_sums, double num_values, double* scratch,
                                            double* result) {
    double absolute = 0.0, similar = 0.0;
    for (int k = threadIdx.x; k < num_sums; k += BLOCK) {
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
extern "C" __global__ void __launch_bounds__(BLOCK, 5)
    gradient(const float* __restrict__ rgb, const unsigned char* __restrict__ target,
             const float2* __restrict__ pairs, const float* __restrict__ thirds, int height, int size, int own_first,
             int own_last, int rows_a_block, float l1_weight, const double* __restrict__ sums, int num_sums,
             long long num_values, float* __restrict__ d_rgb, double* __restrict__ result) {
    __shared__ float2 pair_lines[2][LINE_PLACES];
    __shared__ float third_lines[2][LINE_PLACES];
    __shared__ double scratch[BLOCK / WARP];
    const Region region = {height, size, own_first, own_last};
    const Station station = station_of(blockIdx.x, threadIdx.x);
    const int top = blockIdx.y * rows_a_block, bottom = min(top + rows_a_block, height);
    if (blockIdx.x == 0 && blockIdx.y == 0) {
        finish_sums(sums, num_sums, static_cast<double>(num_values), scratch, result);
    }
    Chains<DERIVATIVES> chains;
    clear(chains);
    DerivativeLoad next = load_derivatives(pairs, thirds, region, top - RADIUS, station);
#pragma unroll 2  // without it, every running sum is moved to its place at the end of a row
    for (int row = top - RADIUS; row < bottom + RADIUS; ++row) {
        const int side = (row - top + RADIUS) & 1, out_row = row - RADIUS;
#pragma unroll
        for (int k = 0; k < LOADS; ++k) {
            const bool is_used = k + 1 < LOADS || threadIdx.x < LINE - (LOADS - 1) * BLOCK;
            if (is_used) pair_lines[side][station.place + k * PLACE_STEP] = next.pairs[k];
            if (is_used) third_lines[side][station.place + k * PLACE_STEP] = next.thirds[k];
        }
        __syncthreads();
        float2 pixels[2] = {};
        if (out_row >= top) {
            pixels[0] = fetch(rgb, target, region, out_row, station.column);
            pixels[1] = fetch(rgb, target, region, out_row, station.column + 3);
        }
        next = load_derivatives(pairs, thirds, region, row + 1, station);
        push_derivatives(pair_lines[side] + threadIdx.x, third_lines[side] + threadIdx.x, chains);
        if (out_row < top) continue;
        const float weight = out_row >= own_first && out_row < own_last ? l1_weight : 0.0f;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int column = station.column + 3 * k;
            if (column >= size) continue;
            const float x = pixels[k].x, y = pixels[k].y;
            const float sign = x > y ? weight : x < y ? -weight : 0.0f;
            const Chain(&blurred)[DERIVATIVES] = chains.of[k];
            d_rgb[static_cast<long long>(out_row) * size + column] =
                sign + blurred[0].value[0] + 2.0f * x * blurred[1].value[0] + y * blurred[2].value[0];
        }
    }
}
