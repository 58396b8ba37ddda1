// SPDX-License-Identifier: Apache-2.0
// The gradient of one Gaussian's projection: from ten values of a splat to the parameters, recomputed from these. The
// maths: masksplat/cpu/project_backward.py.
#pragma once

#include "geometry.cuh"
#include "harmonics.cuh"

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

__device__ __forceinline__ Vector combination(float s, Vector a, float t, Vector b) {
    return {s * a.x + t * b.x, s * a.y + t * b.y, s * a.z + t * b.z};
}

// dL/dhalf from dL/dconic: -2 K G (K half) with K the conic and G the symmetric gradient. In this order: K G K loses the
// part along a long thin splat to the rounding of the part across it. K half = adj(cov + eps2d I) half / det, and
// adj(half half^T) half has the rows b x n and n x a, with a, b the rows of half and n = a x b: no cancellation.
__device__ __forceinline__ Half conic_backward(const Half& half, const Covariance& cov, float eps2d,
                                               const RowGradient& row) {
    const float inverse = 1.0f / cov.det;
    const Vector a = half.top, b = half.bottom, n = cross(a, b);
    const Vector top = combination(inverse, cross(b, n), eps2d * inverse, a);
    const Vector bottom = combination(inverse, cross(n, a), eps2d * inverse, b);
    const float g0 = -2.0f * row.conic_a, g1 = -row.conic_b, g2 = -2.0f * row.conic_c;  // -2 G
    const Vector d_top = combination(g0, top, g1, bottom), d_bottom = combination(g1, top, g2, bottom);
    const float xx = (cov.yy + eps2d) * inverse, xy = -cov.xy * inverse, yy = (cov.xx + eps2d) * inverse;
    return {combination(xx, d_top, xy, d_bottom), combination(xy, d_top, yy, d_bottom)};
}

// Through opacity * sqrt(det(cov) / det(cov + eps2d I)): adds to dL/dhalf, returns dL/dopacity. 0 where the first
// determinant vanishes.
__device__ __forceinline__ float antialias_backward(const Half& half, const Covariance& cov, float eps2d, float opacity,
                                                    float d_opacity, Half& d_half) {
    const float factor = sqrtf(cov.det_before / cov.det);
    const float shared = d_opacity * opacity * factor;
    const float half_before = cov.det_before > 0.0f ? shared / (2.0f * cov.det_before) : 0.0f;
    const float half_after = -shared / (2.0f * cov.det);
    const float both = half_before + half_after;
    // Twice dL/dcov: cov = half half^T.
    const float xx = 2.0f * (both * cov.yy + half_after * eps2d), yy = 2.0f * (both * cov.xx + half_after * eps2d);
    const float xy = -2.0f * both * cov.xy;
    add(d_half.top, combination(xx, half.top, xy, half.bottom));
    add(d_half.bottom, combination(xy, half.top, yy, half.bottom));
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
    const Jacobian j = jacobian(camera, point.x * inverse_z, point.y * inverse_z, inverse_z);
    const Half m = image_turn(camera, j);
    const Quaternion q = unit_quaternion(quat);
    const Vector scale = activated_scale(log_scale, settings.is_final);
    const Half half = half_projection(m, q, scale);
    const Covariance cov = covariance(half, settings.eps2d);
    Half d_half = conic_backward(half, cov, settings.eps2d, row);
    const float opacity = activated_opacity(raw_opacity, settings.is_final);
    float d_opacity = row.opacity;
    if (settings.is_antialiased) {
        d_opacity = antialias_backward(half, cov, settings.eps2d, opacity, d_opacity, d_half);
    }
    sums.opacity += settings.is_final ? d_opacity : d_opacity * opacity * (1.0f - opacity);
    const Vector d_top = d_half.top, d_bottom = d_half.bottom;
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
