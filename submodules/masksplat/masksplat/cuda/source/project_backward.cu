// SPDX-License-Identifier: Apache-2.0
// From ten values per splat to the gradients of the parameters, summed over the views, and on to Adam and the densify
// statistics in the same pass: no gradient array is ever made. The maths: projection_gradient.cuh.
//
// Stages of a block of 64 Gaussians: 1) gather the gradients of their splats: statistics, masks, and who has any
// gradient at all (a splat behind the end of every pixel has none); 2) stage the coefficients of those; 3) one thread a
// Gaussian: gradients into shared memory; 4) all threads, 16 bytes at a time: Adam over the block's part of each
// attribute, which is contiguous. A block without any gradient goes from 1 to 4.
#include "adam.cuh"
#include "projection_gradient.cuh"
#include "staging.cuh"

constexpr int BLOCK = 64;
constexpr int SMALL = 14;  // floats of a Gaussian without shN: means, quats, scales, opacity, sh0
constexpr int AT_MEANS = 0, AT_QUATS = 3 * BLOCK, AT_SCALES = 7 * BLOCK, AT_OPACITIES = 10 * BLOCK;
constexpr int AT_SH0 = 11 * BLOCK;  // where each attribute's gradients begin in shared memory
constexpr int SMALL_ATTRIBUTES = 5;
constexpr int WORDS_AT_ONCE = 4;    // of 16 bytes, that a thread loads before it stores
constexpr int SMALL_AT_ONCE = 3;    // attributes, a word of each likewise

// The attributes and their moments, or, where no update is made, the arrays that their gradients go to.
struct Attribute {
    float *param, *first, *second;
};

struct Attributes {
    Attribute means, quats, scales, opacities, sh0, shN;
};

__device__ __forceinline__ void store_small(float* small, int local, const Gradients& sums) {
    float* mean = small + AT_MEANS + 3 * local;
    mean[0] = sums.mean.x;
    mean[1] = sums.mean.y;
    mean[2] = sums.mean.z;
    reinterpret_cast<float4*>(small + AT_QUATS)[local] = sums.quat;
    float* scale = small + AT_SCALES + 3 * local;
    scale[0] = sums.scale.x;
    scale[1] = sums.scale.y;
    scale[2] = sums.scale.z;
    small[AT_OPACITIES + local] = sums.opacity;
    float* sh0 = small + AT_SH0 + 3 * local;
    sh0[0] = sums.sh0.x;
    sh0[1] = sums.sh0.y;
    sh0[2] = sums.sh0.z;
}

// A word of 16 bytes of an attribute and its moments.
struct AdamWord {
    float4 param, first, second;

    __device__ __forceinline__ void keep_x(const AdamWord& before) {
        param.x = before.param.x, first.x = before.first.x, second.x = before.second.x;
    }
    __device__ __forceinline__ void keep_y(const AdamWord& before) {
        param.y = before.param.y, first.y = before.first.y, second.y = before.second.y;
    }
    __device__ __forceinline__ void keep_z(const AdamWord& before) {
        param.z = before.param.z, first.z = before.first.z, second.z = before.second.z;
    }
    __device__ __forceinline__ void keep_w(const AdamWord& before) {
        param.w = before.param.w, first.w = before.first.w, second.w = before.second.w;
    }
};

template <bool UPDATES>
__device__ __forceinline__ void load_word(const Attribute& attribute, long long word, AdamWord& loaded) {
    if (!UPDATES) return;
    loaded.param = reinterpret_cast<const float4*>(attribute.param)[word];
    loaded.first = reinterpret_cast<const float4*>(attribute.first)[word];
    loaded.second = reinterpret_cast<const float4*>(attribute.second)[word];
}

// Adam, or where UPDATES is false the gradient itself, into the word.
template <bool UPDATES>
__device__ __forceinline__ void finish_word(const Attribute& attribute, long long word, AdamWord& loaded,
                                            float4 gradient, const AdamFactors& factors) {
    if (!UPDATES) {
        reinterpret_cast<float4*>(attribute.param)[word] = gradient;
        return;
    }
    adam_word(loaded.param, loaded.first, loaded.second, gradient, factors);
    reinterpret_cast<float4*>(attribute.param)[word] = loaded.param;
    reinterpret_cast<float4*>(attribute.first)[word] = loaded.first;
    reinterpret_cast<float4*>(attribute.second)[word] = loaded.second;
}

// The floats of [start, start + count) behind the last whole word.
template <bool UPDATES>
__device__ __forceinline__ void finish_rest(const Attribute& attribute, long long start, int count,
                                            const float* gradients, const AdamFactors& factors) {
#pragma unroll 1  // the last rows of all at most
    for (int k = count / 4 * 4 + threadIdx.x; k < count; k += BLOCK) {
        const float gradient = gradients == nullptr ? 0.0f : gradients[k];
        if (UPDATES) {
            adam_value(attribute.param[start + k], attribute.first[start + k], attribute.second[start + k], gradient,
                       factors);
        } else {
            attribute.param[start + k] = gradient;
        }
    }
}

__device__ __forceinline__ float4 gradient_word(const float* gradients, int word) {
    return gradients == nullptr ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : reinterpret_cast<const float4*>(gradients)[word];
}

template <bool UPDATES>
__device__ __forceinline__ AdamFactors load_factors(const float* __restrict__ packed) {
    return UPDATES ? *reinterpret_cast<const AdamFactors*>(packed) : AdamFactors{};
}

// Stage 4 for `count` floats from `start` on (a multiple of 4), with their gradients in shared memory, or with none
// (null). All threads of the block.
template <bool UPDATES>
__device__ __forceinline__ void finish_span(const Attribute& attribute, long long start, int count,
                                            const float* gradients, const float* __restrict__ packed_factors) {
    const AdamFactors factors = load_factors<UPDATES>(packed_factors);
    const int num_words = count / 4;
    for (int base = threadIdx.x; base < num_words; base += WORDS_AT_ONCE * BLOCK) {
        AdamWord loaded[WORDS_AT_ONCE];
#pragma unroll
        for (int k = 0; k < WORDS_AT_ONCE; ++k) {
            const int word = base + k * BLOCK;
            if (word < num_words) load_word<UPDATES>(attribute, start / 4 + word, loaded[k]);
        }
#pragma unroll
        for (int k = 0; k < WORDS_AT_ONCE; ++k) {
            const int word = base + k * BLOCK;
            if (word >= num_words) break;
            finish_word<UPDATES>(attribute, start / 4 + word, loaded[k], gradient_word(gradients, word), factors);
        }
    }
    finish_rest<UPDATES>(attribute, start, count, gradients, factors);
}

// Whether a row of the block has gradients, by the warps' ballots.
__device__ __forceinline__ bool is_row_active(const unsigned* ballots, int row) {
    return (ballots[row / WARP] >> (row % WARP) & 1u) != 0;
}

// Stage 4 for the rows with gradients alone, of `num_rows` rows of `stride` floats: the others stay behind
// (masksplat/lazy.py). A word may lie on two rows. All threads of the block.
__device__ __forceinline__ void finish_active(const Attribute& attribute, long long start, int num_rows, int stride,
                                              const unsigned* ballots, const float* gradients,
                                              const float* __restrict__ packed_factors) {
    const AdamFactors factors = load_factors<true>(packed_factors);
    const int count = num_rows * stride, num_words = count / 4;
    for (int base = threadIdx.x; base < num_words; base += WORDS_AT_ONCE * BLOCK) {
        AdamWord loaded[WORDS_AT_ONCE];
        bool has_first[WORDS_AT_ONCE], has_last[WORDS_AT_ONCE];  // whether the rows of its ends are active
#pragma unroll
        for (int k = 0; k < WORDS_AT_ONCE; ++k) {
            const int word = base + k * BLOCK;
            has_first[k] = word < num_words && is_row_active(ballots, 4 * word / stride);
            has_last[k] = word < num_words && is_row_active(ballots, (4 * word + 3) / stride);
            if (has_first[k] || has_last[k]) load_word<true>(attribute, start / 4 + word, loaded[k]);
        }
#pragma unroll
        for (int k = 0; k < WORDS_AT_ONCE; ++k) {
            if (!has_first[k] && !has_last[k]) continue;
            const int word = base + k * BLOCK;
            const AdamWord before = loaded[k];
            AdamWord& after = loaded[k];
            adam_word(after.param, after.first, after.second, gradient_word(gradients, word), factors);
            const int own = stride - 4 * word % stride;  // floats until the next row
            if (!(own > 1 ? has_first[k] : has_last[k])) after.keep_y(before);
            if (!(own > 2 ? has_first[k] : has_last[k])) after.keep_z(before);
            if (!has_first[k]) after.keep_x(before);
            if (!has_last[k]) after.keep_w(before);
            reinterpret_cast<float4*>(attribute.param)[start / 4 + word] = after.param;
            reinterpret_cast<float4*>(attribute.first)[start / 4 + word] = after.first;
            reinterpret_cast<float4*>(attribute.second)[start / 4 + word] = after.second;
        }
    }
#pragma unroll 1  // the last rows of all at most
    for (int k = 4 * num_words + threadIdx.x; k < count; k += BLOCK) {
        if (!is_row_active(ballots, k / stride)) continue;
        adam_value(attribute.param[start + k], attribute.first[start + k], attribute.second[start + k], gradients[k],
                   factors);
    }
}

// Floats of a row of the `which`-th attribute but shN, and where its gradients begin in shared memory.
__device__ __forceinline__ constexpr int small_width(int which) { return which == 1 ? 4 : which == 3 ? 1 : 3; }

__device__ __forceinline__ constexpr int small_start(int which) {
    return which == 0 ? AT_MEANS : which == 1 ? AT_QUATS : which == 2 ? AT_SCALES : which == 3 ? AT_OPACITIES : AT_SH0;
}

// Stage 4 for the attributes but shN of the rows from `first` on: a thread has at most a word of each, and loads the
// words of SMALL_AT_ONCE before it waits for any.
template <bool UPDATES>
__device__ __forceinline__ void finish_small(const Attribute (&attributes)[SMALL_ATTRIBUTES], long long first,
                                             int num_rows, const float* gradients,
                                             const float* __restrict__ packed_factors) {
    static_assert(4 * BLOCK / 4 <= BLOCK, "a thread a word");
#pragma unroll
    for (int base = 0; base < SMALL_ATTRIBUTES; base += SMALL_AT_ONCE) {
        AdamWord loaded[SMALL_AT_ONCE];
#pragma unroll
        for (int k = 0; k < SMALL_AT_ONCE && base + k < SMALL_ATTRIBUTES; ++k) {
            const int width = small_width(base + k);
            if (threadIdx.x < width * num_rows / 4) {
                load_word<UPDATES>(attributes[base + k], width * first / 4 + threadIdx.x, loaded[k]);
            }
        }
#pragma unroll
        for (int k = 0; k < SMALL_AT_ONCE && base + k < SMALL_ATTRIBUTES; ++k) {
            const int which = base + k, width = small_width(which);
            const float* given = gradients == nullptr ? nullptr : gradients + small_start(which);
            const AdamFactors factors = load_factors<UPDATES>(packed_factors + which * ADAM_FACTORS);
            if (threadIdx.x < width * num_rows / 4) {
                finish_word<UPDATES>(attributes[which], width * first / 4 + threadIdx.x, loaded[k],
                                     gradient_word(given, threadIdx.x), factors);
            }
            finish_rest<UPDATES>(attributes[which], width * first, width * num_rows, given, factors);
        }
    }
}

// Sum of the mask's gradient over the views, the densify statistics (norm of the 2D mean's gradient in NDC units, and
// the number of views), and whether any parameter has a gradient.
struct Gathered {
    float d_mask, norm_sum;
    int num_views;
    bool is_active;
};

__device__ __forceinline__ Gathered gather(const float* __restrict__ d_rows, const int* __restrict__ slots,
                                           const Camera* __restrict__ cameras, long long i, int num_gaussians,
                                           int num_views, float norm_sum) {
    Gathered found = {0.0f, norm_sum, 0, false};
    for (int view = 0; view < num_views; ++view) {
        const int slot = slots[static_cast<long long>(view) * num_gaussians + i];
        if (slot == SLOT_UNSEEN) continue;
        ++found.num_views;
        if (slot < 0) continue;
        const RowGradient row = load_row(d_rows, slot);
        found.d_mask += row.mask;
        found.is_active = found.is_active || reaches_parameters(row);
        const float x = row.mean_x * 0.5f * cameras[view].width, y = row.mean_y * 0.5f * cameras[view].height;
        found.norm_sum += sqrtf(x * x + y * y);
    }
    return found;
}

// Gradients of one Gaussian over all views: the small ones returned, those of the coefficients in shared memory.
template <int DEGREE>
__device__ __forceinline__ Gradients sum_views(const Attributes& table, const Camera* __restrict__ cameras,
                                               const Settings& settings, const int* __restrict__ slots,
                                               const float* __restrict__ d_rows, long long i, int num_gaussians,
                                               int num_views, const float* coefficients, float* d_coefficients) {
    Gradients sums = {};
    const Vector mean = load_vector(table.means.param, i), sh0 = load_vector(table.sh0.param, i);
    const float4 quat = reinterpret_cast<const float4*>(table.quats.param)[i];
    const Vector scale = load_vector(table.scales.param, i);
    const float opacity = table.opacities.param[i];
    for (int view = 0; view < num_views; ++view) {
        const int slot = slots[static_cast<long long>(view) * num_gaussians + i];
        if (slot < 0) continue;
        const RowGradient row = load_row(d_rows, slot);
        if (!reaches_parameters(row)) continue;
        const Camera& camera = cameras[view];
        colour_backward<DEGREE>(camera, mean, sh0, row.colour, coefficients, d_coefficients, num_views > 1, sums);
        geometry_backward(camera, settings, mean, quat, scale, opacity, row, sums);
    }
    return sums;
}

// What both kinds of kernels are given.
struct Inputs {
    const Camera* cameras;
    const int* slots;     // (B, N)
    const float* d_rows;  // (M, 10)
    int num_gaussians, num_views, stride;
    Settings settings;
};

struct Statistics {
    float *norm_sum, *view_count;  // (N), null where no update is made
};

// What makes updates of shN lazy: the last update of each row (N), null where updates are dense; the factors of the last
// updates (LAZY_CAPACITY, ADAM_FACTORS), which get this one's; and its number.
struct Laziness {
    int* updates;
    float* ring;
    int update;
};

// Stages 1 to 4. `table` holds the parameters and, for an update, their moments; `outputs` is what stage 4 writes.
template <int DEGREE, bool UPDATES>
__device__ __forceinline__ void backward(const Attributes& table, const Attributes& outputs, const Inputs& inputs,
                                         const float* __restrict__ factors, const Statistics& statistics,
                                         const Laziness& lazy, float* __restrict__ d_masks) {
    constexpr int USED = 3 * higher_bases(DEGREE);
    extern __shared__ float4 shared_words[];
    const int local = threadIdx.x, stride = inputs.stride, num_views = inputs.num_views;
    const long long first = static_cast<long long>(blockIdx.x) * BLOCK, i = first + local;
    const int num_rows = static_cast<int>(min(static_cast<long long>(BLOCK), inputs.num_gaussians - first));
    float* small = reinterpret_cast<float*>(shared_words);
    float* coefficients = small + SMALL * BLOCK;
    float* d_coefficients = num_views > 1 ? coefficients + BLOCK * stride : coefficients;

    bool is_active = false;
    if (local < num_rows) {
        const Gathered found = gather(inputs.d_rows, inputs.slots, inputs.cameras, i, inputs.num_gaussians, num_views,
                                      UPDATES ? statistics.norm_sum[i] : 0.0f);
        is_active = found.is_active;
        d_masks[i] = UPDATES ? found.d_mask * reinterpret_cast<const AdamFactors*>(factors)->scale : found.d_mask;
        if (UPDATES && found.num_views > 0) {
            statistics.norm_sum[i] = found.norm_sum;
            statistics.view_count[i] += static_cast<float>(found.num_views);
        }
    }
    const unsigned ballot = __ballot_sync(ALL_LANES, is_active);
    __shared__ unsigned ballots[BLOCK / WARP];
    if (local % WARP == 0) ballots[local / WARP] = ballot;
    const bool has_gradients = __syncthreads_or(is_active) != 0;

    if (has_gradients) {
        const int warp_first = local / WARP * WARP;
        if constexpr (USED > 0) {
            if (ballot != 0) {
                stage_rows(table.shN.param + (first + warp_first) * stride, min(WARP, num_rows - warp_first), stride, USED,
                           ballot, coefficients + warp_first * stride);
            }
        }
        wait_for_copies();
        __syncwarp();
        Gradients sums = {};
        float* own = d_coefficients + local * stride;
        const bool is_written = is_active && num_views == 1;
        for (int k = is_written ? USED : 0; k < stride; ++k) own[k] = 0.0f;
        if (is_active) {
            sums = sum_views<DEGREE>(table, inputs.cameras, inputs.settings, inputs.slots, inputs.d_rows, i,
                                     inputs.num_gaussians, num_views, coefficients + local * stride, own);
        }
        store_small(small, local, sums);
        __syncthreads();
    }

    const float* given = has_gradients ? small : nullptr;
    finish_small<UPDATES>({outputs.means, outputs.quats, outputs.scales, outputs.opacities, outputs.sh0}, first, num_rows,
                          given, factors);
    if (!UPDATES || lazy.updates == nullptr) {
        finish_span<UPDATES>(outputs.shN, first * stride, num_rows * stride, given ? d_coefficients : nullptr,
                             factors + 5 * ADAM_FACTORS);
        return;
    }
    if (blockIdx.x == 0 && local < ADAM_FACTORS) {
        lazy.ring[lazy.update % LAZY_CAPACITY * ADAM_FACTORS + local] = factors[5 * ADAM_FACTORS + local];
    }
    if constexpr (USED > 0) {  // without harmonics nobody has brought the rows up to date, and they have no gradients
        if (!has_gradients) return;
        finish_active(outputs.shN, first * stride, num_rows, stride, ballots, d_coefficients, factors + 5 * ADAM_FACTORS);
        if (is_active) lazy.updates[i] = lazy.update;
    }
}

// In the names below, `w` is the first and `v` the second moment. factors: six AdamFactors, in the attributes' order.
#define UPDATE_KERNEL(NAME, DEGREE)                                                                                   \
    extern "C" __global__ void __launch_bounds__(BLOCK, 10)                                                               \
        NAME(float* means, float* quats, float* scales, float* opacities, float* sh0, float* shN, float* w_means,     \
             float* w_quats, float* w_scales, float* w_opacities, float* w_sh0, float* w_shN, float* v_means,         \
             float* v_quats, float* v_scales, float* v_opacities, float* v_sh0, float* v_shN, const float* factors,   \
             const float* cameras, const int* slots, const float* d_rows, int num_gaussians, int num_views,           \
             int stride, float eps2d, int is_final, int is_antialiased, float* norm_sum, float* view_count,           \
             float* d_masks, const int* status, int* updates, float* ring, int update) {                              \
        if (is_stopped(status)) return;                                                                               \
        const Attributes table = {{means, w_means, v_means},                                                          \
                                  {quats, w_quats, v_quats},                                                          \
                                  {scales, w_scales, v_scales},                                                       \
                                  {opacities, w_opacities, v_opacities},                                              \
                                  {sh0, w_sh0, v_sh0},                                                                \
                                  {shN, w_shN, v_shN}};                                                               \
        const Settings settings = {eps2d, is_final != 0, is_antialiased != 0};                                        \
        const Camera* views = reinterpret_cast<const Camera*>(cameras);                                               \
        const Inputs inputs = {views, slots, d_rows, num_gaussians, num_views, stride, settings};                     \
        backward<DEGREE, true>(table, table, inputs, factors,                                                         \
                                {norm_sum, view_count}, {updates, ring, update}, d_masks);                            \
    }

#define GRADIENTS_KERNEL(NAME, DEGREE)                                                                                \
    extern "C" __global__ void __launch_bounds__(BLOCK, 10)                                                               \
        NAME(float* means, float* quats, float* scales, float* opacities, float* sh0, float* shN, float* d_means,     \
             float* d_quats, float* d_scales, float* d_opacities, float* d_sh0, float* d_shN, const float* cameras,   \
             const int* slots, const float* d_rows, int num_gaussians, int num_views, int stride, float eps2d,        \
             int is_final, int is_antialiased, float* d_masks) {                                                      \
        const Attributes table = {{means}, {quats}, {scales}, {opacities}, {sh0}, {shN}};                             \
        const Attributes gradients = {{d_means}, {d_quats}, {d_scales}, {d_opacities}, {d_sh0}, {d_shN}};             \
        const Settings settings = {eps2d, is_final != 0, is_antialiased != 0};                                        \
        const Camera* views = reinterpret_cast<const Camera*>(cameras);                                               \
        const Inputs inputs = {views, slots, d_rows, num_gaussians, num_views, stride, settings};                     \
        backward<DEGREE, false>(table, gradients, inputs, nullptr,                                                    \
                                {nullptr, nullptr}, {nullptr, nullptr, 0}, d_masks);                                  \
    }

UPDATE_KERNEL(update_colours, NO_HARMONICS)
UPDATE_KERNEL(update_degree_0, 0)
UPDATE_KERNEL(update_degree_1, 1)
UPDATE_KERNEL(update_degree_2, 2)
UPDATE_KERNEL(update_degree_3, 3)
GRADIENTS_KERNEL(gradients_colours, NO_HARMONICS)
GRADIENTS_KERNEL(gradients_degree_0, 0)
GRADIENTS_KERNEL(gradients_degree_1, 1)
GRADIENTS_KERNEL(gradients_degree_2, 2)
GRADIENTS_KERNEL(gradients_degree_3, 3)
