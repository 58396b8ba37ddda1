// SPDX-License-Identifier: Apache-2.0
// From packed splats to lists of splats per tile: everything but the sorting (radix_sort.cu).
//
// An instance is a (splat, tile) pair of the region. Instances are numbered splat by splat in the order of the rows, so
// that a splat's gradient rows are neighbours; they are emitted in depth order and then sorted by tile, stably.
//   prepare        per row: number of its first instance, depth key, and the tiles in 16 bytes (records); totals
//   emit           per splat in depth order: tile, row and number of each instance, or its parts (totals.cuh)
//   emit_parts     the same for the instances of parts
//   tile_ranges    per tile: first and one past the last place in the sorted list
//   order_tiles    tiles by the length of their lists, longest first
//
// Sizes are unequal: a splat may cover one tile or all of them. So rows of tiles of tall splats are counted by all of a
// block's lanes in groups, and large splats are emitted in parts by all warps of the device.
//
// Both scans pass from block to block, which takes its time: a block has four splats a thread. What `emit` reads of a
// splat lies anywhere, so it is one record (tile_spans.cuh).

#include "common.cuh"
#include "footprint.cuh"
#include "lookback.cuh"
#include "tile_spans.cuh"
#include "totals.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int DIGITS = 256;
constexpr int DEPTH_PASSES = 4;
constexpr int MOST_TILE_PASSES = 4;

constexpr int FEW_ROWS = 4;                     // a lane counts so many rows of tiles by itself, a group more
constexpr int GROUP = 8;                        // lanes
constexpr int GROUPS = THREADS / GROUP;
constexpr int SPLAT_CHUNK = 2048, INSTANCE_CHUNK = 4096;  // keys of a block of radix_sort.cu
constexpr int PARTS_SHIFT = 32;                 // in a scanned word: instances below, parts above
constexpr int ITEMS = 4;                        // splats of a thread in `prepare` and `emit`, neighbours in other lanes
constexpr int BLOCK_SPLATS = THREADS * ITEMS;

// Instances that the capacity cannot hold: the lists stay empty, and nothing may be updated.
__device__ __forceinline__ void note_instances(int* status, Word needed) {
    atomicMax(status + STATUS_NEEDED, int(needed < 0x7fffffffull ? needed : 0x7fffffffull));
    status[STATUS_OVERFLOW] = 1;
}

// Splats of a block that are too tall for one lane, numbered within the block.
struct TallSplats {
    int number;                                 // 0 at first
    unsigned short splats[BLOCK_SPLATS];        // in any order
    int counts[BLOCK_SPLATS];                   // by splat: its tiles
};

// The tall.splats[k]-th of the splats from `rows` on, by a group of lanes. All lanes of the warp call it.
__device__ __forceinline__ void count_tall(const float* rows, const int* boxes, uint4* records, const Region& region,
                                           int k, TallSplats& tall) {
    const int member = threadIdx.x % GROUP, splat = k < tall.number ? tall.splats[k] : -1;
    Spans spans = {0, 0, 0, true};
    TileBox box = {0, 0, 0, 0, 0.0f, 0.0f};
    if (splat >= 0) {
        const float* row = rows + splat * NUM_ROW_COLUMNS;
        box = load_box(row, boxes + splat * 4, region);
        const int num_rows = num_tile_rows(box, region);
        const Footprint footprint = footprint_of_row(row, !box_suffices(box, num_rows));
        spans = spans_of_rows(box, footprint, region, num_rows, member, GROUP);
    }
    int is_incomplete = spans.is_complete ? 0 : 1;
#pragma unroll
    for (int step = GROUP / 2; step > 0; step /= 2) {
        spans.count += __shfl_xor_sync(ALL_LANES, spans.count, step);
        spans.low |= __shfl_xor_sync(ALL_LANES, spans.low, step);
        spans.high |= __shfl_xor_sync(ALL_LANES, spans.high, step);
        is_incomplete |= __shfl_xor_sync(ALL_LANES, is_incomplete, step);
    }
    spans.is_complete = is_incomplete == 0;
    if (splat >= 0 && member == 0) {
        tall.counts[splat] = spans.count;
        records[splat] = make_record(box, region, spans);
    }
}

// Tiles that each of the thread's splats reaches, and all of their records but the first word. `rows`, `boxes` and
// `records` are those of the block's first splat, the thread's k-th is number `own + k * WARP` of `number`. Barriers are
// inside.
__device__ __forceinline__ void count_tiles(const float* rows, const int* boxes, uint4* records, const Region& region,
                                            int own, int number, TallSplats& tall, int (&counts)[ITEMS]) {
    unsigned tall_items = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int splat = own + k * WARP;
        counts[k] = 0;
        if (splat >= number) continue;
        const float* row = rows + splat * NUM_ROW_COLUMNS;
        const TileBox box = load_box(row, boxes + splat * 4, region);
        const int num_rows = num_tile_rows(box, region);
        if (num_rows > FEW_ROWS) {
            tall.splats[atomicAdd(&tall.number, 1)] = static_cast<unsigned short>(splat);
            tall_items |= 1u << k;
            continue;
        }
        const Footprint footprint = footprint_of_row(row, num_rows > 0 && !box_suffices(box, num_rows));
        const Spans spans = spans_of_rows(box, footprint, region, num_rows, 0, 1);
        counts[k] = spans.count;
        records[splat] = make_record(box, region, spans);
    }
    __syncthreads();
    for (int base = 0; base < tall.number; base += GROUPS) {
        count_tall(rows, boxes, records, region, base + threadIdx.x / GROUP, tall);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        if ((tall_items >> k & 1) != 0) counts[k] = tall.counts[own + k * WARP];
    }
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

// Sums over the items before each of this thread's, of the block's warps in order, of a warp's items in order, of lanes.
// `total` becomes the block's sum. A barrier is inside; `shared` has WARPS elements and is free after the next one.
template <typename T>
__device__ __forceinline__ void exclusive_sums(const T (&values)[ITEMS], T* shared, T (&sums)[ITEMS], T& total) {
    T before = 0;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const T through = warp_inclusive_sum(values[k]);
        sums[k] = before + through - values[k];
        before += __shfl_sync(ALL_LANES, through, WARP - 1);
    }
    if (lane_index() == 0) shared[warp_index()] = before;
    __syncthreads();
    T of_warps = 0;
    total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) {
        if (warp == warp_index()) of_warps = total;
        total += shared[warp];
    }
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) sums[k] += of_warps;
}

extern "C" __global__ void __launch_bounds__(THREADS)
prepare(const float* __restrict__ rows, const int* __restrict__ boxes, const float* __restrict__ depths,
        const int* __restrict__ num_splats, int most_splats, int first_row, int last_row, int columns,
        int instance_capacity, unsigned* __restrict__ keys, int* __restrict__ first_instances,
        uint4* __restrict__ records, unsigned* __restrict__ depth_histogram, unsigned* __restrict__ sort_words,
        int sort_blocks, Word* words, int* totals, int* status) {
    __shared__ unsigned counts[DEPTH_PASSES * DIGITS];
    __shared__ TallSplats tall;
    __shared__ Word partial[WARPS];
    __shared__ Word before;
    __shared__ int ticket;
    const int total = num_splats == nullptr ? most_splats : min(*num_splats, most_splats);
    if (int(blockIdx.x) * BLOCK_SPLATS >= total) return;
    for (int at = threadIdx.x; at < DEPTH_PASSES * DIGITS; at += THREADS) counts[at] = 0;
    if (threadIdx.x == 0) tall.number = 0;
    const int block = take_ticket(totals + TOTAL_TICKETS, &ticket);
    const int first = block * BLOCK_SPLATS, own = warp_index() * WARP * ITEMS + lane_index();
    clear_sort_words(sort_words, DEPTH_PASSES, sort_blocks, divide_up(total, SPLAT_CHUNK), block * THREADS + threadIdx.x,
                     divide_up(total, BLOCK_SPLATS) * THREADS);
    const Region region = {first_row, last_row, columns};
    int tiles[ITEMS];
    count_tiles(rows + static_cast<long long>(first) * NUM_ROW_COLUMNS, boxes + static_cast<long long>(first) * 4,
                records + first, region, own, total - first, tall, tiles);
    Word values[ITEMS], inside[ITEMS], sum;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int splat = first + own + k * WARP;
        const bool is_splat = splat < total;
        const unsigned key = is_splat ? __float_as_uint(depths[splat]) : 0;
        if (is_splat) keys[splat] = key;
        const unsigned active = __ballot_sync(ALL_LANES, is_splat);
        for (int pass = 0; pass < DEPTH_PASSES; ++pass) {
            count_digit(counts + pass * DIGITS, key >> (8 * pass) & (DIGITS - 1), active);
        }
        values[k] = Word(tiles[k]);
    }
    exclusive_sums(values, partial, inside, sum);
    if (warp_index() == 0) {
        const Word earlier = sum_before_block(words, block, sum);
        if (lane_index() == 0) before = earlier;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int splat = first + own + k * WARP;
        if (splat >= total) continue;
        const Word instance = before + inside[k];
        first_instances[splat] = int(instance);
        records[splat].x = unsigned(instance);
        if (splat == total - 1) {
            const Word needed = instance + values[k];
            const bool fits = needed <= Word(instance_capacity);
            totals[TOTAL_SPLATS] = total;
            totals[TOTAL_INSTANCES] = fits ? int(needed) : 0;
            first_instances[total] = int(needed);
            if (!fits) note_instances(status, needed);
        }
    }
    add_histogram(counts, DEPTH_PASSES * DIGITS, depth_histogram);
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

// Tiles of a splat with spans in its record, to `staged`.
__device__ __forceinline__ void stage_spans(const uint4& record, const Region& region, unsigned mark,
                                            unsigned* staged) {
    unsigned low = record.z, high = record.w, left = mark | (record.y & ((1u << OWNER_SHIFT) - 1));
    while ((low | high) != 0) {
        const unsigned number = low >> 4 & 15u, first = left + (low & 15u);
        for (unsigned column = 0; column < number; ++column) *staged++ = first + column;
        low = low >> 8 | high << 24;
        high >>= 8;
        left += region.columns;
    }
}

// The same for a splat whose spans did not fit.
__device__ __forceinline__ void stage_rows_of_tiles(const float* row, const int* its_box, const Region& region,
                                                 unsigned mark, unsigned* staged) {
    const TileBox box = load_box(row, its_box, region);
    const int first = first_tile_row(box, region), rows = num_tile_rows(box, region);
    const Footprint footprint = footprint_of_row(row, !box_suffices(box, rows));
    for (int tile_row = first; tile_row < first + rows; ++tile_row) {
        const int2 columns = columns_of_row(box, footprint, region, tile_row);
        for (int column = columns.x; column < columns.y; ++column) {
            *staged++ = mark | unsigned(tile_row * region.columns + column);
        }
    }
}

// Write the warp's staged instances together. Those of this lane's splat, a `row`, end at `through` of `staged`, and
// have `count`; `place` and `instance`: of the first.
__device__ __forceinline__ void write_staged(const unsigned* staged, int through, int count, int row, int instance,
                                             int place, unsigned* counts, const TileDigits& digits,
                                             const Output& out) {
    const int lane = lane_index(), total = __shfl_sync(ALL_LANES, through, WARP - 1);
    // From the place in `staged` to the place in the lists, and to the number of the instance.
    const int to_place = place - (through - count), to_instance = instance - (through - count);
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
     const uint4* __restrict__ records, int first_row, int last_row, int columns, unsigned* __restrict__ tiles,
     unsigned* __restrict__ list_rows, unsigned* __restrict__ list_instances, int4* __restrict__ parts,
     unsigned* __restrict__ tile_histogram, int tile_passes, int tile_bits, unsigned* __restrict__ sort_words,
     int sort_blocks, Word* words, int* totals) {
    __shared__ unsigned counts[MOST_TILE_PASSES * DIGITS];
    __shared__ unsigned staged[WARPS][WARP * FEW_TILES];
    __shared__ Word partial[WARPS];
    __shared__ Word before;
    __shared__ int ticket;
    const int total = totals[TOTAL_SPLATS];
    if (int(blockIdx.x) * BLOCK_SPLATS >= total || totals[TOTAL_INSTANCES] == 0) return;
    for (int at = threadIdx.x; at < tile_passes * DIGITS; at += THREADS) counts[at] = 0;
    const int block = take_ticket(totals + TOTAL_TICKETS + 1, &ticket), lane = lane_index();
    const int first = block * BLOCK_SPLATS + warp_index() * WARP * ITEMS + lane;
    int splats[ITEMS];
    uint4 its_records[ITEMS];
    Word own[ITEMS], inside[ITEMS], sum;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) splats[k] = first + k * WARP < total ? int(order[first + k * WARP]) : -1;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) its_records[k] = splats[k] >= 0 ? records[splats[k]] : make_uint4(0, 0, 0, 0);
    clear_sort_words(sort_words, tile_passes, sort_blocks, divide_up(totals[TOTAL_INSTANCES], INSTANCE_CHUNK),
                     block * THREADS + threadIdx.x, divide_up(total, BLOCK_SPLATS) * THREADS);
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const unsigned few = its_records[k].y >> OWNER_SHIFT, count = few == NO_SPANS ? its_records[k].z : few;
        own[k] = Word(count > FEW_TILES ? divide_up(int(count), PART) : 0) << PARTS_SHIFT | Word(count);
    }
    exclusive_sums(own, partial, inside, sum);
    if (warp_index() == 0) {
        const Word earlier = sum_before_block(words, block, sum);
        if (lane == 0) before = earlier;
    }
    __syncthreads();
    const Region region = {first_row, last_row, columns};
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        const int splat = splats[k], instance = int(its_records[k].x);
        const int place = int(unsigned(before + inside[k])), part = int((before + inside[k]) >> PARTS_SHIFT);
        const int count = int(unsigned(own[k])), num_parts = int(own[k] >> PARTS_SHIFT);
        for (int j = 0; j < num_parts; ++j) {
            parts[part + j] = make_int4(splat, place + j * PART, instance + j * PART, min(PART, count - j * PART));
        }
        if (first + k * WARP == total - 1) totals[TOTAL_PARTS] = part + num_parts;
        const int few = num_parts == 0 ? count : 0, through = warp_inclusive_sum(few);
        unsigned *to = staged[warp_index()] + through - few, mark = unsigned(lane) << OWNER_SHIFT;
        if (its_records[k].y >> OWNER_SHIFT != NO_SPANS) {
            stage_spans(its_records[k], region, mark, to);
        } else if (few > 0) {
            stage_rows_of_tiles(rows + splat * NUM_ROW_COLUMNS, boxes + splat * 4, region, mark, to);
        }
        write_staged(staged[warp_index()], through, few, splat, instance, place, counts, {tile_passes, tile_bits},
                     {tiles, list_rows, list_instances});
    }
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

constexpr int RANGE_KEYS = 4;                   // of a thread

// ranges: (tiles, 2) zeros. `tiles` may be read up to a multiple of four.
extern "C" __global__ void __launch_bounds__(THREADS)
tile_ranges(const unsigned* __restrict__ tiles, const int* __restrict__ totals, int* __restrict__ ranges) {
    const int total = totals[TOTAL_INSTANCES], first = (blockIdx.x * THREADS + threadIdx.x) * RANGE_KEYS;
    if (first >= total) return;
    const uint4 keys = *reinterpret_cast<const uint4*>(tiles + first);
    const unsigned here[RANGE_KEYS + 1] = {keys.x, keys.y, keys.z, keys.w,
                                           first + RANGE_KEYS < total ? tiles[first + RANGE_KEYS] : ALL_LANES};
    unsigned previous = first == 0 ? ALL_LANES : tiles[first - 1];
#pragma unroll
    for (int k = 0; k < RANGE_KEYS; ++k) {
        const int at = first + k;
        if (at < total && previous != here[k]) ranges[2 * here[k]] = at;
        if (at < total && (at == total - 1 || here[k + 1] != here[k])) ranges[2 * here[k] + 1] = at + 1;
        previous = here[k];
    }
}

constexpr int ORDER_THREADS = 1024;
constexpr int CLASS_SHIFT = 21;                 // of a float: exponent and two bits
constexpr int LENGTH_CLASSES = 128;             // a list has less than 2^31 places

// Longer lists are in higher classes, four to a power of two; the empty ones in class 0.
__device__ __forceinline__ int length_class(int2 range) {
    const int length = range.y - range.x;
    return length == 0 ? 0 : int(__float_as_uint(float(length)) >> CLASS_SHIFT) - (127 << 2) + 1;
}

// Add the warp's tiles to the counts of their classes; returns how many were there before this lane's.
__device__ __forceinline__ int count_class(int* counts, int its_class, bool is_tile) {
    const unsigned peers = __match_any_sync(ALL_LANES, is_tile ? its_class : -1);
    const int leader = __ffs(peers) - 1;
    int before = 0;
    if (is_tile && lane_index() == leader) before = atomicAdd(counts + its_class, __popc(peers));
    return __shfl_sync(ALL_LANES, before, leader) + __popc(peers & ((1u << lane_index()) - 1));
}

// One block: a tile that begins last should not be one that takes long. Which of a class comes first is left to chance.
extern "C" __global__ void __launch_bounds__(ORDER_THREADS)
order_tiles(const int2* __restrict__ ranges, int num_tiles, int* __restrict__ order) {
    __shared__ int counts[LENGTH_CLASSES];      // then: places of longer classes
    constexpr int PER_LANE = LENGTH_CLASSES / WARP;
    if (threadIdx.x < LENGTH_CLASSES) counts[threadIdx.x] = 0;
    __syncthreads();
    const int num_rounds = divide_up(num_tiles, ORDER_THREADS);
    for (int round = 0; round < num_rounds; ++round) {
        const int tile = round * ORDER_THREADS + threadIdx.x;
        const bool is_tile = tile < num_tiles;
        count_class(counts, is_tile ? length_class(ranges[tile]) : 0, is_tile);
    }
    __syncthreads();
    if (warp_index() == 0) {
        // Lane 0 has the highest classes.
        const int first = LENGTH_CLASSES - 1 - lane_index() * PER_LANE;
        int own[PER_LANE], sum = 0;
        for (int k = 0; k < PER_LANE; ++k) sum += own[k] = counts[first - k];
        int place = warp_inclusive_sum(sum) - sum;
        for (int k = 0; k < PER_LANE; ++k) {
            counts[first - k] = place;
            place += own[k];
        }
    }
    __syncthreads();
    for (int round = 0; round < num_rounds; ++round) {
        const int tile = round * ORDER_THREADS + threadIdx.x;
        const bool is_tile = tile < num_tiles;
        const int place = count_class(counts, is_tile ? length_class(ranges[tile]) : 0, is_tile);
        if (is_tile) order[place] = tile;
    }
}
