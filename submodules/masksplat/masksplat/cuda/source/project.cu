// SPDX-License-Identifier: Apache-2.0
// Activations, EWA projection, visibility, exact pixel boxes, spherical harmonics and compaction in one pass over the
// table. The contract and the maths: masksplat/cpu/project.py and docs/conventions.md.
//
// A thread has one Gaussian and goes through the views, so that the table is read from memory once, then takes the next.
// A block's splats of a view lie side by side; which block comes first is left to chance (one atomic addition a block and
// view).
//
// What takes time is waiting for memory, so little is waited for in turn: 1 the mean decides who may be seen, 2 whatever
// else the projection of these needs is asked for at once, the coefficients in bulk, and the mean of the next Gaussian,
// 3 colours, while the block's rows are reserved, 4 rows leave through the shared memory that the coefficients had.
#include "geometry.cuh"
#include "harmonics.cuh"
#include "staging.cuh"

constexpr int BLOCK = 128, WARPS = BLOCK / WARP;
constexpr int SLOT_PACKED = 0;             // stands for any row
constexpr float MARGIN_T = 0.01f;          // on 2 ln(255 opacity): far more than the rounding of alpha and of the bounds
constexpr float MARGIN_PIXELS = 0.01f;
constexpr float TWO_LN_2 = 1.3862943611198906f;
constexpr float ROUNDING_PIXELS = 3.0f;    // slack of the cheap bound: rounded radius, pixel centres, float

struct Limits {
    float near_plane, far_plane, eps2d;
    bool is_final, is_antialiased;
};

struct Table {
    const float *means, *quats, *scales, *opacities;
};

// What a Gaussian that may be seen has besides its mean.
struct Shape {
    Vector scale, sh0;
    float4 quaternion;
    float opacity;
};

// All of a splat but its colour and mask.
struct Splat {
    float mean_x, mean_y, conic_a, conic_b, conic_c, opacity, depth;
    int4 box;
};

// A Gaussian in a view, as its mean alone tells: x/z, y/z and z by the camera, and the 2D mean in pixels.
struct Approach {
    Vector mean;                           // in the world
    float ratio_x, ratio_y, inverse_z, depth, mean_x, mean_y;
};

// Where a Gaussian is; false when that is not between the planes.
__device__ __forceinline__ bool approach(Vector mean, const Camera& camera, const Limits& limits, Approach& seen) {
    const Twofold z = camera_coordinate(camera, 2, mean);
    seen.mean = mean;
    seen.depth = z.high;
    seen.inverse_z = reciprocal(z.high);
    const Twofold ratio_x = quotient(camera_coordinate(camera, 0, mean), z, seen.inverse_z);
    const Twofold ratio_y = quotient(camera_coordinate(camera, 1, mean), z, seen.inverse_z);
    seen.ratio_x = ratio_x.high;
    seen.ratio_y = ratio_y.high;
    seen.mean_x = pixel_coordinate(ratio_x, camera.fx, camera.cx);
    seen.mean_y = pixel_coordinate(ratio_y, camera.fy, camera.cy);
    return seen.depth > limits.near_plane && seen.depth < limits.far_plane;
}

// Loads that the compiler leaves where they stand: it would put some behind the first use of others, and wait twice.
__device__ __forceinline__ float load_now(const float* from) {
#ifndef EMULATED
    float value;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(value) : "l"(from));
    return value;
#else
    return *from;
#endif
}

__device__ __forceinline__ Vector load_vector_now(const float* values, int row) {
    const float* from = values + 3ll * row;
    return {load_now(from), load_now(from + 1), load_now(from + 2)};
}

__device__ __forceinline__ float4 load_word_now(const float* from) {
#ifndef EMULATED
    float4 value;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "l"(from));
    return value;
#else
    return *reinterpret_cast<const float4*>(from);
#endif
}

__device__ __forceinline__ Shape load_shape(const Table& table, const float* sh0, int i) {
    return {load_vector_now(table.scales, i), load_vector_now(sh0, i), load_word_now(table.quats + 4ll * i),
            load_now(table.opacities + i)};
}

// False when the Gaussian is certainly unseen by the rule of 3DGS; the scale is only looked at beside the image. The 2D
// covariance is at most (largest scale * |J|)^2 + eps2d, and |J|^2 <= (fx^2 (1 + u^2) + fy^2 (1 + v^2)) / z^2.
__device__ __forceinline__ bool may_be_seen(const Table& table, int i, const Camera& camera, const Limits& limits,
                                            const Approach& seen) {
    const float beyond_x = fmaxf(-seen.mean_x, seen.mean_x - camera.width - TILE);
    const float beyond_y = fmaxf(-seen.mean_y, seen.mean_y - camera.height - TILE);
    const float outside = fmaxf(beyond_x, beyond_y) - ROUNDING_PIXELS;
    if (outside <= 0.0f) return true;
    const Vector scale = load_vector(table.scales, i);
    const float largest = fmaxf(scale.x, fmaxf(scale.y, scale.z));
    const float spread = (limits.is_final ? largest : expf(fminf(largest, EXP_LIMIT))) * seen.inverse_z;
    const float u = fmaxf(-camera.x_low, camera.x_high), v = fmaxf(-camera.y_low, camera.y_high);
    const float jacobian = camera.fx * camera.fx * (1.0f + u * u) + camera.fy * camera.fy * (1.0f + v * v);
    // lambda_max <= trace + 1/3, where 1/3 is the square root of 3DGS's 0.1 rounded up.
    return outside * outside <= 9.0f * (spread * spread * jacobian + 2.0f * limits.eps2d + 0.34f);
}

// True when [mean - radius, mean + radius] touches one of `num_tiles` tiles by 3DGS's rounding: truncation towards zero,
// then clamping; pixel centres at integers, hence the half pixel. Comparisons of floats cannot overflow.
__device__ __forceinline__ bool spans_tiles(float mean, float radius, float num_tiles) {
    const float centre = mean - 0.5f;
    const float first = fmaxf(0.0f, (centre - radius) / TILE);
    const float last = (centre + radius + (TILE - 1)) / TILE;
    return last >= 1.0f && first < num_tiles && floorf(first) < floorf(fminf(last, num_tiles));
}

// 3DGS's visibility: the square of half size ceil(3 sqrt(lambda_max)) overlaps a tile of the image. The discriminant
// middle^2 - det is taken as ((xx - yy) / 2)^2 + xy^2, which does not cancel.
__device__ __forceinline__ bool touches_tiles_by_3dgs(const Camera& camera, float mean_x, float mean_y, float xx,
                                                      float xy, float yy) {
    const float difference = 0.5f * (xx - yy);
    const float spread = root_approximate(fmaxf(0.1f, difference * difference + xy * xy));
    const float radius = ceilf(3.0f * root_approximate(0.5f * (xx + yy) + spread));
    return spans_tiles(mean_x, radius, ceilf(camera.width / TILE)) &&
           spans_tiles(mean_y, radius, ceilf(camera.height / TILE));
}

// Half-open range of pixels whose centres are within `reach` of `mean`, clipped; clamped before the cast, since huge
// splats overflow int.
__device__ __forceinline__ int2 pixel_range(float mean, float reach, float size) {
    const float first = ceilf(fminf(fmaxf(0.0f, mean - reach - 0.5f), size));
    const float last = floorf(fmaxf(fminf(size - 1.0f, mean + reach - 0.5f), -1.0f)) + 1.0f;
    return make_int2(static_cast<int>(first), static_cast<int>(last));
}

// Bounding box of the ellipse alpha >= 1/255. In float: MARGIN_T widens the reach by at least 4e-4 of itself, a thousand
// times the rounding of the logarithm and the root; MARGIN_PIXELS covers the rounding of pixel coordinates up to 65536.
__device__ __forceinline__ bool write_box(const Camera& camera, float xx, float yy, Splat& splat) {
    const float t = TWO_LN_2 * log2_approximate(255.0f * splat.opacity) + MARGIN_T;
    const int2 x = pixel_range(splat.mean_x, root_approximate(t * xx) + MARGIN_PIXELS, camera.width);
    const int2 y = pixel_range(splat.mean_y, root_approximate(t * yy) + MARGIN_PIXELS, camera.height);
    splat.box = make_int4(x.x, y.x, x.y, y.y);
    return x.x < x.y && y.x < y.y;
}

// What becomes in a view of a Gaussian, which may be seen: SLOT_PACKED with everything in `splat`, or why not.
__device__ __forceinline__ int project_one(const Shape& shape, const Camera& camera, const Limits& limits,
                                           const Approach& seen, Splat& splat) {
    splat.mean_x = seen.mean_x;
    splat.mean_y = seen.mean_y;
    splat.depth = seen.depth;
    const Half m = image_turn(camera, jacobian(camera, seen.ratio_x, seen.ratio_y, seen.inverse_z));
    const Half half =
        half_projection(m, unit_quaternion(shape.quaternion), activated_scale(shape.scale, limits.is_final));
    const Covariance cov = covariance(half, limits.eps2d);
    const float xx = cov.xx + limits.eps2d, yy = cov.yy + limits.eps2d;
    if (!(cov.det > 0.0f) || !touches_tiles_by_3dgs(camera, splat.mean_x, splat.mean_y, xx, cov.xy, yy)) {
        return SLOT_UNSEEN;
    }
    splat.opacity = activated_opacity(shape.opacity, limits.is_final);
    if (limits.is_antialiased) splat.opacity *= sqrtf(cov.det_before / cov.det);
    if (!(splat.opacity >= ALPHA_MIN) || !write_box(camera, xx, yy, splat)) return SLOT_NO_PIXEL;
    const float inverse = reciprocal_approximate(cov.det);  // 0 for infinity
    splat.conic_a = yy * inverse;
    splat.conic_b = -cov.xy * inverse;
    splat.conic_c = xx * inverse;
    return SLOT_PACKED;
}

template <int DEGREE>
__device__ __forceinline__ Vector colour_of(const Camera& camera, Vector mean, Vector sh0, const float* coefficients) {
    if constexpr (DEGREE == NO_HARMONICS) {
        return sh0;
    } else {
        float inverse;
        const Basis<DEGREE> basis = basis_at<DEGREE>(view_direction(camera, mean, inverse));
        const Vector sum = harmonics_sum<DEGREE>(basis, sh0, coefficients);
        // Added by itself: contracted with the only product of degree 0, it would round otherwise than higher degrees
        // whose coefficients are 0.
        return {fmaxf(__fadd_rn(sum.x, 0.5f), 0.0f), fmaxf(__fadd_rn(sum.y, 0.5f), 0.0f),
                fmaxf(__fadd_rn(sum.z, 0.5f), 0.0f)};
    }
}

// What the block shares while it packs one view.
struct alignas(16) Packing {
    unsigned packed[WARPS];               // threads whose Gaussian is packed, a bit each
    Arrivals arrivals;
    int base;                             // first row of the block within the view
};

__device__ __forceinline__ void write_row(float* row, const Splat& splat, Vector colour, float mask) {
    float2* to = reinterpret_cast<float2*>(row);
    to[0] = make_float2(splat.mean_x, splat.mean_y);
    to[1] = make_float2(splat.conic_a, splat.conic_b);
    to[2] = make_float2(splat.conic_c, splat.opacity);
    to[3] = make_float2(colour.x, colour.y);
    to[4] = make_float2(colour.z, mask);
}

// Lanes before this one, a bit each.
__device__ __forceinline__ unsigned lanes_before() { return (1u << (threadIdx.x % WARP)) - 1; }

// Place of this thread's splat among those of the block, whose number is returned.
__device__ __forceinline__ int place_in_block(const Packing& packing, int& place) {
    const uint4 ballots = *reinterpret_cast<const uint4*>(packing.packed);
    const int warp = threadIdx.x / WARP, one = __popc(ballots.x), two = one + __popc(ballots.y);
    const int three = two + __popc(ballots.z);
    place = warp == 0 ? 0 : warp == 1 ? one : warp == 2 ? two : three;
    place += __popc(packing.packed[warp] & lanes_before());
    return three + __popc(ballots.w);
}

// Arguments in order. The table: means (N, 3), quats (N, 4), scales (N, 3), opacities (N), sh0 (N, 3), shN (N, stride);
// masks (N) or null for 1, ids (N) or null for the row number. The views: cameras (B), N, B, stride, near, far, eps2d,
// is_final, is_antialiased. The splats, capacity N a view: rows, depths, ids, gaussians, boxes, slots (B, N), and
// counts (B), which must be 0.
template <int DEGREE>
__device__ __forceinline__ void project(
    const Table& table, const float* __restrict__ sh0, const float* __restrict__ shN, const float* __restrict__ masks,
    const long long* __restrict__ ids, const Camera* __restrict__ cameras, int num_gaussians, int num_views, int stride,
    const Limits& limits, float* __restrict__ rows, float* __restrict__ depths, long long* __restrict__ row_ids,
    int* __restrict__ gaussians, int4* __restrict__ boxes, int* __restrict__ slots, int* __restrict__ counts) {
    constexpr int USED = 3 * higher_bases(DEGREE);
    extern __shared__ float4 staged_words[];  // coefficients, then rows
    __shared__ Packing packing;
    float* staged = reinterpret_cast<float*>(staged_words);
    const int local = threadIdx.x, warp = local / WARP;
    if constexpr (USED > 0) begin_arrivals(packing.arrivals, WARPS);
    Vector next_mean = {};
    if (blockIdx.x * BLOCK + local < num_gaussians) next_mean = load_vector(table.means, blockIdx.x * BLOCK + local);
    unsigned step = 0;
    for (int first = blockIdx.x * BLOCK; first < num_gaussians; first += gridDim.x * BLOCK) {
        const int num_rows = min(BLOCK, num_gaussians - first), i = first + local, next = i + gridDim.x * BLOCK;
        const Vector mean = next_mean;
        for (int view = 0; view < num_views; ++view, ++step) {
            if (step > 0) {  // the ballots, and the rows where coefficients go, are written again
                if constexpr (USED > 0) order_before_copies();
                __syncthreads();
            }
            const Camera& camera = *static_cast<const Camera*>(__builtin_assume_aligned(cameras + view, 16));
            const long long view_start = static_cast<long long>(view) * num_gaussians;
            Approach seen;
            const bool is_candidate = local < num_rows && approach(mean, camera, limits, seen) &&
                                      may_be_seen(table, i, camera, limits, seen);
            Shape shape = {};
            if (is_candidate) shape = load_shape(table, sh0, i);
            if (view == 0 && next < num_gaussians) next_mean = load_vector_now(table.means, next);
            if constexpr (USED > 0) {
                bring_rows(shN, first + warp * WARP, min(WARP, num_rows - warp * WARP), stride, USED,
                           __ballot_sync(ALL_LANES, is_candidate), staged + warp * WARP * stride, packing.arrivals);
            }
            int slot = SLOT_UNSEEN;
            Splat splat;
            float mask = 1.0f;
            long long id = i;
            if (is_candidate) {
                if (masks != nullptr) mask = masks[i];
                if (ids != nullptr) id = ids[i];
                slot = project_one(shape, camera, limits, seen, splat);
            }
            const bool is_packed = slot == SLOT_PACKED;
            const unsigned ballot = __ballot_sync(ALL_LANES, is_packed);
            if (local % WARP == 0) packing.packed[warp] = ballot;
            if constexpr (USED > 0) wait_for_copies();
            __syncthreads();
            int place;
            const int num_packed = place_in_block(packing, place);
            // On its way while colours are computed.
            const int reserved = local == 0 && num_packed > 0 ? atomicAdd(counts + view, num_packed) : 0;
            if constexpr (USED > 0) await_rows(packing.arrivals, step & 1);
            Vector colour = {};
            if (is_packed) colour = colour_of<DEGREE>(camera, mean, shape.sh0, staged + local * stride);
            if (local == 0) packing.base = reserved;
            __syncthreads();
            const long long target = view_start + packing.base + place;
            if (is_packed) {
                write_row(staged + place * NUM_ROW_COLUMNS, splat, colour, mask);
                depths[target] = splat.depth;
                row_ids[target] = id;
                gaussians[target] = i;
                boxes[target] = splat.box;
                slot = static_cast<int>(target);
            }
            if (local < num_rows) slots[view_start + i] = slot;
            __syncthreads();
            float2* to = reinterpret_cast<float2*>(rows + (view_start + packing.base) * NUM_ROW_COLUMNS);
            const float2* from = reinterpret_cast<const float2*>(staged);
            for (int k = local; k < num_packed * (NUM_ROW_COLUMNS / 2); k += BLOCK) to[k] = from[k];
        }
    }
}

#define PROJECT_KERNEL(NAME, DEGREE)                                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, 8)                                                            \
        NAME(const float* __restrict__ means, const float* __restrict__ quats, const float* __restrict__ scales,      \
             const float* __restrict__ opacities, const float* __restrict__ sh0, const float* __restrict__ shN,       \
             const float* __restrict__ masks, const long long* __restrict__ ids,                                      \
             const float* __restrict__ cameras, int num_gaussians, int num_views, int stride, float near_plane,       \
             float far_plane, float eps2d, int is_final, int is_antialiased, float* __restrict__ rows,                \
             float* __restrict__ depths, long long* __restrict__ row_ids, int* __restrict__ gaussians,                \
             int4* __restrict__ boxes, int* __restrict__ slots, int* __restrict__ counts) {                           \
        const Table table = {means, quats, scales, opacities};                                                        \
        const Limits limits = {near_plane, far_plane, eps2d, is_final != 0, is_antialiased != 0};                     \
        const Camera* views = reinterpret_cast<const Camera*>(cameras);                                               \
        project<DEGREE>(table, sh0, shN, masks, ids, views, num_gaussians, num_views, stride, limits, rows,           \
                        depths, row_ids, gaussians, boxes, slots, counts);                                            \
    }

PROJECT_KERNEL(project_colours, NO_HARMONICS)
PROJECT_KERNEL(project_degree_0, 0)
PROJECT_KERNEL(project_degree_1, 1)
PROJECT_KERNEL(project_degree_2, 2)
PROJECT_KERNEL(project_degree_3, 3)

// cameras[first + k] from world-to-camera matrices (B, 4, 4) and intrinsics (B, 3, 3), for k < num_views views of
// width x height pixels, in double; and their counts of splats to 0.
extern "C" __global__ void pack_cameras(const float* viewmats, const float* intrinsics, int first, int num_views,
                                        int width, int height, float* cameras, int* counts) {
    const int k = blockIdx.x * blockDim.x + threadIdx.x;
    if (k >= num_views) return;
    const float *matrix = viewmats + 16 * (first + k), *pinhole = intrinsics + 9 * (first + k);
    Camera& camera = reinterpret_cast<Camera*>(cameras)[first + k];
    for (int row = 0; row < 3; ++row) {
        for (int column = 0; column < 3; ++column) camera.turn[3 * row + column] = matrix[4 * row + column];
        camera.shift[row] = matrix[4 * row + 3];
        double centre = 0.0;
        for (int j = 0; j < 3; ++j) centre -= static_cast<double>(matrix[4 * j + row]) * matrix[4 * j + 3];
        camera.centre[row] = static_cast<float>(centre);
    }
    const double fx = pinhole[0], fy = pinhole[4], cx = pinhole[2], cy = pinhole[5];
    const double margin_x = 0.15 * width / fx, margin_y = 0.15 * height / fy;
    camera.fx = pinhole[0];
    camera.fy = pinhole[4];
    camera.cx = pinhole[2];
    camera.cy = pinhole[5];
    camera.x_low = static_cast<float>(-cx / fx - margin_x);
    camera.x_high = static_cast<float>((width - cx) / fx + margin_x);
    camera.y_low = static_cast<float>(-cy / fy - margin_y);
    camera.y_high = static_cast<float>((height - cy) / fy + margin_y);
    camera.width = static_cast<float>(width);
    camera.height = static_cast<float>(height);
    for (float& nothing : camera.unused) nothing = 0.0f;
    counts[first + k] = 0;
}
