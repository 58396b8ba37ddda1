// SPDX-License-Identifier: Apache-2.0
// Splats on their way between ranks, and their gradients on the way back: who gets a copy of which packed row, and what
// of it travels. Nothing here knows how it travels. The host side: cuda/exchange.py.
//
// B views are drawn in regions, up to L of one view, each by a rank; W ranks, Q regions of this one. A packed row has a
// copy for every region that its box meets. Copies lie in blocks: by the rank that gets them, by their group, by the
// region among those of that rank; a row's ordinal says where in its block its copy is. Groups differ in what comes back:
//
//     SHADED  drawn (m = 1): nine numbers; the mask's gradient is opacity * dL/d(opacity), the owner works it out
//     CAPPED  drawn, and so opaque that a pixel may cap its alpha, which breaks that equation: ten numbers
//     ABSENT  not drawn (m = 0): the mask's gradient alone
//
// Which row gets which ordinal is left to chance (one atomic addition for a block of rows, a region and a group); sums
// are formed row by row in the order of the regions, so no number depends on it.
#include "lookback.cuh"

constexpr int THREADS = 256;
constexpr int ROUTE_THREADS = WARP * WARP;     // one warp scans the counts of all warps
constexpr int SHADED = 0, CAPPED = 1, ABSENT = 2, NUM_GROUPS = 3;
constexpr int NUM_DRAWN_NUMBERS = MASK;        // what comes back of a drawn row, but for its mask's gradient
constexpr int NUM_FLOATS = NUM_ROW_COLUMNS;    // on the wire: the row without its mask, then the depth
constexpr int BOX_WORDS = 4;
constexpr int NOWHERE = 0x7fffffff;            // a row of pixels below every image

// Of masksplat/boxes.py, which derives them.
constexpr double MARGIN_T = 0.01, MARGIN_PIXELS = 0.02, EXACT_ALPHA_MIN = 1.0 / 255.0;
constexpr double ERROR_SHARE = 16.0 / 8388608.0;    // 16 units of the last place of a float

// A region of a view: its drawn rows of pixels, its first block, and how far the next group's block is.
struct __align__(16) Region {
    int start, stop, block, stride;
};

// Where a block of copies that are sent begins: in rows, and in numbers that come back.
struct __align__(8) BlockStart {
    int row, number;
};

// Copies that arrive from one rank in one group for one region: where they begin on arrival, in numbers that go back, and
// in the region's range.
struct __align__(16) Run {
    int row, number, place, unused;
};

// A thread's packed row of view blockIdx.y. It meets no region when it is not in use or not to be sent (null keep: all are).
struct PackedRow {
    long long row;
    int group = ABSENT;
    int top = NOWHERE, bottom = 0;
    bool is_used;

    __device__ __forceinline__ PackedRow(const float* rows, const int4* boxes, const unsigned char* keep,
                                         const int* counts, const int2* views, float never_capped, int threads) {
        const int2 view = views[blockIdx.y];  // first row, rows that there is room for
        const int place = blockIdx.x * threads + threadIdx.x;
        row = static_cast<long long>(view.x) + place;
        is_used = place < (counts == nullptr ? view.y : counts[blockIdx.y]);
        if (!is_used || (keep != nullptr && keep[row] == 0)) return;
        const int4 box = boxes[row];
        top = box.y;
        bottom = box.w;
        const float* values = rows + row * NUM_ROW_COLUMNS;
        group = values[MASK] == 0.0f ? ABSENT : values[OPACITY] > never_capped ? CAPPED : SHADED;
    }

    __device__ __forceinline__ bool meets(const Region& region) const {
        return top < region.stop && bottom > region.start;
    }
};

__device__ __forceinline__ int numbers_back(int group) {
    return group == SHADED ? NUM_DRAWN_NUMBERS : group == CAPPED ? NUM_ROW_COLUMNS : 1;
}

// Counts the copies of each block into `blocks`, which is 0 at first, and gives each copy its ordinal in ordinals (L, M).
// Grid: (rows of the longest view / 1024, B).
extern "C" __global__ void __launch_bounds__(ROUTE_THREADS)
    route_rows(const float* __restrict__ rows, const int4* __restrict__ boxes, const unsigned char* __restrict__ keep,
               const int* __restrict__ counts, const int2* __restrict__ views, const Region* __restrict__ regions,
               int most_regions, float never_capped, int num_rows, int* __restrict__ ordinals,
               int* __restrict__ blocks) {
    __shared__ int places[NUM_GROUPS][WARP];  // of each warp: its copies, then the ordinal of the first
    const int used = counts == nullptr ? views[blockIdx.y].y : counts[blockIdx.y];
    if (blockIdx.x * ROUTE_THREADS >= used) return;
    const PackedRow mine(rows, boxes, keep, counts, views, never_capped, ROUTE_THREADS);
    const int lane = lane_index(), warp = warp_index();
    for (int k = 0; k < most_regions; ++k) {
        const Region region = regions[blockIdx.y * most_regions + k];
        const int group = mine.meets(region) ? mine.group : NUM_GROUPS;
        unsigned alike = 0;
        for (int other = 0; other < NUM_GROUPS; ++other) {
            const unsigned ballot = __ballot_sync(ALL_LANES, group == other);
            if (lane == 0) places[other][warp] = __popc(ballot);
            if (group == other) alike = ballot;
        }
        __syncthreads();
        if (warp < NUM_GROUPS) {
            const int count = places[warp][lane], upto = warp_inclusive_sum(count);
            int first = 0;
            if (lane == WARP - 1 && upto > 0) first = atomicAdd(blocks + region.block + warp * region.stride, upto);
            places[warp][lane] = __shfl_sync(ALL_LANES, first, WARP - 1) + upto - count;
        }
        __syncthreads();
        if (group < NUM_GROUPS) {
            const unsigned before = alike & ((1u << lane) - 1u);
            ordinals[static_cast<long long>(k) * num_rows + mine.row] = places[group][warp] + __popc(before);
        }
        __syncthreads();  // before the next region overwrites the places
    }
}

// Writes f(i, sum of v(0), ..., v(i - 1)) for i < count; returns the sum of all. One block; all threads take part.
template <typename Value, typename Write>
__device__ __forceinline__ Word scan_all(int count, Word* shared, Value value, Write write) {
    Word before = 0;
    for (int first = 0; first < count; first += THREADS) {
        const int i = first + threadIdx.x;
        Word total;
        const Word prefix = block_exclusive_sum<THREADS>(i < count ? value(i) : Word(0), shared, total);
        if (i < count) write(i, before + prefix);
        before += total;
        __syncthreads();
    }
    return before;
}

// Rows of a block in the low half, the numbers that come back for them in the high one.
__device__ __forceinline__ Word rows_and_numbers(int rows, int group) {
    return static_cast<Word>(rows) | static_cast<Word>(rows) * numbers_back(group) << 32;
}

__device__ __forceinline__ int low_half(Word word) { return static_cast<int>(word & 0xffffffffu); }

__device__ __forceinline__ int high_half(Word word) { return static_cast<int>(word >> 32); }

// Where everything lies, from the copies of every block that every rank sends: blocks (W, K), K = 3 times all regions.
// first_regions (W + 1): the number of each rank's first region. Writes starts (K + 1), runs (3 Q W + 1) by rank, group
// and region, and for the host: rows sent to each rank, rows received from it, numbers that come back from it, numbers
// that go back to it (W each), the first row of each region (Q + 1), and the blocks. One block of threads.
extern "C" __global__ void __launch_bounds__(THREADS)
    arrange(const int* __restrict__ blocks, const int* __restrict__ first_regions, int num_ranks, int rank,
            BlockStart* __restrict__ starts, Run* __restrict__ runs, int* __restrict__ for_host) {
    __shared__ Word shared[THREADS / WARP];
    const int num_blocks = NUM_GROUPS * first_regions[num_ranks], first_region = first_regions[rank];
    const int num_regions = first_regions[rank + 1] - first_region, per_rank = NUM_GROUPS * num_regions;
    const int num_runs = per_rank * num_ranks;
    const int* own = blocks + rank * num_blocks;
    const int* arriving = blocks + NUM_GROUPS * first_region;
    int* sums = for_host;
    int* offsets = for_host + 4 * num_ranks;
    const auto group_of = [&](int block) {
        int target = 0;
        while (block >= NUM_GROUPS * first_regions[target + 1]) ++target;
        return (block - NUM_GROUPS * first_regions[target]) / (first_regions[target + 1] - first_regions[target]);
    };
    const Word sent = scan_all(
        num_blocks, shared, [&](int i) { return rows_and_numbers(own[i], group_of(i)); },
        [&](int i, Word before) { starts[i] = {low_half(before), high_half(before)}; });
    const auto run_length = [&](int i) { return arriving[i / per_rank * num_blocks + i % per_rank]; };
    const Word received = scan_all(
        num_runs, shared, [&](int i) { return rows_and_numbers(run_length(i), i % per_rank / num_regions); },
        [&](int i, Word before) {
            runs[i].row = low_half(before);
            runs[i].number = high_half(before);
        });
    const int each = NUM_GROUPS * num_ranks;  // runs of a region
    const auto run_of = [&](int i) { return i % each * num_regions + i / each; };
    scan_all(
        num_runs, shared, [&](int i) { return static_cast<Word>(run_length(run_of(i))); },
        [&](int i, Word before) {
            runs[run_of(i)].place = low_half(before);
            if (i % each == 0) offsets[i / each] = low_half(before);
        });
    if (threadIdx.x == 0) {
        starts[num_blocks] = {low_half(sent), high_half(sent)};
        runs[num_runs] = {low_half(received), high_half(received), low_half(received), 0};
        offsets[num_regions] = low_half(received);
    }
    __syncthreads();
    for (int other = threadIdx.x; other < num_ranks; other += THREADS) {
        const BlockStart begin = starts[NUM_GROUPS * first_regions[other]];
        const BlockStart end = starts[NUM_GROUPS * first_regions[other + 1]];
        const Run first = runs[other * per_rank], last = runs[(other + 1) * per_rank];
        sums[other] = end.row - begin.row;
        sums[num_ranks + other] = last.row - first.row;
        sums[2 * num_ranks + other] = end.number - begin.number;
        sums[3 * num_ranks + other] = last.number - first.number;
    }
    for (int i = threadIdx.x; i < num_ranks * num_blocks; i += THREADS) offsets[num_regions + 1 + i] = blocks[i];
}

// Writes every copy to `wire`: nine floats of the row, the depth, the low words of the id, the box when it travels.
// Grid: (rows of the longest view / 256, B).
extern "C" __global__ void __launch_bounds__(THREADS)
    pack_rows(const float* __restrict__ rows, const int4* __restrict__ boxes, const unsigned char* __restrict__ keep,
              const int* __restrict__ counts, const int2* __restrict__ views, const Region* __restrict__ regions,
              int most_regions, float never_capped, int num_rows, const int* __restrict__ ordinals,
              const BlockStart* __restrict__ starts, const int* __restrict__ depths, const int2* __restrict__ ids,
              int id_words, int sends_boxes, int* __restrict__ wire) {
    const PackedRow mine(rows, boxes, keep, counts, views, never_capped, THREADS);
    if (!mine.is_used) return;
    const int row_words = NUM_FLOATS + id_words + (sends_boxes != 0 ? BOX_WORDS : 0);
    const int* from = reinterpret_cast<const int*>(rows) + mine.row * NUM_ROW_COLUMNS;
    for (int k = 0; k < most_regions; ++k) {
        const Region region = regions[blockIdx.y * most_regions + k];
        if (!mine.meets(region)) continue;
        const int ordinal = ordinals[static_cast<long long>(k) * num_rows + mine.row];
        const long long copy = starts[region.block + mine.group * region.stride].row + ordinal;
        int* to = wire + copy * row_words;
#pragma unroll
        for (int column = 0; column < MASK; ++column) to[column] = from[column];
        const int2 id = ids[mine.row];
        to[MASK] = depths[mine.row];
        to[NUM_FLOATS] = id.x;
        if (id_words > 1) to[NUM_FLOATS + 1] = id.y;
        if (sends_boxes != 0) {
            const int4 box = boxes[mine.row];
            int* last = to + NUM_FLOATS + id_words;
            last[0] = box.x;
            last[1] = box.y;
            last[2] = box.z;
            last[3] = box.w;
        }
    }
}

// The run that arrived row `row` is in: the last that does not begin behind it.
__device__ __forceinline__ int find_run(const Run* runs, int num_runs, int row) {
    int low = 0, high = num_runs;  // runs[low].row <= row < runs[high].row
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (runs[middle].row <= row) low = middle;
        else high = middle;
    }
    return low;
}

// Half-open range of pixels whose centres are within `reach` of `mean`, clipped before the cast: huge splats overflow.
__device__ __forceinline__ int2 clipped_range(double mean, double reach, double size) {
    const double middle = mean - 0.5;
    return make_int2(static_cast<int>(fmin(fmax(ceil(middle - reach), 0.0), size)),
                     static_cast<int>(fmin(fmax(floor(middle + reach) + 1.0, 0.0), size)));
}

// The formula of masksplat/boxes.py, in double as there.
__device__ __forceinline__ int4 box_of_row(const float* row, int2 size) {
    const double a = row[CONIC_A], b = row[CONIC_B], c = row[CONIC_C];
    const double product = __dmul_rn(a, c), determinant = __dadd_rn(product, -__dmul_rn(b, b));
    const double error = __dmul_rn(product, ERROR_SHARE);
    double scale = __longlong_as_double(0x7ff0000000000000ll);  // infinity
    if (determinant > error) {
        const double t = 2.0 * log(static_cast<double>(row[OPACITY]) / EXACT_ALPHA_MIN) + MARGIN_T;
        scale = t * (determinant + error) / (determinant * determinant);
    }
    const int2 x = clipped_range(row[MEAN_X], sqrt(scale * c) + MARGIN_PIXELS, size.x);
    const int2 y = clipped_range(row[MEAN_Y], sqrt(scale * a) + MARGIN_PIXELS, size.y);
    return make_int4(x.x, y.x, x.y, y.y);
}

// Puts what arrived into the ranges of its regions. Null sizes (Q): boxes have travelled. A thread a row, as it arrived.
extern "C" __global__ void __launch_bounds__(THREADS)
    unpack_rows(const int* __restrict__ wire, int num_received, const Run* __restrict__ runs, int num_runs,
                int num_regions, const int2* __restrict__ sizes, int id_words, float* __restrict__ rows,
                float* __restrict__ depths, int2* __restrict__ ids, int* __restrict__ gaussians,
                int4* __restrict__ boxes) {
    const int arrived = blockIdx.x * THREADS + threadIdx.x;
    if (arrived >= num_received) return;
    const int run = find_run(runs, num_runs, arrived);
    const long long place = runs[run].place + (arrived - runs[run].row);
    const int row_words = NUM_FLOATS + id_words + (sizes == nullptr ? BOX_WORDS : 0);
    const int* from = wire + static_cast<long long>(arrived) * row_words;
    float row[NUM_ROW_COLUMNS];
#pragma unroll
    for (int column = 0; column < MASK; ++column) row[column] = __int_as_float(from[column]);
    row[MASK] = run / num_regions % NUM_GROUPS == ABSENT ? 0.0f : 1.0f;
    float2* to = reinterpret_cast<float2*>(rows) + place * (NUM_ROW_COLUMNS / 2);
#pragma unroll
    for (int pair = 0; pair < NUM_ROW_COLUMNS / 2; ++pair) to[pair] = make_float2(row[2 * pair], row[2 * pair + 1]);
    depths[place] = __int_as_float(from[MASK]);
    ids[place] = make_int2(from[NUM_FLOATS], id_words > 1 ? from[NUM_FLOATS + 1] : 0);
    gaussians[place] = -1;
    if (sizes != nullptr) {
        boxes[place] = box_of_row(row, sizes[run % num_regions]);
    } else {
        const int* last = from + NUM_FLOATS + id_words;
        boxes[place] = make_int4(last[0], last[1], last[2], last[3]);
    }
}

// Writes to `numbers` what goes back for each received row, in the order in which rows arrived. A thread a row; what a
// block writes is one stretch, so it leaves through shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    pack_gradients(const float2* __restrict__ d_received, int num_received, const Run* __restrict__ runs, int num_runs,
                   int num_regions, float* __restrict__ numbers) {
    __shared__ float staged[THREADS * NUM_ROW_COLUMNS];
    __shared__ int begin, end;
    const int first = blockIdx.x * THREADS, arrived = first + threadIdx.x;
    const bool is_row = arrived < num_received;
    int group = SHADED, number = 0;
    float values[NUM_ROW_COLUMNS];
    if (is_row) {
        const int run = find_run(runs, num_runs, arrived), in_run = arrived - runs[run].row;
        group = run / num_regions % NUM_GROUPS;
        number = runs[run].number + in_run * numbers_back(group);
        const float2* from = d_received + static_cast<long long>(runs[run].place + in_run) * (NUM_ROW_COLUMNS / 2);
#pragma unroll
        for (int pair = 0; pair < NUM_ROW_COLUMNS / 2; ++pair) {
            const float2 two = from[pair];
            values[2 * pair] = two.x;
            values[2 * pair + 1] = two.y;
        }
        if (threadIdx.x == 0) begin = number;
        if (threadIdx.x == THREADS - 1 || arrived == num_received - 1) end = number + numbers_back(group);
    }
    __syncthreads();
    if (is_row) {
        float* to = staged + number - begin;
        if (group == ABSENT) {
            to[0] = values[MASK];
        } else {
#pragma unroll
            for (int column = 0; column < MASK; ++column) to[column] = values[column];
            if (group == CAPPED) to[MASK] = values[MASK];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < end - begin; i += THREADS) numbers[begin + i] = staged[i];
}

// Adds up what came back for the copies of each row, in the order of the view's regions. Grid: as pack_rows. Rows that are
// not in use are left as they are.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_copies(const float* __restrict__ rows, const int4* __restrict__ boxes, const unsigned char* __restrict__ keep,
               const int* __restrict__ counts, const int2* __restrict__ views, const Region* __restrict__ regions,
               int most_regions, float never_capped, int num_rows, const int* __restrict__ ordinals,
               const BlockStart* __restrict__ starts, const float* __restrict__ numbers, float2* __restrict__ d_rows) {
    const PackedRow mine(rows, boxes, keep, counts, views, never_capped, THREADS);
    if (!mine.is_used) return;
    float sums[NUM_ROW_COLUMNS] = {};
    for (int k = 0; k < most_regions; ++k) {
        const Region region = regions[blockIdx.y * most_regions + k];
        if (!mine.meets(region)) continue;
        const int ordinal = ordinals[static_cast<long long>(k) * num_rows + mine.row];
        const float* from = numbers + starts[region.block + mine.group * region.stride].number +
                            static_cast<long long>(ordinal) * numbers_back(mine.group);
        if (mine.group == ABSENT) {
            sums[MASK] += from[0];
        } else {
#pragma unroll
            for (int column = 0; column < MASK; ++column) sums[column] += from[column];
            if (mine.group == CAPPED) sums[MASK] += from[MASK];
        }
    }
    if (mine.group == SHADED) sums[MASK] = sums[OPACITY] * rows[mine.row * NUM_ROW_COLUMNS + OPACITY];
    float2* to = d_rows + mine.row * (NUM_ROW_COLUMNS / 2);
#pragma unroll
    for (int pair = 0; pair < NUM_ROW_COLUMNS / 2; ++pair) to[pair] = make_float2(sums[2 * pair], sums[2 * pair + 1]);
}
