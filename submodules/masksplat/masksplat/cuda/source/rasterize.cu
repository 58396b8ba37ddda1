// SPDX-License-Identifier: Apache-2.0
// Masked front-to-back compositing: C = sum m alpha T c + T_end background, T_{i+1} = T_i (1 - m alpha) (docs/masks.md).
//
// forward_tiles: a block a tile, a warp a subtile, a thread a pixel.
//   ranges (tiles, 2), tile_order (tiles), list_rows: the tile lists of binning.cu.
//   rgb (h, w, 3), transmittance (h, w): the region's pixels.
//   pairs (tile rows): evaluated (pixel, splat) pairs are added.
// For the backward, unless `counter` is null:
//   reached (instances): subtiles that a place of a list reaches, a bit each.
//   ends (tiles): one past the last place that was looked at, a whole number of buckets.
//   buckets (capacity, 2): each bucket that was looked at (compositing.cuh), in any order.
//   alive (capacity, 8): pixels of a subtile that had not ended before the bucket; 0 where no splat of it reaches.
//   checkpoints (capacity, 256): T and colour before the bucket, of subtiles whose `alive` is not 0.
//   counter: buckets in use, more than `capacity` when they did not fit (then the status says so).
//
// Stages of a batch: 1 every thread stages a splat and the subtiles that it reaches, 2 each warp gathers from these the
// splats of its subtile, 32 at a time, and composites them. Splats with m = 0 are in no warp's gathering.

#include "compositing.cuh"

constexpr int THREADS = TILE_PIXELS;
constexpr int BATCH = THREADS;
constexpr int BLOCKS_PER_SM = 4;                // leaves 64 registers to a thread
constexpr unsigned SAMPLED_BIT = 1u << SUBTILES;
constexpr int STATUS_BUCKETS = 2;               // status word: buckets that would have been needed (maximum)

struct Saved {
    unsigned char* reached;
    int* ends;
    int2* buckets;
    unsigned* alive;
    float4* checkpoints;
    int* counter;
    int capacity;
    int* status;
};

struct Staging {
    float4 splats[BATCH * SPLAT_FLOATS / 4];
    alignas(16) unsigned offsets[SUBTILES][BUCKET];  // of each warp: bytes from `splats` to those it composites next
    unsigned short bits[BATCH];                 // subtiles that a splat reaches, and SAMPLED_BIT
    int first_bucket;
};

template <int NUM>
struct alignas(NUM * sizeof(unsigned)) Offsets {
    unsigned at[NUM];
};

template <int NUM>
__device__ __forceinline__ Offsets<NUM> load_offsets(const unsigned* offsets) {
    return *reinterpret_cast<const Offsets<NUM>*>(offsets);
}

struct Pixel {
    float x, y;                                 // centre
    float light;                                // T; -T when it has ended
    float red, green, blue;
};

// Composite NUM splats that begin at the `offsets`. The alphas of several do not wait for each other; only the light does.
template <int NUM>
__device__ __forceinline__ void composite(const Staging& staging, const Offsets<NUM>& from, Pixel& pixel) {
    float effective[NUM], red[NUM], green[NUM], blue[NUM];
#pragma unroll
    for (int k = 0; k < NUM; ++k) {
        const Splat splat =
            staged_splat(reinterpret_cast<const float4*>(reinterpret_cast<const char*>(staging.splats) + from.at[k]));
        effective[k] = effective_alpha(uncapped_alpha(splat, pixel.x - splat.x, pixel.y - splat.y), splat.mask);
        red[k] = splat.red;
        green[k] = splat.green;
        blue[k] = splat.blue;
    }
#pragma unroll
    for (int k = 0; k < NUM; ++k) {
        const float weight = advance(pixel.light, effective[k]);
        pixel.red += weight * red[k];
        pixel.green += weight * green[k];
        pixel.blue += weight * blue[k];
    }
}

// Composite the splats `sampled` (a bit each) of a group of staged ones, whose first is `first`; returns how many. Their
// addresses are listed once, which takes less than finding the next bit for each.
__device__ __forceinline__ int composite_group(Staging& staging, int first, unsigned sampled, Pixel& pixel) {
    const int lane = lane_index(), count = __popc(sampled);
    unsigned* offsets = staging.offsets[warp_index()];
    __syncwarp();
    if ((sampled >> lane & 1) != 0) {
        offsets[__popc(sampled & ((1u << lane) - 1))] = (first + lane) * (SPLAT_FLOATS * sizeof(float));
    }
    __syncwarp();
    const unsigned* end = offsets + (count & ~3);
    for (; offsets != end; offsets += 4) composite<4>(staging, load_offsets<4>(offsets), pixel);
    if ((count & 2) != 0) composite<2>(staging, load_offsets<2>(offsets), pixel);
    if ((count & 1) != 0) composite<1>(staging, load_offsets<1>(offsets + (count & 2)), pixel);
    return count;
}

// The `count` places from `first` on, reserved for the buckets of a batch; -1 when that is too many.
__device__ __forceinline__ int checked_places(const Saved& saved, int first, int count) {
    if (first + count <= saved.capacity) return first;
    // The backward goes through all reserved places up to the capacity: these hold no bucket.
    for (int place = first; place < saved.capacity; ++place) saved.buckets[place] = make_int2(0, -1);
    atomicMax(saved.status + STATUS_BUCKETS, first + count);
    saved.status[STATUS_OVERFLOW] = 1;
    return -1;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
forward_tiles(const float* __restrict__ rows, const int2* __restrict__ ranges, const int* __restrict__ tile_order,
              const int* __restrict__ list_rows,
              int first_row, int last_row, int columns, int width, const float* __restrict__ background,
              float* __restrict__ rgb, float* __restrict__ transmittance, unsigned long long* pairs,
              unsigned char* __restrict__ reached, int* __restrict__ ends, int2* __restrict__ buckets,
              unsigned* __restrict__ alive, float4* __restrict__ checkpoints, int* counter, int bucket_capacity,
              int* status) {
    __shared__ Staging staging;
    const Saved saved = {reached, ends, buckets, alive, checkpoints, counter, bucket_capacity, status};
    const int tile = tile_order[blockIdx.x], warp = warp_index(), lane = lane_index(), thread = threadIdx.x;
    const int tile_x = tile % columns * TILE, tile_y = first_row + tile / columns * TILE;
    const int x = tile_x + pixel_x(warp, lane), y = tile_y + pixel_y(warp, lane);
    const bool is_inside = x < width && y < last_row;
    Pixel pixel = {x + 0.5f, y + 0.5f, is_inside ? 1.0f : -1.0f, 0.0f, 0.0f, 0.0f};
    const int2 range = ranges[tile];
    int next = range.x + thread < range.y ? list_rows[range.x + thread] : -1;
    Row row = {};
    if (next >= 0) row = load_row(rows, next);
    next = range.x + BATCH + thread < range.y ? list_rows[range.x + BATCH + thread] : -1;
    int start = range.x, num_evaluated = 0;
    for (; start < range.y; start += BATCH) {
        if (__syncthreads_and(pixel.light <= 0.0f)) break;
        const int count = min(BATCH, range.y - start), num_buckets = divide_up(count, BUCKET);
        // Answered while the batch is staged.
        const int reserved = thread == 0 && saved.counter != nullptr ? atomicAdd(saved.counter, num_buckets) : 0;
        unsigned bits = 0;
        if (thread < count) {
            const Splat splat = splat_of(row);
            bits = reached_subtiles(row, splat.log_opacity, float(tile_x), float(tile_y));
            stage_splat(staging.splats + thread * (SPLAT_FLOATS / 4), splat);
            if (saved.counter != nullptr) saved.reached[start + thread] = static_cast<unsigned char>(bits);
            bits |= splat.mask != 0.0f ? SAMPLED_BIT : 0;
        }
        staging.bits[thread] = static_cast<unsigned short>(bits);
        if (thread == 0) staging.first_bucket = saved.counter != nullptr ? checked_places(saved, reserved, num_buckets) : -1;
        __syncthreads();
        // The next batch's rows are on their way while this one is composited.
        if (next >= 0) row = load_row(rows, next);
        next = start + 2 * BATCH + thread < range.y ? list_rows[start + 2 * BATCH + thread] : -1;
        const int bucket = staging.first_bucket;
        if (bucket >= 0 && thread < num_buckets) {
            const int first = thread * BUCKET;
            saved.buckets[bucket + thread] = make_bucket(tile, start + first, min(BUCKET, count - first));
        }
        unsigned alive_of_lane = 0;
        for (int group = 0; group < num_buckets; ++group) {
            const unsigned living = __ballot_sync(ALL_LANES, pixel.light > 0.0f);
            if (living == 0) break;
            const unsigned its_bits = staging.bits[group * BUCKET + lane];
            const bool is_here = (its_bits >> warp & 1) != 0;
            const unsigned here = __ballot_sync(ALL_LANES, is_here);
            const unsigned sampled = __ballot_sync(ALL_LANES, is_here && (its_bits & SAMPLED_BIT) != 0);
            if (bucket >= 0 && here != 0) {
                if (lane == group) alive_of_lane = living;
                if (pixel.light > 0.0f) {
                    saved.checkpoints[static_cast<long long>(bucket + group) * TILE_PIXELS + thread] =
                        make_float4(pixel.light, pixel.red, pixel.green, pixel.blue);
                }
            }
            num_evaluated += composite_group(staging, group * BUCKET, sampled, pixel);
        }
        if (bucket >= 0 && lane < num_buckets) saved.alive[(bucket + lane) * SUBTILES + warp] = alive_of_lane;
    }
    if (lane == 0 && num_evaluated > 0) {
        atomicAdd(pairs + tile / columns, static_cast<unsigned long long>(num_evaluated) * WARP);
    }
    if (thread == 0 && saved.counter != nullptr) saved.ends[tile] = min(start, range.y);
    if (is_inside) {
        const float light = fabsf(pixel.light);
        const int at = (y - first_row) * width + x;
        transmittance[at] = light;
        rgb[3 * at] = pixel.red + light * background[0];
        rgb[3 * at + 1] = pixel.green + light * background[1];
        rgb[3 * at + 2] = pixel.blue + light * background[2];
    }
}
