// SPDX-License-Identifier: Apache-2.0
// Sums over pixels of |dL/d mean2d| of each splat (AbsGS, Ye et al. 2024), for images of any number of channels.
//
// sum_tiles: a block a tile, a warp a subtile, a thread a pixel, as in scores.cu; front to back over the tile's list with
// the formulas of rasterize_backward.cu and the forward's decisions bit for bit. It needs no checkpoints, so that frames
// without a backward do. sums[instance] is that of the tile. Splats with m = 0 have no gradient of their means.
//   rows, ranges, list_rows, list_instances, first_row, last_row, columns, width: as rasterize.cu has them.
//   colours (splats, channels): what the splats give to the image. d_image (h, w, channels): g = dL/dC.
//   behind (h, w): S in front of the first splat.
// sum_splats: of a splat, over its instances in their order; total (splats), zeros where it has none.

#include "compositing.cuh"
#include "totals.cuh"

constexpr int THREADS = TILE_PIXELS;
constexpr int BATCH = THREADS;

struct Staging {
    float4 splats[BATCH * SPLAT_FLOATS / 4];
    float2 partial[SUBTILES][BATCH];            // sums of a subtile
    int rows[BATCH];
    unsigned char bits[BATCH];                  // subtiles that a splat reaches, 0 where m = 0
};

// g . c of a pixel and a splat.
__device__ __forceinline__ float dot_channels(const float* __restrict__ g, const float* __restrict__ colour,
                                              int num_channels) {
    float sum = 0.0f;
    for (int channel = 0; channel < num_channels; ++channel) sum += g[channel] * colour[channel];
    return sum;
}

// |dL/d mean2d| of one pixel and a splat; light and S move behind it. An ended pixel has light <= 0.
__device__ __forceinline__ float2 size_of_pair(const Splat& splat, float dx, float dy, float g_colour, float& light,
                                               float& behind) {
    const float uncapped = uncapped_alpha(splat, dx, dy), effective = effective_alpha(uncapped, splat.mask);
    const float before = light, weight = advance(light, effective);
    if (light <= 0.0f) return make_float2(0.0f, 0.0f);
    behind -= weight * g_colour;
    const float d_effective = before * g_colour - behind * reciprocal_approximate(1.0f - effective);
    const float d_power = uncapped > ALPHA_MAX ? 0.0f : effective * d_effective;
    // The conic's rows times (dx, dy), from its squares: a u and b u + (D / a) dy.
    const float u = __fmaf_rn(splat.skew, dy, dx), of_x = splat.along * u;
    const float of_y = splat.skew * of_x + splat.across * dy;
    return make_float2(fabsf(TWO_LN_2 * d_power * of_x), fabsf(TWO_LN_2 * d_power * of_y));
}

extern "C" __global__ void __launch_bounds__(THREADS)
sum_tiles(const float* __restrict__ rows, const float* __restrict__ colours, int num_channels,
          const int2* __restrict__ ranges, const int* __restrict__ list_rows, const int* __restrict__ list_instances,
          int first_row, int last_row, int columns, int width, const float* __restrict__ d_image,
          const float* __restrict__ of_pixels, float2* __restrict__ sums) {
    __shared__ Staging staging;
    const int tile = blockIdx.x, warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const int tile_x = tile % columns * TILE, tile_y = first_row + tile / columns * TILE;
    const int x = tile_x + pixel_x(warp, lane), y = tile_y + pixel_y(warp, lane);
    const bool is_inside = x < width && y < last_row;
    const long long place = is_inside ? static_cast<long long>(y - first_row) * width + x : 0;
    const float* g = d_image + place * num_channels;
    float light = is_inside ? 1.0f : -1.0f, behind = of_pixels[place];
    const int2 range = ranges[tile];
    int start = range.x;
    for (; start < range.y; start += BATCH) {
        if (__syncthreads_and(light <= 0.0f)) break;
        const int count = min(BATCH, range.y - start);
        unsigned bits = 0;
        if (thread < count) {
            staging.rows[thread] = list_rows[start + thread];
            const Row row = load_row(rows, staging.rows[thread]);
            const Splat splat = splat_of(row);
            if (splat.mask != 0.0f) bits = reached_subtiles(row, splat.log_opacity, float(tile_x), float(tile_y));
            stage_splat(staging.splats + thread * (SPLAT_FLOATS / 4), splat);
        }
        staging.bits[thread] = static_cast<unsigned char>(bits);
#pragma unroll
        for (int subtile = 0; subtile < SUBTILES; ++subtile) staging.partial[subtile][thread] = make_float2(0.0f, 0.0f);
        __syncthreads();
        for (int group = 0; group < count && __any_sync(ALL_LANES, light > 0.0f); group += WARP) {
            unsigned here = __ballot_sync(ALL_LANES, (staging.bits[group + lane] >> warp & 1) != 0);
            for (; here != 0; here &= here - 1) {
                const int k = group + __ffs(here) - 1;
                const Splat splat = staged_splat(staging.splats + k * (SPLAT_FLOATS / 4));
                const float* colour = colours + static_cast<long long>(staging.rows[k]) * num_channels;
                const float2 size = size_of_pair(splat, x + 0.5f - splat.x, y + 0.5f - splat.y,
                                                 dot_channels(g, colour, num_channels), light, behind);
                const float sum_x = warp_sum(size.x), sum_y = warp_sum(size.y);
                if (lane == 0) staging.partial[warp][k] = make_float2(sum_x, sum_y);
            }
        }
        __syncthreads();
        if (thread < count) {
            float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int subtile = 0; subtile < SUBTILES; ++subtile) {
                sum.x += staging.partial[subtile][thread].x;
                sum.y += staging.partial[subtile][thread].y;
            }
            sums[list_instances[start + thread]] = sum;
        }
    }
    for (int rest = start + thread; rest < range.y; rest += THREADS) {
        sums[list_instances[rest]] = make_float2(0.0f, 0.0f);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
sum_splats(const int* __restrict__ first_instances, const int* __restrict__ totals, int most_splats,
           const float2* __restrict__ sums, float2* __restrict__ total) {
    const int splat = blockIdx.x * THREADS + threadIdx.x;
    if (splat >= most_splats) return;
    float2 sum = make_float2(0.0f, 0.0f);
    if (splat < totals[TOTAL_SPLATS] && totals[TOTAL_INSTANCES] > 0) {
        const int last = first_instances[splat + 1];
        for (int instance = first_instances[splat]; instance < last; ++instance) {
            sum.x += sums[instance].x;
            sum.y += sums[instance].y;
        }
    }
    total[splat] = sum;
}
