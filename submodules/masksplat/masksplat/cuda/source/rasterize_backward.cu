// SPDX-License-Identifier: Apache-2.0
// Exact gradient of masked compositing, front to back (docs/masks.md derives it).
//
// With g = dL/dC, a_i = m_i alpha_i and S_i the part of g . C + T_end dL/dT_end that lies behind splat i,
//     dL/da_i = T_i g . c_i - S_i / (1 - a_i),
//     dL/dm_i = alpha_i dL/da_i,      dL/dalpha_i = m_i dL/da_i,      dL/dc_i = a_i T_i g.
// A warp takes a bucket of 32 splats of one tile's list, starts from the forward's checkpoint (T and colour in front of
// the bucket, hence S) and repeats the forward's decisions bit for bit. In `backward_pixels` a lane owns one pixel of
// each subtile, and after each splat the warp adds its lanes up. The ten sums of every instance of the bucket go to
// sums[instance], and the bucket that ends the tile's part that was looked at writes zeros for the rest of its list. No
// atomics.
// sum_parts adds up the instances of each part of a large splat (totals.cuh), finish_rows those of each splat or its
// parts in their order, and turns moments into gradients of the row.
//
// Buffers of the forward: rasterize.cu. d_transmittance may be null.

#include "compositing.cuh"
#include "totals.cuh"

constexpr int BACKWARD_WARPS = 4;
constexpr int BACKWARD_THREADS = BACKWARD_WARPS * WARP;
constexpr int NUM_SUMS = 10;

// The sums of an instance over pixels, d = dL/dpower: d, d dx, d dy, d dx^2, d dx dy, d dy^2, dL/dcolour, dL/dmask.
constexpr int SUM_MASK = 9;

struct Image {
    int first_row, last_row, columns, width;
    const float *rgb, *transmittance, *d_rgb, *d_transmittance;
};

struct Lists {
    const int2* ranges;
    const int *rows, *instances, *ends;
    const unsigned char* reached;
    const int2* buckets;
    const unsigned* alive;
    const float4* checkpoints;
};

struct Gradient {
    float red, green, blue;                     // g
    float behind;                               // S
};

// g of the image's pixel at `place`, and S behind the checkpoint.
__device__ __forceinline__ Gradient load_gradient(const Image& image, int place, const float4& checkpoint) {
    Gradient g = {image.d_rgb[3 * place], image.d_rgb[3 * place + 1], image.d_rgb[3 * place + 2], 0.0f};
    if (image.d_transmittance != nullptr) g.behind = image.transmittance[place] * image.d_transmittance[place];
    g.behind += g.red * (image.rgb[3 * place] - checkpoint.y) + g.green * (image.rgb[3 * place + 1] - checkpoint.z) +
                g.blue * (image.rgb[3 * place + 2] - checkpoint.w);
    return g;
}

struct Pair {
    float weight;                               // a T
    float d_mask;                               // alpha dL/da
    float d_power;
};

// A splat is plain when its mask is 1 and no pixel can cap its alpha, so that d_mask and d_power are one number. The
// bound on log2(opacity) is 1e-4 below ALPHA_MAX, more than alpha's rounding.
constexpr float LOG2_PLAIN = -0.01465f;

__device__ __forceinline__ bool is_plain(const Splat& splat) {
    return splat.mask == 1.0f && splat.log_opacity < LOG2_PLAIN && splat.along <= 0.0f && splat.across <= 0.0f;
}

// One pixel and one splat: its share of the gradients; light and S move behind the splat. An ended pixel has light 0.
template <bool IS_PLAIN>
__device__ __forceinline__ Pair differentiate(const Splat& splat, float dx, float dy, float& light, Gradient& g) {
    const float uncapped = uncapped_alpha(splat, dx, dy);
    const float bounded = IS_PLAIN ? uncapped : fminf(uncapped, ALPHA_MAX);
    const float alpha = uncapped >= ALPHA_MIN ? bounded : 0.0f;
    const float effective = IS_PLAIN ? alpha : __fmul_rn(splat.mask, alpha);
    const float after = light_behind(light, effective);
    const bool is_lit = after >= TRANSMITTANCE_MIN;
    const float g_colour = g.red * splat.red + g.green * splat.green + g.blue * splat.blue;
    // What the pixel does not come to counts as alpha = 0.
    const float alpha_if_lit = is_lit ? alpha : 0.0f;
    Pair pair;
    pair.weight = light * (IS_PLAIN ? alpha_if_lit : splat.mask * alpha_if_lit);
    g.behind -= pair.weight * g_colour;
    const float d_effective = light * g_colour - g.behind * reciprocal_approximate(1.0f - effective);
    pair.d_mask = alpha_if_lit * d_effective;
    pair.d_power = IS_PLAIN ? pair.d_mask : uncapped > ALPHA_MAX ? 0.0f : splat.mask * pair.d_mask;
    light = is_lit ? after : 0.0f;
    return pair;
}

// dL/dm of one pixel and a splat with m = 0, which changes nothing behind it.
__device__ __forceinline__ float differentiate_unsampled(const Splat& splat, float dx, float dy, float light,
                                                         const Gradient& g) {
    const float uncapped = uncapped_alpha(splat, dx, dy);
    const float g_colour = g.red * splat.red + g.green * splat.green + g.blue * splat.blue;
    const bool is_accepted = uncapped >= ALPHA_MIN && light > 0.0f;
    return is_accepted ? fminf(uncapped, ALPHA_MAX) * (light * g_colour - g.behind) : 0.0f;
}

struct Bucket {
    int tile_x, tile_y;                         // pixels
    int first, count;                           // places of the list
    int rest_first, rest_last;                  // places behind that no bucket covers, if this is the tile's last one
};

__device__ __forceinline__ float4 load_checkpoint(const Lists& lists, int index, int pixel) {
    return lists.checkpoints[static_cast<long long>(index) * TILE_PIXELS + pixel];
}

// Place in the image of the pixel that `lane` has in `subtile` of the bucket's tile.
__device__ __forceinline__ int place_of(const Image& image, const Bucket& bucket, int subtile, int lane) {
    const int row = bucket.tile_y - image.first_row + pixel_y(subtile, lane);
    return row * image.width + bucket.tile_x + pixel_x(subtile, lane);
}

// The bucket of a warp; false when there is none. The counter is asked for together with what it may make worthless.
__device__ __forceinline__ bool find_bucket(const Lists& lists, const Image& image, int index, const int* counter,
                                            int capacity, Bucket& bucket, unsigned& alive) {
    if (index >= capacity) return false;
    const int2 entry = lists.buckets[index];
    alive = lists.alive[index * SUBTILES + lane_index() % SUBTILES];
    if (index >= *counter || entry.y < 0) return false;  // none, or there was no room for it
    const int tile = tile_of_bucket(entry);
    bucket.tile_x = tile % image.columns * TILE;
    bucket.tile_y = image.first_row + tile / image.columns * TILE;
    bucket.first = entry.y;
    bucket.count = count_of_bucket(entry);
    const int stop = lists.ranges[tile].y, end = lists.ends[tile];
    bucket.rest_first = end;
    bucket.rest_last = entry.y + BUCKET >= end ? stop : end;
    return true;
}

__device__ __forceinline__ void write_sums(float* sums, int instance, const float* values) {
    float2* out = reinterpret_cast<float2*>(sums + static_cast<long long>(instance) * NUM_SUMS);
#pragma unroll
    for (int k = 0; k < NUM_SUMS / 2; ++k) out[k] = make_float2(values[2 * k], values[2 * k + 1]);
}

// Zeros for the splats that the forward did not come to.
__device__ __forceinline__ void clear_rest(const Lists& lists, const Bucket& bucket, float* sums) {
    const float zeros[NUM_SUMS] = {};
    for (int place = bucket.rest_first + lane_index(); place < bucket.rest_last; place += WARP) {
        write_sums(sums, lists.instances[place], zeros);
    }
}

// --- from pixels to instances -----------------------------------------------------------------------------------------

constexpr int BLOCKS_PER_SM = 5;                // leaves 96 registers to a thread
constexpr int GATHERED = WARP / NUM_SUMS;       // splats whose sums are added over the warp together
constexpr int GATHERED_STRIDE = WARP + 4;       // floats; vectors of neighbouring rows lie in different banks

struct PixelShared {
    float4 splats[BUCKET * SPLAT_FLOATS / 4];
    float4 of_lanes[WARP * GATHERED_STRIDE / 4];   // row: a sum of a splat, column: what a lane has of it
};

struct PixelStates {
    float light[SUBTILES];
    Gradient g[SUBTILES];
};

// What a lane has of the sums of one splat: moments in y apart for its two columns of pixels, as all of a column have
// the same dx.
struct ColumnSums {
    float one[SUBTILE_COLUMNS], y[SUBTILE_COLUMNS];
    float yy, red, green, blue, mask;
};

// The bucket's splats that reach each subtile, a bit each. All lanes have the same, so that branches are cheap.
struct Reaching {
    unsigned splats[SUBTILES];
};

// One splat, `bit`, over the lane's pixels of the subtiles that it reaches. dx: of the two columns; y: centre of the lane's first pixel.
template <bool IS_PLAIN>
__device__ __forceinline__ ColumnSums sum_sampled(const Splat& splat, const Reaching& reaching, unsigned bit,
                                               const float (&dx)[SUBTILE_COLUMNS],
                                                  float y, PixelStates& pixels) {
    ColumnSums sums = {};
#pragma unroll
    for (int subtile = 0; subtile < SUBTILES; ++subtile) {
        if ((reaching.splats[subtile] & bit) == 0) continue;
        const int column = subtile % SUBTILE_COLUMNS;
        const float dy = y + float(subtile / SUBTILE_COLUMNS * SUBTILE_HEIGHT) - splat.y;
        Gradient& g = pixels.g[subtile];
        const Pair pair = differentiate<IS_PLAIN>(splat, dx[column], dy, pixels.light[subtile], g);
        const float moment_y = pair.d_power * dy;
        sums.one[column] += pair.d_power;
        sums.y[column] += moment_y;
        sums.yy += moment_y * dy;
        sums.red += pair.weight * g.red;
        sums.green += pair.weight * g.green;
        sums.blue += pair.weight * g.blue;
        if (!IS_PLAIN) sums.mask += pair.d_mask;
    }
    if (IS_PLAIN) sums.mask = sums.one[0] + sums.one[1];
    return sums;
}

__device__ __forceinline__ float sum_unsampled(const Splat& splat, const Reaching& reaching, unsigned bit,
                                               const float (&dx)[SUBTILE_COLUMNS],
                                               float y, const PixelStates& pixels) {
    float sum = 0.0f;
#pragma unroll
    for (int subtile = 0; subtile < SUBTILES; ++subtile) {
        if ((reaching.splats[subtile] & bit) == 0) continue;
        const float dy = y + float(subtile / SUBTILE_COLUMNS * SUBTILE_HEIGHT) - splat.y;
        sum += differentiate_unsampled(splat, dx[subtile % SUBTILE_COLUMNS], dy, pixels.light[subtile],
                                       pixels.g[subtile]);
    }
    return sum;
}

// Lane's share of the ten sums of the `slot`-th gathered splat, to shared memory.
__device__ __forceinline__ void gather(const ColumnSums& sums, const float (&dx)[SUBTILE_COLUMNS], int slot,
                                       PixelShared& shared) {
    const float x_0 = sums.one[0] * dx[0], x_1 = sums.one[1] * dx[1];
    const float values[NUM_SUMS] = {
        sums.one[0] + sums.one[1],
        x_0 + x_1,
        sums.y[0] + sums.y[1],
        x_0 * dx[0] + x_1 * dx[1],
        sums.y[0] * dx[0] + sums.y[1] * dx[1],
        sums.yy,
        sums.red,
        sums.green,
        sums.blue,
        sums.mask,
    };
    float* column = reinterpret_cast<float*>(shared.of_lanes) + slot * NUM_SUMS * GATHERED_STRIDE + lane_index();
#pragma unroll
    for (int k = 0; k < NUM_SUMS; ++k) column[k * GATHERED_STRIDE] = values[k];
}

// Sum over the warp of the gathered row that is this lane's.
__device__ __forceinline__ float sum_of_row(const PixelShared& shared) {
    const float4* row = shared.of_lanes + lane_index() * (GATHERED_STRIDE / 4);
    float4 sum = row[0];
#pragma unroll
    for (int k = 1; k < WARP / 4; ++k) {
        const float4 more = row[k];
        sum.x += more.x;
        sum.y += more.y;
        sum.z += more.z;
        sum.w += more.w;
    }
    return (sum.x + sum.y) + (sum.z + sum.w);
}

// Write the rows of the gathered splats; lane k has sum k % 10 of splat k / 10, whose instance it is given.
__device__ __forceinline__ void write_gathered(const PixelShared& shared, int num_gathered, int instance, float* sums) {
    __syncwarp();
    const float sum = sum_of_row(shared);
    const int lane = lane_index();
    if (lane < num_gathered * NUM_SUMS) {
        sums[static_cast<long long>(instance) * NUM_SUMS + lane % NUM_SUMS] = sum;
    }
    __syncwarp();
}

// The lane's pixels as they are in front of the bucket; returns the subtiles that have a pixel alive. Pixels that have
// ended read the first one of all: no branch, so that all loads are on their way together. Lane k has `alive` of the
// subtile k % SUBTILES.
__device__ __forceinline__ unsigned load_pixels(const Lists& lists, const Image& image, const Bucket& bucket,
                                                int index, unsigned alive, PixelStates& pixels) {
    const int lane = lane_index();
    float4 checkpoints[SUBTILES];
    int places[SUBTILES];
    unsigned living = 0;
#pragma unroll
    for (int subtile = 0; subtile < SUBTILES; ++subtile) {
        const unsigned its_alive = __shfl_sync(ALL_LANES, alive, subtile);
        const bool is_alive = (its_alive >> lane & 1) != 0;
        living |= unsigned(its_alive != 0) << subtile;
        checkpoints[subtile] = load_checkpoint(lists, is_alive ? index : 0, is_alive ? subtile * WARP + lane : 0);
        places[subtile] = is_alive ? place_of(image, bucket, subtile, lane) : -1;
    }
#pragma unroll
    for (int subtile = 0; subtile < SUBTILES; ++subtile) {
        const bool is_alive = places[subtile] >= 0;
        const Gradient g = load_gradient(image, max(places[subtile], 0), checkpoints[subtile]);
        pixels.light[subtile] = is_alive ? checkpoints[subtile].x : 0.0f;
        pixels.g[subtile].red = is_alive ? g.red : 0.0f;
        pixels.g[subtile].green = is_alive ? g.green : 0.0f;
        pixels.g[subtile].blue = is_alive ? g.blue : 0.0f;
        pixels.g[subtile].behind = is_alive ? g.behind : 0.0f;
    }
    return living;
}

extern "C" __global__ void __launch_bounds__(BACKWARD_THREADS, BLOCKS_PER_SM)
backward_pixels(const float* __restrict__ rows, const int2* __restrict__ ranges, const int* __restrict__ list_rows,
                const int* __restrict__ list_instances, const unsigned char* __restrict__ reached,
                const int* __restrict__ ends, const int2* __restrict__ buckets, const unsigned* __restrict__ alive,
                const float4* __restrict__ checkpoints, const int* __restrict__ counter, int bucket_capacity,
                int first_row, int last_row, int columns, int width, const float* __restrict__ rgb,
                const float* __restrict__ transmittance, const float* __restrict__ d_rgb,
                const float* __restrict__ d_transmittance, float* __restrict__ sums) {
    __shared__ PixelShared of_warps[BACKWARD_WARPS];
    const Lists lists = {ranges, list_rows, list_instances, ends, reached, buckets, alive, checkpoints};
    const Image image = {first_row, last_row, columns, width, rgb, transmittance, d_rgb, d_transmittance};
    const int lane = lane_index(), index = blockIdx.x * BACKWARD_WARPS + warp_index();
    Bucket bucket;
    unsigned alive_of_lane;
    if (!find_bucket(lists, image, index, counter, bucket_capacity, bucket, alive_of_lane)) return;
    PixelShared& shared = of_warps[warp_index()];
    unsigned its_reached = 0;
    int its_instance = 0;
    bool is_sampled = false, its_plain = false;
    Row row = {};
    if (lane < bucket.count) {
        its_reached = lists.reached[bucket.first + lane];
        its_instance = lists.instances[bucket.first + lane];
        row = load_row(rows, lists.rows[bucket.first + lane]);
    }
    PixelStates pixels;
    its_reached &= load_pixels(lists, image, bucket, index, alive_of_lane, pixels);
    if (lane < bucket.count) {
        const Splat splat = splat_of(row);
        is_sampled = splat.mask != 0.0f;
        its_plain = is_plain(splat);
        stage_splat(shared.splats + lane * (SPLAT_FLOATS / 4), splat);
    }
    const float zeros[NUM_SUMS] = {};
    // Rows of splats that reach no living subtile, and all but the last value of those with m = 0.
    if (lane < bucket.count && (its_reached == 0 || !is_sampled)) write_sums(sums, its_instance, zeros);
    const unsigned sampled = __ballot_sync(ALL_LANES, is_sampled), plain = __ballot_sync(ALL_LANES, its_plain);
    __syncwarp();
    const float x = bucket.tile_x + pixel_x(0, lane) + 0.5f, y = bucket.tile_y + pixel_y(0, lane) + 0.5f;
    int num_gathered = 0, instance_of_row = 0;
    Reaching reaching;
#pragma unroll
    for (int subtile = 0; subtile < SUBTILES; ++subtile) {
        reaching.splats[subtile] = __ballot_sync(ALL_LANES, (its_reached >> subtile & 1) != 0);
    }
    for (unsigned left = __ballot_sync(ALL_LANES, its_reached != 0); left != 0; left &= left - 1) {
        const int k = __ffs(left) - 1;
        const unsigned bit = 1u << k;
        const int instance = __shfl_sync(ALL_LANES, its_instance, k);
        const Splat splat = staged_splat(shared.splats + k * (SPLAT_FLOATS / 4));
        const float dx[SUBTILE_COLUMNS] = {x - splat.x, x + float(SUBTILE_WIDTH) - splat.x};
        if ((sampled & bit) == 0) {
            const float sum = warp_sum(sum_unsampled(splat, reaching, bit, dx, y, pixels));
            if (lane == 0) sums[static_cast<long long>(instance) * NUM_SUMS + SUM_MASK] = sum;
            continue;
        }
        if ((plain & bit) != 0) {
            gather(sum_sampled<true>(splat, reaching, bit, dx, y, pixels), dx, num_gathered, shared);
        } else {
            gather(sum_sampled<false>(splat, reaching, bit, dx, y, pixels), dx, num_gathered, shared);
        }
        if (lane / NUM_SUMS == num_gathered) instance_of_row = instance;
        if (++num_gathered == GATHERED) {
            write_gathered(shared, GATHERED, instance_of_row, sums);
            num_gathered = 0;
        }
    }
    if (num_gathered > 0) write_gathered(shared, num_gathered, instance_of_row, sums);
    clear_rest(lists, bucket, sums);
}

// --- from instances to splats -----------------------------------------------------------------------------------------

constexpr int PAIRS = NUM_SUMS / 2;             // a lane adds up one of the five pairs of a row: rows are read as they lie
constexpr int PART_WARPS = 8;
constexpr int LANES_IN_USE = WARP / PAIRS * PAIRS;
constexpr int FINISH_WARPS = 8, FINISH_ITEMS = 2, FINISH_THREADS = FINISH_WARPS * WARP;
constexpr int SPLATS_OF_WARP = WARP / PAIRS;    // at a time

// The sum over each part takes the place of its first row in `sums`.
extern "C" __global__ void __launch_bounds__(PART_WARPS * WARP)
sum_parts(const int4* __restrict__ parts, const int* __restrict__ totals, float2* sums) {
    const int num_parts = totals[TOTAL_PARTS], lane = lane_index();
    for (int index = blockIdx.x * PART_WARPS + warp_index(); index < num_parts; index += gridDim.x * PART_WARPS) {
        const int4 part = parts[index];
        float2* its_sums = sums + static_cast<long long>(part.z) * PAIRS;
        float2 sum = make_float2(0.0f, 0.0f);
        if (lane < LANES_IN_USE) {
#pragma unroll 4
            for (int k = lane; k < part.w * PAIRS; k += LANES_IN_USE) {
                sum.x += its_sums[k].x;
                sum.y += its_sums[k].y;
            }
        }
        // Lanes k, k + 5, ..., k + 25 have the same pair.
        float2 total = sum;
#pragma unroll
        for (int from = PAIRS; from < LANES_IN_USE; from += PAIRS) {
            total.x += __shfl_down_sync(ALL_LANES, sum.x, from);
            total.y += __shfl_down_sync(ALL_LANES, sum.y, from);
        }
        if (lane < PAIRS) its_sums[lane] = total;
    }
}

// What the gradient of a row takes of the row itself.
struct Conic {
    float a, b, c, opacity;
};

// Pair `pair` of the gradient of a row from all its sums.
__device__ __forceinline__ float2 gradient_of_row(const Conic& conic, const float2* sums, int pair) {
    const float2 of_1_x = sums[0], of_y_xx = sums[1], of_xy_yy = sums[2];
    if (pair == 0) {
        return make_float2(conic.a * of_1_x.y + conic.b * of_y_xx.x, conic.b * of_1_x.y + conic.c * of_y_xx.x);
    }
    if (pair == 1) return make_float2(-0.5f * of_y_xx.y, -of_xy_yy.x);
    if (pair == 2) return make_float2(-0.5f * of_xy_yy.y, of_1_x.x / conic.opacity);
    return sums[pair];
}

// first_instances (splats + 1), totals: binning.cu. sums (instances, 10): as sum_parts leaves them. d_rows (splats, 10)
// is added to, or written when `overwrites`. A lane has a pair of FINISH_ITEMS splats, so that what it waits for is on its
// way for all of them; so are the first two instances, and most splats have no more. A splat's lanes are in one warp.
extern "C" __global__ void __launch_bounds__(FINISH_THREADS)
finish_rows(const float2* __restrict__ rows, const int* __restrict__ first_instances, const int* __restrict__ totals,
            const float2* __restrict__ sums, int overwrites, float2* __restrict__ d_rows) {
    __shared__ float2 shared[FINISH_ITEMS][FINISH_THREADS];
    const int lane = lane_index(), pair = lane % PAIRS, num_splats = totals[TOTAL_SPLATS];
    const int first_of_warp = (blockIdx.x * FINISH_WARPS + warp_index()) * FINISH_ITEMS * SPLATS_OF_WARP;
    if (first_of_warp >= num_splats) return;
    const bool has_instances = totals[TOTAL_INSTANCES] > 0, is_idle = lane >= LANES_IN_USE;
    const int first_splat = first_of_warp + lane / PAIRS;
    int firsts[FINISH_ITEMS], lasts[FINISH_ITEMS];
    Conic conics[FINISH_ITEMS];
    float2 one[FINISH_ITEMS], two[FINISH_ITEMS];
#pragma unroll
    for (int k = 0; k < FINISH_ITEMS; ++k) {
        const int splat = first_splat + k * SPLATS_OF_WARP;
        const bool is_used = splat < num_splats && has_instances && !is_idle;
        firsts[k] = is_used ? first_instances[splat] : 0;
        lasts[k] = is_used ? first_instances[splat + 1] : 0;
        const float2* row = rows + static_cast<long long>(is_used ? splat : 0) * PAIRS;
        const float2 conic_ab = row[CONIC_A / 2], conic_c_opacity = row[CONIC_C / 2];
        conics[k] = {conic_ab.x, conic_ab.y, conic_c_opacity.x, conic_c_opacity.y};
    }
#pragma unroll
    for (int k = 0; k < FINISH_ITEMS; ++k) {
        const float2* its_sums = sums + static_cast<long long>(firsts[k]) * PAIRS + pair;
        const int number = lasts[k] - firsts[k];
        one[k] = number > 0 ? its_sums[0] : make_float2(0.0f, 0.0f);
        two[k] = number > 1 && number <= FEW_TILES ? its_sums[PAIRS] : make_float2(0.0f, 0.0f);
    }
#pragma unroll
    for (int k = 0; k < FINISH_ITEMS; ++k) {
        const bool has_parts = lasts[k] - firsts[k] > FEW_TILES;
        float2 total = make_float2(one[k].x + two[k].x, one[k].y + two[k].y);
        const int step = has_parts ? PART : 1;
        for (int instance = firsts[k] + (has_parts ? PART : 2); instance < lasts[k]; instance += step) {
            const float2 more = sums[static_cast<long long>(instance) * PAIRS + pair];
            total.x += more.x;
            total.y += more.y;
        }
        shared[k][threadIdx.x] = total;
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < FINISH_ITEMS; ++k) {
        const int splat = first_splat + k * SPLATS_OF_WARP;
        const bool is_reached = lasts[k] > firsts[k];
        if (splat >= num_splats || is_idle || (!is_reached && overwrites == 0)) continue;
        const long long place = static_cast<long long>(splat) * PAIRS + pair;
        float2 gradient = make_float2(0.0f, 0.0f);
        if (is_reached) gradient = gradient_of_row(conics[k], shared[k] + threadIdx.x - pair, pair);
        if (overwrites == 0) {
            const float2 before = d_rows[place];
            gradient.x += before.x;
            gradient.y += before.y;
        }
        d_rows[place] = gradient;
    }
}
