// SPDX-License-Identifier: Apache-2.0
// What forward, backward and scores share: the pixels of a warp, a splat ready for compositing, and alpha of a pair.
//
// A tile of 16 x 16 pixels is 2 x 4 subtiles of 8 x 4 pixels, numbered row by row; a lane of a warp is a pixel of one.
// A batch is what a block composites between two barriers, a bucket a group of 32 neighbours of a tile's list.
#pragma once

#include "common.cuh"
#include "footprint.cuh"

constexpr int SUBTILE_WIDTH = 8, SUBTILE_HEIGHT = 4;
constexpr int SUBTILE_COLUMNS = TILE / SUBTILE_WIDTH, SUBTILE_ROWS = TILE / SUBTILE_HEIGHT;
constexpr int SUBTILES = SUBTILE_COLUMNS * SUBTILE_ROWS;
constexpr unsigned ALL_SUBTILES = (1u << SUBTILES) - 1;
constexpr int BUCKET = WARP;
constexpr float LOG2_E = 1.4426950408889634f;

// Pixel of the tile that `lane` has in `subtile`.
__device__ __forceinline__ int pixel_x(int subtile, int lane) {
    return subtile % SUBTILE_COLUMNS * SUBTILE_WIDTH + lane % SUBTILE_WIDTH;
}

__device__ __forceinline__ int pixel_y(int subtile, int lane) {
    return subtile / SUBTILE_COLUMNS * SUBTILE_HEIGHT + lane / SUBTILE_WIDTH;
}

// A bucket: tile and count in one word, first place in the other, negative for none.
__device__ __forceinline__ int2 make_bucket(int tile, int first, int count) {
    return make_int2(static_cast<int>(unsigned(count - 1) << 27 | unsigned(tile)), first);
}

__device__ __forceinline__ int tile_of_bucket(int2 bucket) { return bucket.x & ((1 << 27) - 1); }

__device__ __forceinline__ int count_of_bucket(int2 bucket) { return int(unsigned(bucket.x) >> 27) + 1; }

// A splat with its conic completed to squares and ready for base 2. With u = dx + (b / a) dy and D = a c - b^2,
//     a dx^2 + 2 b dx dy + c dy^2 = a u^2 + (D / a) dy^2,   so   log2(opacity exp(power)) = along u^2 + across dy^2 + log.
// Two terms of one sign: where the usual three cancel, in thin splats, this form keeps its digits, at the same cost.
struct Splat {
    float x, y, along, skew;
    float across, log_opacity, red, green;
    float blue, mask;
};

constexpr int SPLAT_FLOATS = 12;                // as staged in shared memory: three times 16 bytes

struct Row {
    float2 mean, conic_ab, conic_c_opacity, red_green, blue_mask;
};

__device__ __forceinline__ Row load_row(const float* rows, int row) {
    const float2* from = reinterpret_cast<const float2*>(rows + static_cast<long long>(row) * NUM_ROW_COLUMNS);
    return {from[0], from[1], from[2], from[3], from[4]};
}

__device__ __forceinline__ Splat splat_of(const Row& row) {
    const float a = row.conic_ab.x, b = row.conic_ab.y, inverse_a = 1.0f / a;
    const float determinant = conic_determinant(a, b, row.conic_c_opacity.x);
    return {row.mean.x,
            row.mean.y,
            __fmul_rn(-0.5f * LOG2_E, a),
            __fmul_rn(b, inverse_a),
            __fmul_rn(-0.5f * LOG2_E, __fmul_rn(determinant, inverse_a)),
            log2f(row.conic_c_opacity.y),
            row.red_green.x,
            row.red_green.y,
            row.blue_mask.x,
            row.blue_mask.y};
}

__device__ __forceinline__ void stage_splat(float4* staged, const Splat& s) {
    staged[0] = make_float4(s.x, s.y, s.along, s.skew);
    staged[1] = make_float4(s.across, s.log_opacity, s.red, s.green);
    staged[2] = make_float4(s.blue, s.mask, 0.0f, 0.0f);
}

__device__ __forceinline__ Splat staged_splat(const float4* staged) {
    const float4 first = staged[0], second = staged[1];
    const float2 third = *reinterpret_cast<const float2*>(staged + 2);
    return {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w, third.x, third.y};
}

// Subtiles of the tile at pixel (tile_x, tile_y) that the splat can reach, a bit each.
__device__ __forceinline__ unsigned reached_subtiles(const Row& row, float log_opacity, float tile_x, float tile_y) {
    const Footprint footprint =
        make_footprint(row.conic_ab.x, row.conic_ab.y, row.conic_c_opacity.x, log_opacity);
    if (!is_usable(footprint)) return ALL_SUBTILES;
    unsigned bits = 0;
    const float origin = row.mean.x - tile_x;
#pragma unroll
    for (int at = 0; at < SUBTILE_ROWS; ++at) {
        const float low = tile_y + (at * SUBTILE_HEIGHT + 0.5f) - row.mean.y;
        const Span span = span_of_band(footprint, low, low + (SUBTILE_HEIGHT - 1));
        const float left = span.left + origin, right = span.right + origin;
#pragma unroll
        for (int column = 0; column < SUBTILE_COLUMNS; ++column) {
            const float first = column * SUBTILE_WIDTH + 0.5f, last = first + (SUBTILE_WIDTH - 1);
            const bool is_reached = span.left <= span.right && left <= last && right >= first;
            bits |= unsigned(is_reached) << (at * SUBTILE_COLUMNS + column);
        }
    }
    return bits;
}

__device__ __forceinline__ float exp2_approximate(float x) {
#ifndef EMULATED
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return exp2f(x);
#endif
}

// Opacity times exp(power), not capped: the one expression that every kernel evaluates, with every rounding spelled out,
// so that all of them skip, cap and end at the same pairs.
__device__ __forceinline__ float uncapped_alpha(const Splat& s, float dx, float dy) {
    const float u = __fmaf_rn(s.skew, dy, dx);
    const float of_row = __fmaf_rn(__fmul_rn(s.across, dy), dy, s.log_opacity);
    return exp2_approximate(__fmaf_rn(__fmul_rn(s.along, u), u, of_row));
}

// Transmittance behind a splat of `effective` = mask alpha.
__device__ __forceinline__ float light_behind(float light, float effective) {
    return __fmaf_rn(-light, effective, light);
}

// mask alpha of a pair, 0 when it is skipped.
__device__ __forceinline__ float effective_alpha(float uncapped, float mask) {
    const float alpha = uncapped >= ALPHA_MIN ? fminf(uncapped, ALPHA_MAX) : 0.0f;
    return __fmul_rn(mask, alpha);
}

// One pixel passes one splat: returns the weight mask alpha T, 0 for a pair that is skipped, and updates the light.
// The pixel ends before the splat that would bring T below 1e-4; an ended pixel, or one outside, has light <= 0: -T.
__device__ __forceinline__ float advance(float& light, float effective) {
    const float after = light_behind(light, effective);
    const bool is_lit = after >= TRANSMITTANCE_MIN;
    const float weight = is_lit ? light * effective : 0.0f;
    light = is_lit ? after : -fabsf(light);
    return weight;
}
