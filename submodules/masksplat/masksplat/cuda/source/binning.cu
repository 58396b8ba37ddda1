// SPDX-License-Identifier: Apache-2.0
// From packed splats to lists of splats per tile: everything but the sorting (radix_sort.cu).
//
// An instance is a (splat, tile) pair of the region. Instances are numbered splat by splat in the order of the rows, so
// that a splat's gradient rows are neighbours; they are emitted in depth order and then sorted by tile, stably.
//   prepare        per row: number of instances, number of its first instance, depth key; per view: totals
//   emit           per splat in depth order: tile, row and number of each instance
//   tile_ranges    per tile: first and one past the last place in the sorted list
//
// A region is (first pixel row, one past the last, tile columns); tile rows start at its first row.

#include "common.cuh"
#include "footprint.cuh"
#include "lookback.cuh"
#include "totals.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int DIGITS = 256;
constexpr int DEPTH_PASSES = 4;
constexpr int MOST_TILE_PASSES = 4;

constexpr int FEW_ROWS = 4;                     // a lane counts so many rows of tiles by itself, a warp more
constexpr int FEW_TILES = 16;                   // a lane emits so many tiles by itself, a warp more
constexpr int OWNER_SHIFT = 27;                 // a staged instance: lane of its splat, and tile below

struct Region {
    int first_row, last_row, columns;
};

struct TileBox {
    int x0, y0, x1, y1;                         // pixels, half open, cut to the region
    float x, y;                                 // mean
};

// Instances that the capacity cannot hold: the lists stay empty, and nothing may be updated.
__device__ __forceinline__ void note_instances(int* status, Word needed) {
    atomicMax(status + STATUS_NEEDED, int(needed < 0x7fffffffull ? needed : 0x7fffffffull));
    status[STATUS_OVERFLOW] = 1;
}

__device__ __forceinline__ TileBox load_box(const float* row, const int* box, const Region& region) {
    return {box[0], max(box[1], region.first_row), box[2], min(box[3], region.last_row), row[MEAN_X], row[MEAN_Y]};
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
    if (is_needed) footprint = make_footprint(row[CONIC_A], row[CONIC_B], row[CONIC_C], log2f(row[OPACITY]));
    return footprint;
}

__device__ __forceinline__ TileBox broadcast(const TileBox& box, int lane) {
    return {__shfl_sync(ALL_LANES, box.x0, lane), __shfl_sync(ALL_LANES, box.y0, lane),
            __shfl_sync(ALL_LANES, box.x1, lane), __shfl_sync(ALL_LANES, box.y1, lane),
            __shfl_sync(ALL_LANES, box.x, lane), __shfl_sync(ALL_LANES, box.y, lane)};
}

__device__ __forceinline__ Footprint broadcast(const Footprint& f, int lane) {
    return {__shfl_sync(ALL_LANES, f.at, lane), __shfl_sync(ALL_LANES, f.det, lane),
            __shfl_sync(ALL_LANES, f.b, lane), __shfl_sync(ALL_LANES, f.inverse_a, lane),
            __shfl_sync(ALL_LANES, f.dy_max, lane), __shfl_sync(ALL_LANES, f.dy_star, lane)};
}

// Tiles that each lane's splat reaches; splats of many rows are counted by the whole warp.
__device__ __forceinline__ int count_tiles(const TileBox& box, const Footprint& footprint, const Region& region) {
    const int rows = num_tile_rows(box, region), first = first_tile_row(box, region);
    int count = 0;
    if (rows <= FEW_ROWS) {
        for (int row = first; row < first + rows; ++row) {
            const int2 columns = columns_of_row(box, footprint, region, row);
            count += columns.y - columns.x;
        }
    }
    for (unsigned tall = __ballot_sync(ALL_LANES, rows > FEW_ROWS); tall != 0; tall &= tall - 1) {
        const int lane = __ffs(tall) - 1;
        const TileBox its_box = broadcast(box, lane);
        const Footprint its_footprint = broadcast(footprint, lane);
        const int its_rows = num_tile_rows(its_box, region), its_first = first_tile_row(its_box, region);
        int sum = 0;
        for (int row = lane_index(); row < its_rows; row += WARP) {
            const int2 columns = columns_of_row(its_box, its_footprint, region, its_first + row);
            sum += columns.y - columns.x;
        }
        sum = warp_sum(sum);
        if (lane_index() == lane) count = sum;
    }
    return count;
}

// Count a digit in shared memory; when the whole warp has the same one, as the high digits of depths do, only once.
__device__ __forceinline__ void count_digit(unsigned* histogram, unsigned digit, unsigned active) {
    const int leader = __ffs(active) - 1;
    const bool is_active = (active >> lane_index() & 1) != 0;
    const unsigned first = __shfl_sync(ALL_LANES, digit, leader < 0 ? 0 : leader);
    if (__all_sync(ALL_LANES, !is_active || digit == first)) {
        if (lane_index() == leader) atomicAdd(histogram + first, unsigned(__popc(active)));
    } else if (is_active) {
        atomicAdd(histogram + digit, 1u);
    }
}

__device__ __forceinline__ void add_histogram(const unsigned* counts, int size, unsigned* histogram) {
    for (int at = threadIdx.x; at < size; at += THREADS) {
        if (counts[at] != 0) atomicAdd(histogram + at, counts[at]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
prepare(const float* __restrict__ rows, const int* __restrict__ boxes, const float* __restrict__ depths,
        const int* __restrict__ num_splats, int most_splats, int first_row, int last_row, int columns,
        int instance_capacity, unsigned* __restrict__ keys, int* __restrict__ first_instances,
        unsigned* __restrict__ depth_histogram, Word* words, int* totals, int* status) {
    __shared__ unsigned counts[DEPTH_PASSES * DIGITS];
    __shared__ Word partial[WARPS];
    __shared__ Word before;
    __shared__ int ticket;
    for (int at = threadIdx.x; at < DEPTH_PASSES * DIGITS; at += THREADS) counts[at] = 0;
    const int block = take_ticket(totals + TOTAL_TICKETS, &ticket);
    const int total = num_splats == nullptr ? most_splats : min(*num_splats, most_splats);
    if (block * THREADS >= total) return;
    const int splat = block * THREADS + threadIdx.x;
    const bool is_splat = splat < total;
    const Region region = {first_row, last_row, columns};
    TileBox box = {0, 0, 0, 0, 0.0f, 0.0f};
    if (is_splat) box = load_box(rows + splat * NUM_ROW_COLUMNS, boxes + splat * 4, region);
    const bool is_cut = is_splat && !box_suffices(box, num_tile_rows(box, region));
    const int count = count_tiles(box, footprint_of_row(rows + splat * NUM_ROW_COLUMNS, is_cut), region);
    const unsigned key = is_splat ? __float_as_uint(depths[splat]) : 0;
    if (is_splat) keys[splat] = key;
    const unsigned active = __ballot_sync(ALL_LANES, is_splat);
    for (int pass = 0; pass < DEPTH_PASSES; ++pass) {
        count_digit(counts + pass * DIGITS, key >> (8 * pass) & (DIGITS - 1), active);
    }
    Word sum;
    const Word inside = block_exclusive_sum<THREADS>(Word(count), partial, sum);
    if (warp_index() == 0) {
        const Word earlier = sum_before_block(words, block, sum);
        if (lane_index() == 0) before = earlier;
    }
    __syncthreads();
    if (is_splat) first_instances[splat] = int(before + inside);
    add_histogram(counts, DEPTH_PASSES * DIGITS, depth_histogram);
    if (splat == total - 1) {
        const Word needed = before + inside + Word(count);
        const bool fits = needed <= Word(instance_capacity);
        totals[TOTAL_SPLATS] = total;
        totals[TOTAL_INSTANCES] = fits ? int(needed) : 0;
        first_instances[total] = int(needed);
        if (!fits) note_instances(status, needed);
    }
}

struct Output {
    unsigned *tiles, *rows, *instances;
};

// One staged or directly made instance to place `at`.
__device__ __forceinline__ void write_instance(const Output& out, int at, unsigned tile, int row, int instance) {
    out.tiles[at] = tile;
    out.rows[at] = row;
    out.instances[at] = instance;
}

struct TileDigits {
    int passes, bits;
};

__device__ __forceinline__ void count_tile(unsigned* counts, const TileDigits& digits, unsigned tile,
                                           unsigned active) {
    for (int pass = 0; pass < digits.passes; ++pass) {
        count_digit(counts + pass * DIGITS, tile >> (digits.bits * pass) & ((1u << digits.bits) - 1), active);
    }
}

// Instances of the lanes that have few: made by each lane into `staged`, written by the warp together.
__device__ __forceinline__ void emit_small(const TileBox& box, const Footprint& footprint, const Region& region,
                                           int count, int row, int instance, int place, unsigned* staged,
                                           unsigned* counts, const TileDigits& digits, const Output& out) {
    const int lane = lane_index();
    const int own = count <= FEW_TILES ? count : 0;
    const int through = warp_inclusive_sum(own);
    const int total = __shfl_sync(ALL_LANES, through, WARP - 1);
    int at = through - own;
    // From the place in `staged` to the place in the lists, and to the number of the instance.
    const int to_place = place - at, to_instance = instance - at;
    if (own > 0) {
        const int first = first_tile_row(box, region), rows = num_tile_rows(box, region);
        for (int tile_row = first; tile_row < first + rows; ++tile_row) {
            const int2 columns = columns_of_row(box, footprint, region, tile_row);
            for (int column = columns.x; column < columns.y; ++column) {
                staged[at++] = unsigned(lane) << OWNER_SHIFT | unsigned(tile_row * region.columns + column);
            }
        }
    }
    __syncwarp();
    for (int start = 0; start < total; start += WARP) {
        const bool is_used = start + lane < total;
        const unsigned both = is_used ? staged[start + lane] : 0;
        const int owner = both >> OWNER_SHIFT;
        const unsigned tile = both & ((1u << OWNER_SHIFT) - 1);
        const int its_row = __shfl_sync(ALL_LANES, row, owner);
        const int its_place = __shfl_sync(ALL_LANES, to_place, owner);
        const int its_instance = __shfl_sync(ALL_LANES, to_instance, owner);
        if (is_used) write_instance(out, its_place + start + lane, tile, its_row, its_instance + start + lane);
        count_tile(counts, digits, tile, __ballot_sync(ALL_LANES, is_used));
    }
    __syncwarp();
}

// Instances of one splat that has many, by the whole warp: spans of 32 rows at a time, then row by row.
__device__ __forceinline__ void emit_large(const TileBox& box, const Footprint& footprint, const Region& region,
                                           int row, int instance, int place, unsigned* counts,
                                           const TileDigits& digits, const Output& out) {
    const int lane = lane_index();
    const int first = first_tile_row(box, region), rows = num_tile_rows(box, region);
    for (int base = 0; base < rows; base += WARP) {
        int2 columns = make_int2(0, 0);
        if (base + lane < rows) columns = columns_of_row(box, footprint, region, first + base + lane);
        for (int k = 0; k < min(WARP, rows - base); ++k) {
            const int left = __shfl_sync(ALL_LANES, columns.x, k), right = __shfl_sync(ALL_LANES, columns.y, k);
            for (int start = left; start < right; start += WARP) {
                const bool is_used = start + lane < right;
                const unsigned tile = (first + base + k) * region.columns + start + lane;
                const int step = start - left + lane;
                if (is_used) write_instance(out, place + step, tile, row, instance + step);
                count_tile(counts, digits, tile, __ballot_sync(ALL_LANES, is_used));
            }
            place += right - left;
            instance += right - left;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
emit(const float* __restrict__ rows, const int* __restrict__ boxes, const unsigned* __restrict__ order,
     const int* __restrict__ first_instances, int first_row, int last_row, int columns, unsigned* __restrict__ tiles,
     unsigned* __restrict__ list_rows, unsigned* __restrict__ list_instances, unsigned* __restrict__ tile_histogram,
     int tile_passes, int tile_bits, Word* words, int* totals) {
    __shared__ unsigned counts[MOST_TILE_PASSES * DIGITS];
    __shared__ unsigned staged[WARPS][WARP * FEW_TILES];
    __shared__ Word partial[WARPS];
    __shared__ Word before;
    __shared__ int ticket;
    for (int at = threadIdx.x; at < tile_passes * DIGITS; at += THREADS) counts[at] = 0;
    const int block = take_ticket(totals + TOTAL_TICKETS + 1, &ticket);
    const int total = totals[TOTAL_SPLATS];
    if (block * THREADS >= total || totals[TOTAL_INSTANCES] == 0) return;
    const int rank = block * THREADS + threadIdx.x;
    const bool is_splat = rank < total;
    const int splat = is_splat ? order[rank] : 0;
    const int instance = is_splat ? first_instances[splat] : 0;
    const int count = is_splat ? first_instances[splat + 1] - instance : 0;
    Word sum;
    const Word inside = block_exclusive_sum<THREADS>(Word(count), partial, sum);
    if (warp_index() == 0) {
        const Word earlier = sum_before_block(words, block, sum);
        if (lane_index() == 0) before = earlier;
    }
    __syncthreads();
    const Region region = {first_row, last_row, columns};
    TileBox box = {0, 0, 0, 0, 0.0f, 0.0f};
    if (count > 0) box = load_box(rows + splat * NUM_ROW_COLUMNS, boxes + splat * 4, region);
    const bool is_cut = count > 0 && !box_suffices(box, num_tile_rows(box, region));
    const Footprint footprint = footprint_of_row(rows + splat * NUM_ROW_COLUMNS, is_cut);
    const int place = int(before + inside);
    const Output out = {tiles, list_rows, list_instances};
    const TileDigits digits = {tile_passes, tile_bits};
    emit_small(box, footprint, region, count, splat, instance, place, staged[warp_index()], counts, digits, out);
    for (unsigned large = __ballot_sync(ALL_LANES, count > FEW_TILES); large != 0; large &= large - 1) {
        const int lane = __ffs(large) - 1;
        emit_large(broadcast(box, lane), broadcast(footprint, lane), region, __shfl_sync(ALL_LANES, splat, lane),
                   __shfl_sync(ALL_LANES, instance, lane), __shfl_sync(ALL_LANES, place, lane), counts, digits, out);
    }
    __syncthreads();
    add_histogram(counts, tile_passes * DIGITS, tile_histogram);
}

// ranges: (tiles, 2) zeros.
extern "C" __global__ void __launch_bounds__(THREADS)
tile_ranges(const unsigned* __restrict__ tiles, const int* __restrict__ totals, int* __restrict__ ranges) {
    const int total = totals[TOTAL_INSTANCES], at = blockIdx.x * THREADS + threadIdx.x;
    if (at >= total) return;
    const unsigned tile = tiles[at];
    if (at == 0 || tiles[at - 1] != tile) ranges[2 * tile] = at;
    if (at == total - 1 || tiles[at + 1] != tile) ranges[2 * tile + 1] = at + 1;
}
