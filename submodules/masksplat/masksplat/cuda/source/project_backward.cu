// SPDX-License-Identifier: Apache-2.0
// From ten values per splat to the gradients of the parameters, summed over the views, and on to Adam and the densify
// statistics in the same pass: no gradient array is ever made. Everything is recomputed from the parameters. The maths:
// masksplat/cpu/project_backward.py.
//
// Stages of a block of 64 Gaussians: 1) gather the gradients of their splats: statistics, masks, and who has any
// gradient at all (a splat behind the end of every pixel has none); 2) stage the coefficients of those; 3) one thread a
// Gaussian: gradients into shared memory; 4) all threads, 16 bytes at a time: Adam over the block's part of each
// attribute, which is contiguous. A block without any gradient goes from 1 to 4.
#include "adam.cuh"
#include "geometry.cuh"
#include "harmonics.cuh"
#include "staging.cuh"

constexpr int BLOCK = 64;
constexpr int SMALL = 14;  // floats of a Gaussian without shN: means, quats, scales, opacity, sh0
constexpr int AT_MEANS = 0, AT_QUATS = 3 * BLOCK, AT_SCALES = 7 * BLOCK, AT_OPACITIES = 10 * BLOCK;
constexpr int AT_SH0 = 11 * BLOCK;  // where each attribute's gradients begin in shared memory
constexpr int SMALL_ATTRIBUTES = 5;
constexpr int WORDS_AT_ONCE = 4;    // of 16 bytes, that a thread loads before it stores
constexpr int SMALL_AT_ONCE = 3;    // attributes, a word of each likewise

// A row of d_rows.
struct RowGradient {
    float mean_x, mean_y, conic_a, conic_b, conic_c, opacity;
    Vector colour;
    float mask;
};

struct Gradients {
    Vector mean;
    float4 quat;  // w, x, y, z
    Vector scale;
    float opacity;
    Vector sh0;
};

// The attributes and their moments, or, where no update is made, the arrays that their gradients go to.
struct Attribute {
    float *param, *first, *second;
};

struct Attributes {
    Attribute means, quats, scales, opacities, sh0, shN;
};

struct Settings {
    float eps2d;
    bool is_final, is_antialiased;
};

__device__ __forceinline__ RowGradient load_row(const float* __restrict__ d_rows, int slot) {
    const float2* row = reinterpret_cast<const float2*>(d_rows + static_cast<long long>(slot) * NUM_ROW_COLUMNS);
    const float2 a = row[0], b = row[1], c = row[2], d = row[3], e = row[4];
    return {a.x, a.y, b.x, b.y, c.x, c.y, {d.x, d.y, e.x}, e.y};
}

// True when anything but the mask has a gradient.
__device__ __forceinline__ bool reaches_parameters(const RowGradient& row) {
    return row.mean_x != 0.0f || row.mean_y != 0.0f || row.conic_a != 0.0f || row.conic_b != 0.0f ||
           row.conic_c != 0.0f || row.opacity != 0.0f || row.colour.x != 0.0f || row.colour.y != 0.0f ||
           row.colour.z != 0.0f;
}

__device__ __forceinline__ void add(Vector& sum, Vector value) {
    sum.x += value.x;
    sum.y += value.y;
    sum.z += value.z;
}

// Gradients of the coefficients: sh0's into `sums`, the higher ones into `d_coefficients`, added there when
// `accumulates`, else written, and then it may be the place of the coefficients themselves. The mean's gradient
// through the viewing direction goes into `sums`, too.
template <int DEGREE>
__device__ __forceinline__ void colour_backward(const Camera& camera, Vector mean, Vector sh0, Vector d_colour,
                                                const float* coefficients, float* d_coefficients, bool accumulates,
                                                Gradients& sums) {
    if constexpr (DEGREE == NO_HARMONICS) {
        add(sums.sh0, d_colour);
    } else {
        float inverse;
        const Vector direction = view_direction(camera, mean, inverse);
        const Basis<DEGREE> basis = basis_at<DEGREE>(direction);
        const Vector colour = harmonics_sum<DEGREE>(basis, sh0, coefficients);
        // Channels clamped at 0 have no gradient.
        const Vector d = {colour.x > -0.5f ? d_colour.x : 0.0f, colour.y > -0.5f ? d_colour.y : 0.0f,
                          colour.z > -0.5f ? d_colour.z : 0.0f};
        add(sums.sh0, {SH_C0 * d.x, SH_C0 * d.y, SH_C0 * d.z});
        if constexpr (DEGREE >= 1) {
            Basis<DEGREE> d_basis;
#pragma unroll
            for (int k = 0; k < higher_bases(DEGREE); ++k) {
                const float* c = coefficients + 3 * k;
                float* out = d_coefficients + 3 * k;
                const float value = basis.value[k];
                d_basis.value[k] = c[0] * d.x + c[1] * d.y + c[2] * d.z;
                out[0] = (accumulates ? out[0] : 0.0f) + value * d.x;
                out[1] = (accumulates ? out[1] : 0.0f) + value * d.y;
                out[2] = (accumulates ? out[2] : 0.0f) + value * d.z;
            }
            const Vector g = direction_gradient<DEGREE>(d_basis, direction);
            const float along = dot(g, direction);
            add(sums.mean, {(g.x - along * direction.x) * inverse, (g.y - along * direction.y) * inverse,
                            (g.z - along * direction.z) * inverse});
        }
    }
}

// dL/d(xx, xy, yy) from dL/dconic: -K G K with K the conic and G the symmetric gradient.
__device__ __forceinline__ Vector covariance_backward(const Covariance& cov, float eps2d, const RowGradient& row) {
    const float inverse = 1.0f / cov.det;
    const float a = (cov.yy + eps2d) * inverse, b = -cov.xy * inverse, c = (cov.xx + eps2d) * inverse;
    const float g0 = row.conic_a, g1 = 0.5f * row.conic_b, g2 = row.conic_c;
    const float r0 = a * g0 + b * g1, r1 = a * g1 + b * g2;
    const float s0 = b * g0 + c * g1, s1 = b * g1 + c * g2;
    return {-(r0 * a + r1 * b), -2.0f * (r0 * b + r1 * c), -(s0 * b + s1 * c)};
}

// Through opacity * sqrt(det(cov) / det(cov + eps2d I)): adds to dL/dcov, returns dL/dopacity. 0 where the first
// determinant vanishes.
__device__ __forceinline__ float antialias_backward(const Covariance& cov, float eps2d, float opacity, float d_opacity,
                                                    Vector& d_cov) {
    const float factor = sqrtf(cov.det_before / cov.det);
    const float shared = d_opacity * opacity * factor;
    const float half_before = cov.det_before > 0.0f ? shared / (2.0f * cov.det_before) : 0.0f;
    const float half_after = -shared / (2.0f * cov.det);
    const float both = half_before + half_after;
    add(d_cov, {both * cov.yy + half_after * eps2d, -2.0f * both * cov.xy, both * cov.xx + half_after * eps2d});
    return d_opacity * factor;
}

// What column k of the rotation matrix and its scale get and give: d_column = (J W)^T dL/dhalf[k].
struct ColumnBackward {
    Vector d_column;  // dL/d(column k of R S)
    float d_scale;
};

__device__ __forceinline__ ColumnBackward column_backward(const Half& m, Vector column, float d_top, float d_bottom) {
    const Vector d = {m.top.x * d_top + m.bottom.x * d_bottom, m.top.y * d_top + m.bottom.y * d_bottom,
                      m.top.z * d_top + m.bottom.z * d_bottom};
    return {d, dot(d, column)};
}

// Adds dL/dJ of column k: d_half[k] (W R S)[k]^T.
__device__ __forceinline__ void add_jacobian(const Camera& camera, Vector column, float scale, float d_top,
                                             float d_bottom, Jacobian& d_j) {
    const float* w = camera.turn;
    const float x = (w[0] * column.x + w[1] * column.y + w[2] * column.z) * scale;
    const float y = (w[3] * column.x + w[4] * column.y + w[5] * column.z) * scale;
    const float z = (w[6] * column.x + w[7] * column.y + w[8] * column.z) * scale;
    d_j.j00 += d_top * x;
    d_j.j02 += d_top * z;
    d_j.j11 += d_bottom * y;
    d_j.j12 += d_bottom * z;
}

// dL/dquat through the rotation matrix, whose columns' gradients are x, y, z, and the normalisation.
__device__ __forceinline__ float4 quaternion_backward(const Quaternion& q, Vector x, Vector y, Vector z) {
    const float yz = y.z - z.y, zx = z.x - x.z, xy = x.y - y.x;  // antisymmetric parts
    const float half_w = q.x * yz + q.y * zx + q.z * xy;
    const float half_x = q.y * (y.x + x.y) + q.z * (z.x + x.z) + q.w * yz - 2.0f * q.x * (y.y + z.z);
    const float half_y = q.x * (y.x + x.y) + q.z * (z.y + y.z) + q.w * zx - 2.0f * q.y * (x.x + z.z);
    const float half_z = q.x * (z.x + x.z) + q.y * (z.y + y.z) + q.w * xy - 2.0f * q.z * (x.x + y.y);
    const float along = q.w * half_w + q.x * half_x + q.y * half_y + q.z * half_z;
    const float twice = 2.0f * q.inverse;
    return make_float4((half_w - along * q.w) * twice, (half_x - along * q.x) * twice, (half_y - along * q.y) * twice,
                       (half_z - along * q.z) * twice);
}

// dL/d(camera point) through the 2D mean, with the true ratios, and through J, with the clamped ones.
__device__ __forceinline__ Vector point_backward(const Camera& camera, Vector point, float inverse_z, const Jacobian& j,
                                                 const Jacobian& d_j, const RowGradient& row) {
    const float ratio_x = point.x * inverse_z, ratio_y = point.y * inverse_z;
    float d_x = camera.fx * row.mean_x, d_y = camera.fy * row.mean_y;
    if (ratio_x > camera.x_low && ratio_x < camera.x_high) d_x -= j.j00 * d_j.j02;
    if (ratio_y > camera.y_low && ratio_y < camera.y_high) d_y -= j.j11 * d_j.j12;
    const float through_j = j.j00 * d_j.j00 + j.j02 * d_j.j02 + j.j11 * d_j.j11 + j.j12 * d_j.j12;
    return {d_x * inverse_z, d_y * inverse_z, -(through_j + d_x * ratio_x + d_y * ratio_y) * inverse_z};
}

// Gradients of geometry and opacity of one Gaussian in one view, added to `sums`.
__device__ __forceinline__ void geometry_backward(const Camera& camera, const Settings& settings, Vector mean,
                                                  float4 quat, Vector log_scale, float raw_opacity,
                                                  const RowGradient& row, Gradients& sums) {
    const Vector point = camera_point(camera, mean);
    const float inverse_z = 1.0f / point.z;
    const Jacobian j = jacobian(camera, point, inverse_z);
    const Half m = image_turn(camera, j);
    const Quaternion q = unit_quaternion(quat);
    const Vector scale = activated_scale(log_scale, settings.is_final);
    const Half half = half_projection(m, q, scale);
    const Covariance cov = covariance(half, settings.eps2d);
    Vector d_cov = covariance_backward(cov, settings.eps2d, row);
    const float opacity = activated_opacity(raw_opacity, settings.is_final);
    float d_opacity = row.opacity;
    if (settings.is_antialiased) d_opacity = antialias_backward(cov, settings.eps2d, opacity, d_opacity, d_cov);
    sums.opacity += settings.is_final ? d_opacity : d_opacity * opacity * (1.0f - opacity);
    // cov = half half^T.
    const Vector d_top = {2.0f * d_cov.x * half.top.x + d_cov.y * half.bottom.x,
                          2.0f * d_cov.x * half.top.y + d_cov.y * half.bottom.y,
                          2.0f * d_cov.x * half.top.z + d_cov.y * half.bottom.z};
    const Vector d_bottom = {d_cov.y * half.top.x + 2.0f * d_cov.z * half.bottom.x,
                             d_cov.y * half.top.y + 2.0f * d_cov.z * half.bottom.y,
                             d_cov.y * half.top.z + 2.0f * d_cov.z * half.bottom.z};
    const Vector x = rotation_x(q), y = rotation_y(q), z = rotation_z(q);
    const ColumnBackward bx = column_backward(m, x, d_top.x, d_bottom.x);
    const ColumnBackward by = column_backward(m, y, d_top.y, d_bottom.y);
    const ColumnBackward bz = column_backward(m, z, d_top.z, d_bottom.z);
    const Vector through = settings.is_final ? Vector{1.0f, 1.0f, 1.0f} : scale;
    add(sums.scale, {bx.d_scale * through.x, by.d_scale * through.y, bz.d_scale * through.z});
    const Vector dx = bx.d_column, dy = by.d_column, dz = bz.d_column;
    const float4 d_quat = quaternion_backward(q, {dx.x * scale.x, dx.y * scale.x, dx.z * scale.x},
                                              {dy.x * scale.y, dy.y * scale.y, dy.z * scale.y},
                                              {dz.x * scale.z, dz.y * scale.z, dz.z * scale.z});
    sums.quat.x += d_quat.x;
    sums.quat.y += d_quat.y;
    sums.quat.z += d_quat.z;
    sums.quat.w += d_quat.w;
    Jacobian d_j = {0.0f, 0.0f, 0.0f, 0.0f};
    add_jacobian(camera, x, scale.x, d_top.x, d_bottom.x, d_j);
    add_jacobian(camera, y, scale.y, d_top.y, d_bottom.y, d_j);
    add_jacobian(camera, z, scale.z, d_top.z, d_bottom.z, d_j);
    const Vector d = point_backward(camera, point, inverse_z, j, d_j, row);
    const float* w = camera.turn;
    add(sums.mean, {w[0] * d.x + w[3] * d.y + w[6] * d.z, w[1] * d.x + w[4] * d.y + w[7] * d.z,
                    w[2] * d.x + w[5] * d.y + w[8] * d.z});
}

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

// Stages 1 to 4. `table` holds the parameters and, for an update, their moments; `outputs` is what stage 4 writes.
template <int DEGREE, bool UPDATES>
__device__ __forceinline__ void backward(const Attributes& table, const Attributes& outputs, const Inputs& inputs,
                                         const float* __restrict__ factors, const Statistics& statistics,
                                         float* __restrict__ d_masks) {
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
        d_masks[i] = UPDATES ? found.d_mask * factors[ADAM_FACTORS - 1] : found.d_mask;
        if (UPDATES && found.num_views > 0) {
            statistics.norm_sum[i] = found.norm_sum;
            statistics.view_count[i] += static_cast<float>(found.num_views);
        }
    }
    const unsigned ballot = __ballot_sync(ALL_LANES, is_active);
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
    finish_span<UPDATES>(outputs.shN, first * stride, num_rows * stride, given ? d_coefficients : nullptr,
                         factors + 5 * ADAM_FACTORS);
}

// In the names below, `w` is the first and `v` the second moment. factors: six AdamFactors, in the attributes' order.
#define UPDATE_KERNEL(NAME, DEGREE)                                                                                   \
    extern "C" __global__ void __launch_bounds__(BLOCK, 10)                                                               \
        NAME(float* means, float* quats, float* scales, float* opacities, float* sh0, float* shN, float* w_means,     \
             float* w_quats, float* w_scales, float* w_opacities, float* w_sh0, float* w_shN, float* v_means,         \
             float* v_quats, float* v_scales, float* v_opacities, float* v_sh0, float* v_shN, const float* factors,   \
             const float* cameras, const int* slots, const float* d_rows, int num_gaussians, int num_views,           \
             int stride, float eps2d, int is_final, int is_antialiased, float* norm_sum, float* view_count,           \
             float* d_masks, const int* status) {                                                                     \
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
        backward<DEGREE, true>(table, table, inputs, factors, {norm_sum, view_count}, d_masks);                       \
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
        backward<DEGREE, false>(table, gradients, inputs, nullptr, {nullptr, nullptr}, d_masks);                      \
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
