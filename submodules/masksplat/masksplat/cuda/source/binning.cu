// SPDX-License-Identifier: Apache-2.0
// From packed splats to lists of splats per tile: everything but the sorting (radix_sort.cu).
//
// An instance is a (splat, tile) pair of the region. Instances are numbered splat by splat in the order of the rows, so
// that a splat's gradient rows are neighbours; they are emitted in depth order and then sorted by tile, stably.
//   prepare        per row: number of instances, number of its first instance, depth key; per view: totals
//   emit           per splat in depth order: tile, row and number of each instance, or its parts (totals.cuh)
//   emit_parts     the same for the instances of parts
//   tile_ranges    per tile: first and one past the last place in the sorted list
//
// Sizes are unequal: a splat may cover one tile or all of them. So rows of tiles of tall splats are counted by all of a
// block's lanes in groups, and large splats are emitted in parts by all warps of the device.
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

constexpr int FEW_ROWS = 4;                     // a lane counts so many rows of tiles by itself, a group more
constexpr int GROUP = 8;                        // lanes
constexpr int GROUPS = THREADS / GROUP;
constexpr int SORT_CHUNK = 2048;                // keys of a block of radix_sort.cu
constexpr int PARTS_SHIFT = 32;                 // in a scanned word: instances below, parts above
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

// Tiles in every `step`-th of the tile rows from `first` up to `last`.
__device__ __forceinline__ int tiles_of_rows(const TileBox& box, const Footprint& footprint, const Region& region,
                                             int first, int last, int step) {
    int count = 0;
    for (int row = first; row < last; row += step) {
        const int2 columns = columns_of_row(box, footprint, region, row);
        count += columns.y - columns.x;
    }
    return count;
}

// Splats of a block that are too tall for one lane.
struct TallSplats {
    int number;                                 // 0 at first
    int threads[THREADS];                       // whose splats they are, in any order
    int counts[THREADS];                        // by thread: tiles of its splat
};

// Tiles that the splat of the tall[k]-th thread reaches, by a group of lanes. All lanes of the warp call it.
__device__ __forceinline__ void count_tall(const float* rows, const int* boxes, const Region& region, int k,
                                           TallSplats& tall) {
    const int member = threadIdx.x % GROUP, owner = k < tall.number ? tall.threads[k] : -1;
    int sum = 0;
    if (owner >= 0) {
        const float* row = rows + owner * NUM_ROW_COLUMNS;
        const TileBox box = load_box(row, boxes + owner * 4, region);
        const int first = first_tile_row(box, region), num_rows = num_tile_rows(box, region);
        const Footprint footprint = footprint_of_row(row, !box_suffices(box, num_rows));
        sum = tiles_of_rows(box, footprint, region, first + member, first + num_rows, GROUP);
    }
#pragma unroll
    for (int step = GROUP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (owner >= 0 && member == 0) tall.counts[owner] = sum;
}

// Tiles that each thread's splat reaches. `rows` and `boxes` are those of the block's first splat. Barriers are inside.
__device__ __forceinline__ int count_tiles(const float* rows, const int* boxes, const TileBox& box,
                                           const Region& region, TallSplats& tall) {
    const int num_rows = num_tile_rows(box, region), first = first_tile_row(box, region);
    const bool is_tall = num_rows > FEW_ROWS;
    int count = 0;
    if (is_tall) {
        tall.threads[atomicAdd(&tall.number, 1)] = threadIdx.x;
    } else if (num_rows > 0) {
        const float* row = rows + threadIdx.x * NUM_ROW_COLUMNS;
        const Footprint footprint = footprint_of_row(row, !box_suffices(box, num_rows));
        count = tiles_of_rows(box, footprint, region, first, first + num_rows, 1);
    }
    __syncthreads();
    for (int base = 0; base < tall.number; base += GROUPS) {
        count_tall(rows, boxes, region, base + threadIdx.x / GROUP, tall);
    }
    __syncthreads();
    return is_tall ? tall.counts[threadIdx.x] : count;
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

// Zeros for the `words` of (passes, blocks_capacity, DIGITS) of the first `blocks` blocks of a sort; thread `at` of
// `num_threads`.
__device__ __forceinline__ void clear_sort_words(unsigned* words, int passes, int blocks_capacity, int blocks, int at,
                                                 int num_threads) {
    for (int pass = 0; pass < passes; ++pass) {
        unsigned* of_pass = words + static_cast<long long>(pass) * blocks_capacity * DIGITS;
        for (int k = at; k < blocks * DIGITS; k += num_threads) of_pass[k] = 0;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
prepare(const float* __restrict__ rows, const int* __restrict__ boxes, const float* __restrict__ depths,
        const int* __restrict__ num_splats, int most_splats, int first_row, int last_row, int columns,
        int instance_capacity, unsigned* __restrict__ keys, int* __restrict__ first_instances,
        unsigned* __restrict__ depth_histogram, unsigned* __restrict__ sort_words, int sort_blocks, Word* words,
        int* totals, int* status) {
    __shared__ unsigned counts[DEPTH_PASSES * DIGITS];
    __shared__ TallSplats tall;
    __shared__ Word partial[WARPS];
    __shared__ Word before;
    __shared__ int ticket;
    for (int at = threadIdx.x; at < DEPTH_PASSES * DIGITS; at += THREADS) counts[at] = 0;
    if (threadIdx.x == 0) tall.number = 0;
    const int block = take_ticket(totals + TOTAL_TICKETS, &ticket);
    const int total = num_splats == nullptr ? most_splats : min(*num_splats, most_splats);
    if (block * THREADS >= total) return;
    const int first = block * THREADS, splat = first + threadIdx.x;
    const bool is_splat = splat < total;
    clear_sort_words(sort_words, DEPTH_PASSES, sort_blocks, divide_up(total, SORT_CHUNK), splat,
                     divide_up(total, THREADS) * THREADS);
    const Region region = {first_row, last_row, columns};
    TileBox box = {0, 0, 0, 0, 0.0f, 0.0f};
    if (is_splat) box = load_box(rows + splat * NUM_ROW_COLUMNS, boxes + splat * 4, region);
    const int count = count_tiles(rows + first * NUM_ROW_COLUMNS, boxes + first * 4, box, region, tall);
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

// Instances of the warp's splats, `count` <= FEW_TILES each: made by each lane into `staged`, written together.
__device__ __forceinline__ void emit_small(const TileBox& box, const Footprint& footprint, const Region& region,
                                           int count, int row, int instance, int place, unsigned* staged,
                                           unsigned* counts, const TileDigits& digits, const Output& out) {
    const int lane = lane_index();
    const int through = warp_inclusive_sum(count);
    const int total = __shfl_sync(ALL_LANES, through, WARP - 1);
    int at = through - count;
    // From the place in `staged` to the place in the lists, and to the number of the instance.
    const int to_place = place - at, to_instance = instance - at;
    if (count > 0) {
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

extern "C" __global__ void __launch_bounds__(THREADS)
emit(const float* __restrict__ rows, const int* __restrict__ boxes, const unsigned* __restrict__ order,
     const int* __restrict__ first_instances, int first_row, int last_row, int columns, unsigned* __restrict__ tiles,
     unsigned* __restrict__ list_rows, unsigned* __restrict__ list_instances, int4* __restrict__ parts,
     unsigned* __restrict__ tile_histogram, int tile_passes, int tile_bits, unsigned* __restrict__ sort_words,
     int sort_blocks, Word* words, int* totals) {
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
    clear_sort_words(sort_words, tile_passes, sort_blocks, divide_up(totals[TOTAL_INSTANCES], SORT_CHUNK), rank,
                     divide_up(total, THREADS) * THREADS);
    const int num_parts = count > FEW_TILES ? divide_up(count, PART) : 0;
    Word sum;
    const Word own = Word(num_parts) << PARTS_SHIFT | Word(count);
    const Word inside = block_exclusive_sum<THREADS>(own, partial, sum);
    if (warp_index() == 0) {
        const Word earlier = sum_before_block(words, block, sum);
        if (lane_index() == 0) before = earlier;
    }
    __syncthreads();
    const int place = int(unsigned(before + inside)), part = int((before + inside) >> PARTS_SHIFT);
    for (int k = 0; k < num_parts; ++k) {
        parts[part + k] = make_int4(splat, place + k * PART, instance + k * PART, min(PART, count - k * PART));
    }
    if (rank == total - 1) totals[TOTAL_PARTS] = part + num_parts;
    const Region region = {first_row, last_row, columns};
    TileBox box = {0, 0, 0, 0, 0.0f, 0.0f};
    const bool is_small = count > 0 && num_parts == 0;
    if (is_small) box = load_box(rows + splat * NUM_ROW_COLUMNS, boxes + splat * 4, region);
    const bool is_cut = is_small && !box_suffices(box, num_tile_rows(box, region));
    const Footprint footprint = footprint_of_row(rows + splat * NUM_ROW_COLUMNS, is_cut);
    emit_small(box, footprint, region, is_small ? count : 0, splat, instance, place, staged[warp_index()], counts,
               {tile_passes, tile_bits}, {tiles, list_rows, list_instances});
    __syncthreads();
    add_histogram(counts, tile_passes * DIGITS, tile_histogram);
}

// Instances of one part, by a warp: spans of 32 rows of tiles at a time, then 32 instances at a time.
__device__ __forceinline__ void emit_part(const int4& part, int first_instance, const TileBox& box,
                                          const Footprint& footprint, const Region& region, unsigned* counts,
                                          const TileDigits& digits, const Output& out) {
    const int lane = lane_index(), splat = part.x;
    const int first = first_tile_row(box, region), rows = num_tile_rows(box, region);
    // Of the splat's instances, this part has [begin, end).
    const int begin = part.z - first_instance, end = begin + part.w;
    int before = 0;                             // instances of the rows so far
    for (int base = 0; base < rows && before < end; base += WARP) {
        int2 columns = make_int2(0, 0);
        if (base + lane < rows) columns = columns_of_row(box, footprint, region, first + base + lane);
        const int through = before + warp_inclusive_sum(columns.y - columns.x);
        const int shift = columns.y - through;  // from an instance's number to its column
        const int stop = min(end, __shfl_sync(ALL_LANES, through, WARP - 1));
        for (int start = max(before, begin); start < stop; start += WARP) {
            const int number = start + lane;
            int row = 0;                        // rows of these that end before it
#pragma unroll
            for (int step = WARP / 2; step > 0; step /= 2) {
                if (__shfl_sync(ALL_LANES, through, row + step - 1) <= number) row += step;
            }
            const bool is_used = number < stop;
            const unsigned tile = (first + base + row) * region.columns + number + __shfl_sync(ALL_LANES, shift, row);
            if (is_used) write_instance(out, part.y + number - begin, tile, splat, first_instance + number);
            count_tile(counts, digits, tile, __ballot_sync(ALL_LANES, is_used));
        }
        before = __shfl_sync(ALL_LANES, through, WARP - 1);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
emit_parts(const float* __restrict__ rows, const int* __restrict__ boxes, const int* __restrict__ first_instances,
           const int4* __restrict__ parts, int first_row, int last_row, int columns, unsigned* __restrict__ tiles,
           unsigned* __restrict__ list_rows, unsigned* __restrict__ list_instances,
           unsigned* __restrict__ tile_histogram, int tile_passes, int tile_bits, const int* __restrict__ totals) {
    __shared__ unsigned counts[MOST_TILE_PASSES * DIGITS];
    const int num_parts = totals[TOTAL_PARTS];
    if (int(blockIdx.x) * WARPS >= num_parts) return;
    for (int at = threadIdx.x; at < tile_passes * DIGITS; at += THREADS) counts[at] = 0;
    __syncthreads();
    const Region region = {first_row, last_row, columns};
    for (int index = blockIdx.x * WARPS + warp_index(); index < num_parts; index += gridDim.x * WARPS) {
        const int4 part = parts[index];
        const float* row = rows + part.x * NUM_ROW_COLUMNS;
        const TileBox box = load_box(row, boxes + part.x * 4, region);
        const Footprint footprint = footprint_of_row(row, !box_suffices(box, num_tile_rows(box, region)));
        emit_part(part, first_instances[part.x], box, footprint, region, counts, {tile_passes, tile_bits},
                  {tiles, list_rows, list_instances});
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
