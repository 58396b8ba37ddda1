// SPDX-License-Identifier: Apache-2.0
// Blending weights m alpha T of each splat: their maximum (RadSplat) and sum (Mini-Splatting) over accepted pixels.
//
// score_tiles: a block a tile, a warp a subtile, as rasterize.cu; scores[instance] = (maximum, sum) over the tile.
// sum_scores: the same of a splat, over its instances in their order.

#include "compositing.cuh"
#include "totals.cuh"

constexpr int THREADS = TILE_PIXELS;
constexpr int BATCH = THREADS;

extern "C" __global__ void __launch_bounds__(THREADS)
score_tiles(const float* __restrict__ rows, const int2* __restrict__ ranges, const int* __restrict__ list_rows,
            const int* __restrict__ list_instances, int first_row, int last_row, int columns, int width,
            float2* __restrict__ scores) {
    __shared__ float4 staged[BATCH * SPLAT_FLOATS / 4];
    __shared__ unsigned char staged_bits[BATCH];
    __shared__ float2 partial[SUBTILES][BATCH];
    const int tile = blockIdx.x, warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const int tile_x = tile % columns * TILE, tile_y = first_row + tile / columns * TILE;
    const int x = tile_x + pixel_x(warp, lane), y = tile_y + pixel_y(warp, lane);
    float light = x < width && y < last_row ? 1.0f : -1.0f;
    const int2 range = ranges[tile];
    int start = range.x;
    for (; start < range.y; start += BATCH) {
        if (__syncthreads_and(light <= 0.0f)) break;
        const int count = min(BATCH, range.y - start);
        unsigned bits = 0;
        if (thread < count) {
            const Row row = load_row(rows, list_rows[start + thread]);
            const Splat splat = splat_of(row);
            if (splat.mask != 0.0f) bits = reached_subtiles(row, splat.log_opacity, float(tile_x), float(tile_y));
            stage_splat(staged + thread * (SPLAT_FLOATS / 4), splat);
        }
        staged_bits[thread] = static_cast<unsigned char>(bits);
#pragma unroll
        for (int subtile = 0; subtile < SUBTILES; ++subtile) partial[subtile][thread] = make_float2(0.0f, 0.0f);
        __syncthreads();
        for (int group = 0; group < count && __any_sync(ALL_LANES, light > 0.0f); group += WARP) {
            unsigned here = __ballot_sync(ALL_LANES, (staged_bits[group + lane] >> warp & 1) != 0);
            for (; here != 0; here &= here - 1) {
                const int k = group + __ffs(here) - 1;
                const Splat splat = staged_splat(staged + k * (SPLAT_FLOATS / 4));
                const float uncapped = uncapped_alpha(splat, x + 0.5f - splat.x, y + 0.5f - splat.y);
                const float weight = advance(light, effective_alpha(uncapped, splat.mask));
                const float largest = warp_max(weight), sum = warp_sum(weight);
                if (lane == 0) partial[warp][k] = make_float2(largest, sum);
            }
        }
        __syncthreads();
        if (thread < count) {
            float2 score = make_float2(0.0f, 0.0f);
#pragma unroll
            for (int subtile = 0; subtile < SUBTILES; ++subtile) {
                score.x = fmaxf(score.x, partial[subtile][thread].x);
                score.y += partial[subtile][thread].y;
            }
            scores[list_instances[start + thread]] = score;
        }
    }
    for (int place = start + thread; place < range.y; place += THREADS) {
        scores[list_instances[place]] = make_float2(0.0f, 0.0f);
    }
}

// maximum, total: (splats), zeros where a splat has no instance.
extern "C" __global__ void __launch_bounds__(THREADS)
sum_scores(const int* __restrict__ first_instances, const int* __restrict__ totals, int most_splats,
           const float2* __restrict__ scores, float* __restrict__ maximum, float* __restrict__ total) {
    const int splat = blockIdx.x * THREADS + threadIdx.x;
    if (splat >= most_splats) return;
    float2 score = make_float2(0.0f, 0.0f);
    if (splat < totals[TOTAL_SPLATS] && totals[TOTAL_INSTANCES] > 0) {
        const int last = first_instances[splat + 1];
        for (int instance = first_instances[splat]; instance < last; ++instance) {
            score.x = fmaxf(score.x, scores[instance].x);
            score.y += scores[instance].y;
        }
    }
    maximum[splat] = score.x;
    total[splat] = score.y;
}
