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
//
// Copies travel in windows, one for each pair of ranks, of a capacity that the host knows or of just what is in them. The
// buffer of a way is: windows that go to the others, windows that come from the others, a rank's window for itself, which
// is written where it would arrive. Numbers on their way back have a buffer of the same form.
#include "lookback.cuh"

constexpr int THREADS = 256;
constexpr int ROUTE_THREADS = WARP * WARP;     // one warp scans the counts of all warps
constexpr int SHADED = 0, CAPPED = 1, ABSENT = 2, NUM_GROUPS = 3;
constexpr int NUM_DRAWN_NUMBERS = MASK;        // what comes back of a drawn row, but for its mask's gradient
constexpr int NUM_FLOATS = NUM_ROW_COLUMNS;    // on the wire: the row without its mask, then the depth
constexpr int BOX_WORDS = 4;
constexpr int NOWHERE = 0x7fffffff;            // a row of pixels below every image
constexpr int NEEDED_ROWS = 0, NEEDED_NUMBERS = 1, NEEDED_REGION = 2, NUM_NEEDS = 3;
constexpr int STATUS_WINDOWS = 3;              // status words: what would have been needed of these three (maximum)

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
// in the region's range; how many they are.
struct __align__(16) Run {
    int row, number, place, length;
};

// Where the windows of all ranks begin: those of the others one after the other, a rank's own behind them at a multiple of
// THREADS. counts (W): what is in each; capacity: what each has room for, 0 for no more than that.
struct Windows {
    const int* counts;
    int num_ranks, own, capacity;

    // What is in the windows before that of a rank.
    __device__ __forceinline__ int filled_before(int rank) const {
        int sum = 0;
        for (int other = 0; other < num_ranks; ++other) {
            if (other != own && (rank == own || other < rank)) sum += counts[other];
        }
        return sum;
    }

    __device__ __forceinline__ int start(int rank) const {
        if (capacity > 0) return capacity * (rank == own ? num_ranks - 1 : rank - (rank > own ? 1 : 0));
        const int before = filled_before(rank);
        return rank == own ? divide_up(before, THREADS) * THREADS : before;
    }

    // How much further back a window begins than if windows had no room to spare.
    __device__ __forceinline__ int shift(int rank) const { return start(rank) - filled_before(rank); }
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

// Blocks of all ranks: counts (W, K), K = 3 times all regions; first_regions (W + 1), the number of each rank's first one.
struct Blocks {
    const int* counts;
    const int* first_regions;
    int num_ranks;

    __device__ __forceinline__ int num_regions(int rank) const { return first_regions[rank + 1] - first_regions[rank]; }

    __device__ __forceinline__ int first(int rank) const { return NUM_GROUPS * first_regions[rank]; }

    __device__ __forceinline__ const int* between(int source, int target) const {
        return counts + source * first(num_ranks) + first(target);
    }

    // Who gets a block.
    __device__ __forceinline__ int target_of(int block) const {
        int target = 0;
        while (block >= first(target + 1)) ++target;
        return target;
    }

    // What one rank sends another, in rows and numbers.
    __device__ __forceinline__ Word sum_between(int source, int target) const {
        const int count = num_regions(target);
        Word sum = 0;
        for (int i = 0; i < NUM_GROUPS * count; ++i) sum += rows_and_numbers(between(source, target)[i], i / count);
        return sum;
    }

    // The rows that all ranks send for a region of a rank.
    __device__ __forceinline__ int sum_of_region(int target, int region) const {
        int sum = 0;
        for (int source = 0; source < num_ranks; ++source) {
            for (int group = 0; group < NUM_GROUPS; ++group) {
                sum += between(source, target)[group * num_regions(target) + region];
            }
        }
        return sum;
    }
};

// Raises needed (3) to the rows and the numbers of the fullest window between two ranks and the rows of the fullest region.
// All ranks find the same. All threads of one block take part.
__device__ __forceinline__ void find_needs(const Blocks& blocks, int* needed) {
    const int num_ranks = blocks.num_ranks;
    for (int pair = threadIdx.x; pair < num_ranks * num_ranks; pair += THREADS) {
        const int source = pair / num_ranks, target = pair % num_ranks;
        if (source == target) continue;
        const Word sum = blocks.sum_between(source, target);
        atomicMax(needed + NEEDED_ROWS, low_half(sum));
        atomicMax(needed + NEEDED_NUMBERS, high_half(sum));
    }
    for (int region = threadIdx.x; region < blocks.first_regions[num_ranks]; region += THREADS) {
        const int target = blocks.target_of(NUM_GROUPS * region);
        atomicMax(needed + NEEDED_REGION, blocks.sum_of_region(target, region - blocks.first_regions[target]));
    }
}

// Where everything lies, from the copies of every block that every rank sends: `counts` and first_regions, see Blocks.
// Writes starts (K); runs (3 Q W + 1) by rank (this one last), group and region; in_use (Q), the rows of each region; and
// for the host: rows sent to each rank, rows received from it, numbers that come back from it, numbers that go back to it
// (W each), the first row of each region (Q + 1), and the counts.
//
// Null status: windows hold just what is in them, and regions follow each other; window_rows, window_numbers, region_rows
// are 0. Otherwise these are the room of a window and of a region: nothing arrives in a step in which something does not
// fit, which the status then says, and the sizes that were needed are noted in any case. One block of threads.
extern "C" __global__ void __launch_bounds__(THREADS)
    arrange(const int* __restrict__ counts, const int* __restrict__ first_regions, int num_ranks, int rank,
            int window_rows, int window_numbers, int region_rows, BlockStart* __restrict__ starts,
            Run* __restrict__ runs, int* __restrict__ in_use, int* __restrict__ for_host, int* status) {
    __shared__ Word shared[THREADS / WARP];
    __shared__ int needed[NUM_NEEDS];
    const Blocks blocks{counts, first_regions, num_ranks};
    const int num_blocks = blocks.first(num_ranks), num_regions = blocks.num_regions(rank);
    const int per_rank = NUM_GROUPS * num_regions, num_runs = per_rank * num_ranks;
    int* offsets = for_host + 4 * num_ranks;
    const Windows to{for_host, num_ranks, rank, window_rows};
    const Windows from{for_host + num_ranks, num_ranks, rank, window_rows};
    const Windows back{for_host + 2 * num_ranks, num_ranks, rank, window_numbers};
    const Windows given{for_host + 3 * num_ranks, num_ranks, rank, window_numbers};

    // 1. What is in each window, and whether all has room.
    if (threadIdx.x < NUM_NEEDS) needed[threadIdx.x] = 0;
    for (int other = threadIdx.x; other < num_ranks; other += THREADS) {
        const Word out = blocks.sum_between(rank, other), in = blocks.sum_between(other, rank);
        for_host[other] = low_half(out);
        for_host[num_ranks + other] = low_half(in);
        for_host[2 * num_ranks + other] = high_half(out);
        for_host[3 * num_ranks + other] = high_half(in);
    }
    for (int i = threadIdx.x; i < num_ranks * num_blocks; i += THREADS) offsets[num_regions + 1 + i] = counts[i];
    __syncthreads();
    bool is_there = true;
    if (status != nullptr) {
        find_needs(blocks, needed);
        __syncthreads();
        const bool fits = needed[NEEDED_ROWS] <= window_rows && needed[NEEDED_NUMBERS] <= window_numbers &&
                          needed[NEEDED_REGION] <= region_rows;
        is_there = fits && !is_stopped(status);
        __syncthreads();  // before the status changes
        if (threadIdx.x < NUM_NEEDS) atomicMax(status + STATUS_WINDOWS + threadIdx.x, needed[threadIdx.x]);
        if (threadIdx.x == 0 && !fits) status[STATUS_OVERFLOW] = 1;
    }

    // 2. Where the blocks that are sent lie, a rank's own last, and the runs that arrive.
    const int num_own = blocks.first(rank + 1) - blocks.first(rank), num_others = num_blocks - num_own;
    const auto block_of = [&](int i) {
        return i >= num_others ? i - num_others + blocks.first(rank) : i < blocks.first(rank) ? i : i + num_own;
    };
    scan_all(
        num_blocks, shared,
        [&](int i) {
            const int block = block_of(i), target = blocks.target_of(block);
            const int group = (block - blocks.first(target)) / blocks.num_regions(target);
            return rows_and_numbers(counts[rank * num_blocks + block], group);
        },
        [&](int i, Word before) {
            const int block = block_of(i), target = blocks.target_of(block);
            starts[block] = {low_half(before) + to.shift(target) + (target == rank ? from.start(rank) : 0),
                             high_half(before) + back.shift(target)};
        });
    const auto source_of = [&](int run) {
        const int window = run / per_rank;
        return window == num_ranks - 1 ? rank : window + (window >= rank ? 1 : 0);
    };
    const auto length_of = [&](int run) { return blocks.between(source_of(run), rank)[run % per_rank]; };
    scan_all(
        num_runs, shared, [&](int i) { return rows_and_numbers(length_of(i), i % per_rank / num_regions); },
        [&](int i, Word before) {
            const int source = source_of(i);
            runs[i].row = low_half(before) + from.shift(source);
            runs[i].number = high_half(before) + given.shift(source) + (source == rank ? back.start(rank) : 0);
            runs[i].length = is_there ? length_of(i) : 0;
        });

    // 3. Where the runs go: region after region, or each region at its place.
    const int each = NUM_GROUPS * num_ranks;  // runs of a region
    const auto run_of = [&](int i) { return i % each * num_regions + i / each; };
    const Word received = scan_all(
        num_runs, shared, [&](int i) { return static_cast<Word>(length_of(run_of(i))); },
        [&](int i, Word before) {
            runs[run_of(i)].place = low_half(before);
            if (i % each == 0) offsets[i / each] = low_half(before);
        });
    if (threadIdx.x == 0) {
        runs[num_runs] = {0, 0, 0, 0};  // what a rank without regions finds: no rows
        offsets[num_regions] = low_half(received);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_runs && region_rows > 0; i += THREADS) {
        runs[i].place += i % num_regions * region_rows - offsets[i % num_regions];
    }
    for (int region = threadIdx.x; region < num_regions; region += THREADS) {
        in_use[region] = is_there ? offsets[region + 1] - offsets[region] : 0;
    }
}

// Writes every copy to `wire`: nine floats of the row, the depth, the low words of the id, the box when it travels.
// Grid: (rows of the longest view / 256, B). Status, here and below: of `arrange`; what has no room is not touched.
extern "C" __global__ void __launch_bounds__(THREADS)
    pack_rows(const float* __restrict__ rows, const int4* __restrict__ boxes, const unsigned char* __restrict__ keep,
              const int* __restrict__ counts, const int2* __restrict__ views, const Region* __restrict__ regions,
              int most_regions, float never_capped, int num_rows, const int* __restrict__ ordinals,
              const BlockStart* __restrict__ starts, const int* __restrict__ status, const int* __restrict__ depths,
              const int2* __restrict__ ids, int id_words, int sends_boxes, int* __restrict__ wire) {
    if (is_stopped(status)) return;
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

// Puts what arrived into the ranges of its regions. Null sizes (Q): boxes have travelled. A thread a row of the windows.
extern "C" __global__ void __launch_bounds__(THREADS)
    unpack_rows(const int* __restrict__ wire, int num_rows, const Run* __restrict__ runs, int num_runs,
                int num_regions, const int2* __restrict__ sizes, int id_words, float* __restrict__ rows,
                float* __restrict__ depths, int2* __restrict__ ids, int* __restrict__ gaussians,
                int4* __restrict__ boxes) {
    const int arrived = blockIdx.x * THREADS + threadIdx.x;
    if (arrived >= num_rows) return;
    const int run = find_run(runs, num_runs, arrived), in_run = arrived - runs[run].row;
    if (in_run >= runs[run].length) return;
    const long long place = runs[run].place + in_run;
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

// Writes to `numbers` what goes back for each received row, in the order in which rows arrived. A thread a row of the
// windows: no block has rows of two of them unless these follow each other, its first threads have all its rows, and what
// it writes is one stretch, which leaves through shared memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    pack_gradients(const float2* __restrict__ d_received, int num_rows, const Run* __restrict__ runs, int num_runs,
                   int num_regions, float* __restrict__ numbers) {
    __shared__ float staged[THREADS * NUM_ROW_COLUMNS];
    __shared__ int begin, end;
    const int arrived = blockIdx.x * THREADS + threadIdx.x;
    int run = 0, in_run = 0, length = 0, group = SHADED, number = 0;
    if (arrived < num_rows) {
        run = find_run(runs, num_runs, arrived);
        in_run = arrived - runs[run].row;
        length = runs[run].length;
    }
    const bool is_row = in_run < length;
    const int used = __syncthreads_count(is_row);
    if (used == 0) return;
    float values[NUM_ROW_COLUMNS];
    if (is_row) {
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
        if (threadIdx.x == used - 1) end = number + numbers_back(group);
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
               const BlockStart* __restrict__ starts, const int* __restrict__ status,
               const float* __restrict__ numbers, float2* __restrict__ d_rows) {
    if (is_stopped(status)) return;
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
