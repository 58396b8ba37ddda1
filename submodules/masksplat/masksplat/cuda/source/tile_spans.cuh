// SPDX-License-Identifier: Apache-2.0
// The tiles that a splat reaches, row of tiles by row of tiles, and the record of 16 bytes that holds them.
//
// A record is (number of the first instance, count << 27 | tile at the upper left, spans), a byte of spans a row of
// tiles, the first column from the left in the low half, their number in the high one. Where that does not fit, the
// count is 31, and the first word of spans has it; splats of more than FEW_TILES never fit.
//
// A region is (first pixel row, one past the last, tile columns); tile rows start at its first row.
#pragma once

#include "common.cuh"
#include "footprint.cuh"
#include "totals.cuh"

constexpr int OWNER_SHIFT = 27;                 // a staged instance: lane of its splat, and tile below
constexpr int MOST_SPANS = 8;                   // rows of tiles in a record
constexpr unsigned MOST_OF_SPAN = 15;           // columns, and how far they may begin from the left
constexpr unsigned NO_SPANS = 31;               // for a count: the record holds no spans

struct Region {
    int first_row, last_row, columns;
};

struct TileBox {
    int x0, y0, x1, y1;                         // pixels, half open, cut to the region
    float x, y;                                 // mean
};

__device__ __forceinline__ TileBox load_box(const float* row, const int* its_box, const Region& region) {
    const int4 box = *reinterpret_cast<const int4*>(its_box);
    const float2 mean = *reinterpret_cast<const float2*>(row + MEAN_X);
    return {box.x, max(box.y, region.first_row), box.z, min(box.w, region.last_row), mean.x, mean.y};
}

__device__ __forceinline__ int first_tile_row(const TileBox& box, const Region& region) {
    return (box.y0 - region.first_row) / TILE;
}

// Rows of tiles that the box touches.
__device__ __forceinline__ int num_tile_rows(const TileBox& box, const Region& region) {
    if (box.y0 >= box.y1 || box.x0 >= box.x1) return 0;
    return (box.y1 - 1 - region.first_row) / TILE + 1 - first_tile_row(box, region);
}

// The ellipse can only be narrower than its box where it spans several rows and several columns of tiles.
__device__ __forceinline__ bool box_suffices(const TileBox& box, int rows) {
    return rows <= 1 || box.x0 / TILE == (box.x1 - 1) / TILE;
}

// Half-open range of tile columns that the splat reaches in `tile_row` of the region.
__device__ __forceinline__ int2 columns_of_row(const TileBox& box, const Footprint& footprint, const Region& region,
                                               int tile_row) {
    int first = box.x0, last = box.x1 - 1;
    if (is_usable(footprint)) {
        const int top = max(region.first_row + tile_row * TILE, box.y0);
        const int bottom = min(region.first_row + (tile_row + 1) * TILE, box.y1) - 1;
        const Span span = span_of_band(footprint, float(top) + 0.5f - box.y, float(bottom) + 0.5f - box.y);
        if (span.left > span.right) return make_int2(0, 0);
        // Pixel x is inside when left <= x + 0.5 - mean_x <= right.
        first = int(ceilf(fmaxf(span.left + box.x - 0.5f, float(first))));
        last = int(floorf(fminf(span.right + box.x - 0.5f, float(last))));
        if (first > last) return make_int2(0, 0);
    }
    return make_int2(first / TILE, last / TILE + 1);
}

__device__ __forceinline__ Footprint footprint_of_row(const float* row, bool is_needed) {
    Footprint footprint = {0.0f, 0.0f, 0.0f, 0.0f, -1.0f, 0.0f};
    if (is_needed) {
        const float2 conic_ab = *reinterpret_cast<const float2*>(row + CONIC_A);
        const float2 conic_c_opacity = *reinterpret_cast<const float2*>(row + CONIC_C);
        footprint = make_footprint(conic_ab.x, conic_ab.y, conic_c_opacity.x, log2f(conic_c_opacity.y));
    }
    return footprint;
}

// Tiles of some rows of a splat, and their spans as in a record.
struct Spans {
    int count;
    unsigned low, high;
    bool is_complete;                           // false when the spans do not fit
};

// Tiles in every `step`-th of the splat's tile rows from its `member`-th on.
__device__ __forceinline__ Spans spans_of_rows(const TileBox& box, const Footprint& footprint, const Region& region,
                                               int num_rows, int member, int step) {
    Spans spans = {0, 0, 0, num_rows <= MOST_SPANS};
    const int first = first_tile_row(box, region), left = box.x0 / TILE;
    for (int row = member; row < num_rows; row += step) {
        const int2 columns = columns_of_row(box, footprint, region, first + row);
        const unsigned number = columns.y - columns.x, offset = number == 0 ? 0u : columns.x - left;
        spans.count += int(number);
        spans.is_complete = spans.is_complete && number <= MOST_OF_SPAN && offset <= MOST_OF_SPAN;
        const unsigned bits = (number << 4 | offset) << (8 * (row % 4));
        if (row < 4) {
            spans.low |= bits;
        } else {
            spans.high |= bits;
        }
    }
    return spans;
}

__device__ __forceinline__ uint4 make_record(const TileBox& box, const Region& region, const Spans& spans) {
    if (!spans.is_complete || spans.count > FEW_TILES) {
        return make_uint4(0, NO_SPANS << OWNER_SHIFT, unsigned(spans.count), 0);
    }
    const int tile = spans.count == 0 ? 0 : first_tile_row(box, region) * region.columns + box.x0 / TILE;
    return make_uint4(0, unsigned(spans.count) << OWNER_SHIFT | unsigned(tile), spans.low, spans.high);
}
