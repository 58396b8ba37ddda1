// SPDX-License-Identifier: Apache-2.0
// One Gaussian seen by one camera: the quantities that projection and its gradient share (EWA, Zwicker 2001).
//
// With camera coordinates p = W X + t, the mean is (fx x/z + cx, fy y/z + cy) and the 2D covariance
// J W Sigma W^T J^T + eps2d I, where Sigma = R S S^T R^T and J is the Jacobian of the projection at p, its x/z and y/z
// clamped to the image plus 15 % of its size on each side. The same maths as masksplat/cpu/geometry.py.
#pragma once

#include "common.cuh"

constexpr float EXP_LIMIT = 80.0f;  // arguments of exp are clamped here, before float overflows

// One view, as `pack_cameras` writes it and masksplat/cuda/projection.py knows it: 28 floats, so that it
// can be read in words of 16 bytes.
struct Camera {
    float turn[9];                       // W, row-major
    float shift[3];                      // t
    float fx, fy, cx, cy;                // pixels
    float x_low, x_high, y_low, y_high;  // clamps of x/z and y/z
    float centre[3];                     // of the camera, in world units
    float width, height;                 // pixels
    float unused[3];
};

struct Vector {
    float x, y, z;
};

// J W R S, (2, 3): the square root of the 2D covariance.
struct Half {
    Vector top, bottom;
};

// Covariance before the low-pass, pixel^2, its determinant, and the determinant after the low-pass.
struct Covariance {
    float xx, xy, yy, det_before, det;
};

struct Quaternion {
    float w, x, y, z, inverse;  // unit, and 1 / norm of the given one
};

// The non-zero entries of J.
struct Jacobian {
    float j00, j02, j11, j12;
};

__device__ __forceinline__ float dot(Vector a, Vector b) { return a.x * b.x + a.y * b.y + a.z * b.z; }

__device__ __forceinline__ Vector cross(Vector a, Vector b) {
    return {a.y * b.z - a.z * b.y, a.z * b.x - a.x * b.z, a.x * b.y - a.y * b.x};
}

__device__ __forceinline__ Vector load_vector(const float* __restrict__ values, int row) {
    const float* from = values + 3ll * row;
    return {from[0], from[1], from[2]};
}

// World point to camera coordinates, to the rounding of the sums.
__device__ __forceinline__ Vector camera_point(const Camera& camera, Vector mean) {
    const float* w = camera.turn;
    return {w[0] * mean.x + w[1] * mean.y + w[2] * mean.z + camera.shift[0],
            w[3] * mean.x + w[4] * mean.y + w[5] * mean.z + camera.shift[1],
            w[6] * mean.x + w[7] * mean.y + w[8] * mean.z + camera.shift[2]};
}

// A number in two parts, good to twice the digits of float.
struct Twofold {
    float high, low;
};

// Add a product (Ogita, Rump and Oishi 2005, Dot2): its rounding and that of the sum go to the low part.
__device__ __forceinline__ Twofold add_product(Twofold sum, float a, float b) {
    const float product = __fmul_rn(a, b), high = __fadd_rn(sum.high, product), part = __fsub_rn(high, sum.high);
    const float rest = __fadd_rn(__fsub_rn(sum.high, __fsub_rn(high, part)), __fsub_rn(product, part));
    return {high, __fadd_rn(sum.low, __fadd_rn(__fmaf_rn(a, b, -product), rest))};
}

// Coordinate `axis` of a world point by the camera. The high part is the exact one correctly rounded but for rare cases:
// splats are ordered by depth, and two that nearly touch should not change places for the rounding of a sum.
__device__ __forceinline__ Twofold camera_coordinate(const Camera& camera, int axis, Vector mean) {
    const float* w = camera.turn + 3 * axis;
    Twofold sum = {camera.shift[axis], 0.0f};
    sum = add_product(sum, w[0], mean.x);
    sum = add_product(sum, w[1], mean.y);
    sum = add_product(sum, w[2], mean.z);
    const float high = __fadd_rn(sum.high, sum.low);
    return {high, __fsub_rn(sum.low, __fsub_rn(high, sum.high))};
}

// x / z, where `inverse` is 1 / z.high but for its rounding: the low part is what the high part leaves of x.
__device__ __forceinline__ Twofold quotient(Twofold x, Twofold z, float inverse) {
    const float high = __fmul_rn(x.high, inverse), rest = __fadd_rn(__fmaf_rn(-high, z.high, x.high), x.low);
    return {high, __fmul_rn(__fmaf_rn(-high, z.low, rest), inverse)};
}

// Where a ratio x/z or y/z lies in the image, pixels, correctly rounded but for rare cases: a 2D mean that is off by more
// puts pairs on the other side of alpha's thresholds.
__device__ __forceinline__ float pixel_coordinate(Twofold ratio, float focal, float centre) {
    const Twofold sum = add_product({centre, __fmul_rn(focal, ratio.low)}, focal, ratio.high);
    return __fadd_rn(sum.high, sum.low);
}

__device__ __forceinline__ Quaternion unit_quaternion(float4 given) {
    const float inverse =
        1.0f / sqrtf(given.x * given.x + given.y * given.y + given.z * given.z + given.w * given.w);
    return {given.x * inverse, given.y * inverse, given.z * inverse, given.w * inverse, inverse};
}

// Columns of the rotation matrix.
__device__ __forceinline__ Vector rotation_x(const Quaternion& q) {
    return {1.0f - 2.0f * (q.y * q.y + q.z * q.z), 2.0f * (q.x * q.y + q.w * q.z), 2.0f * (q.x * q.z - q.w * q.y)};
}

__device__ __forceinline__ Vector rotation_y(const Quaternion& q) {
    return {2.0f * (q.x * q.y - q.w * q.z), 1.0f - 2.0f * (q.x * q.x + q.z * q.z), 2.0f * (q.y * q.z + q.w * q.x)};
}

__device__ __forceinline__ Vector rotation_z(const Quaternion& q) {
    return {2.0f * (q.x * q.z + q.w * q.y), 2.0f * (q.y * q.z - q.w * q.x), 1.0f - 2.0f * (q.x * q.x + q.y * q.y)};
}

// From x/z, y/z and 1/z.
__device__ __forceinline__ Jacobian jacobian(const Camera& camera, float ratio_x, float ratio_y, float inverse_z) {
    const float u = fminf(fmaxf(ratio_x, camera.x_low), camera.x_high);
    const float v = fminf(fmaxf(ratio_y, camera.y_low), camera.y_high);
    const float fx = camera.fx * inverse_z, fy = camera.fy * inverse_z;
    return {fx, -fx * u, fy, -fy * v};
}

// The rows of J W.
__device__ __forceinline__ Half image_turn(const Camera& camera, const Jacobian& j) {
    const float* w = camera.turn;
    return {{j.j00 * w[0] + j.j02 * w[6], j.j00 * w[1] + j.j02 * w[7], j.j00 * w[2] + j.j02 * w[8]},
            {j.j11 * w[3] + j.j12 * w[6], j.j11 * w[4] + j.j12 * w[7], j.j11 * w[5] + j.j12 * w[8]}};
}

__device__ __forceinline__ Half half_projection(const Half& m, const Quaternion& q, Vector scale) {
    const Vector x = rotation_x(q), y = rotation_y(q), z = rotation_z(q);
    return {{dot(m.top, x) * scale.x, dot(m.top, y) * scale.y, dot(m.top, z) * scale.z},
            {dot(m.bottom, x) * scale.x, dot(m.bottom, y) * scale.y, dot(m.bottom, z) * scale.z}};
}

// The determinants have no cancellation: that of half half^T is the squared area of the cross product of its rows.
__device__ __forceinline__ Covariance covariance(const Half& half, float eps2d) {
    const Vector a = half.top, b = half.bottom;
    const float xx = dot(a, a), xy = dot(a, b), yy = dot(b, b);
    const Vector normal = cross(a, b);
    const float before = dot(normal, normal);
    return {xx, xy, yy, before, before + eps2d * (xx + yy) + eps2d * eps2d};
}

// Standard deviations in world units, from logarithms unless they are final.
__device__ __forceinline__ Vector activated_scale(Vector scale, bool is_final) {
    if (is_final) return scale;
    return {expf(fminf(scale.x, EXP_LIMIT)), expf(fminf(scale.y, EXP_LIMIT)), expf(fminf(scale.z, EXP_LIMIT))};
}

// Opacity in [0, 1], from a logit unless it is final.
__device__ __forceinline__ float activated_opacity(float opacity, bool is_final) {
    return is_final ? opacity : reciprocal(1.0f + expf(fminf(-opacity, EXP_LIMIT)));
}

// Unit direction from the camera's centre to the mean; `inverse` is 1 / distance.
__device__ __forceinline__ Vector view_direction(const Camera& camera, Vector mean, float& inverse) {
    const Vector d = {mean.x - camera.centre[0], mean.y - camera.centre[1], mean.z - camera.centre[2]};
    inverse = inverse_root(dot(d, d));
    return {d.x * inverse, d.y * inverse, d.z * inverse};
}
