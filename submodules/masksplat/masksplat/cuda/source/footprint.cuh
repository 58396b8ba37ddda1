// SPDX-License-Identifier: Apache-2.0
// Which pixels a splat can reach: the ellipse where alpha >= 1/255, cut into horizontal bands.
//
// With d = (dx, dy) from the mean, alpha = o exp(-q / 2) with q = a dx^2 + 2 b dx dy + c dy^2, so alpha >= 1/255 inside
// q <= t = 2 ln(255 o). At a given dy the ellipse spans dx = (-b dy -+ sqrt(a t - D dy^2)) / a with D = a c - b^2.
// The right edge is concave in dy and peaks at dy_star = -b sqrt(t / (c D)), the left edge is its mirror image, so the
// extreme over a band of dy is at dy_star clamped to the band.
//
// All of it is float32 and must never be tighter than the alpha that the compositing kernels compute. However they sum
// up q, it is off by less than 2e-6 (a dx^2 + c dy^2), and a dx^2 + c dy^2 <= 2 t a c / D inside the ellipse, so t is
// raised by the relative 4e-6 a c / D. D itself comes from a difference of products that does not cancel, good to 2 ulp.
#pragma once

#include "common.cuh"

constexpr float FOOTPRINT_MARGIN = 0.01f;          // added to t, and to spans in pixels
constexpr float FOOTPRINT_ROUNDING = 4e-6f;        // of q, relative to half of a dx^2 + c dy^2
constexpr float FOOTPRINT_SPAN_ROUNDING = 1e-6f;   // of the ends of a span, relative to their two terms
constexpr float FOOTPRINT_WORST_RATIO = 1e6f;      // of a c to D: beyond it the ellipse is not used at all
constexpr float LOG2_OF_255 = 7.994353436858858f;
constexpr float TWO_LN_2 = 1.3862943611198906f;

struct Footprint {
    float at, det, b, inverse_a;   // at = a t
    float dy_max, dy_star;         // dy_max < 0: not usable, the splat's box alone bounds it
};

struct Span {
    float left, right;             // dx from the mean, pixels; empty when left > right
};

// a c - b^2 to about 2 ulp (Kahan).
__device__ __forceinline__ float conic_determinant(float a, float b, float c) {
    const float square = __fmul_rn(b, b);
    return __fmaf_rn(a, c, -square) + __fmaf_rn(-b, b, square);
}

// `log_opacity` is log2 of the opacity.
__device__ __forceinline__ Footprint make_footprint(float a, float b, float c, float log_opacity) {
    Footprint f;
    f.det = conic_determinant(a, b, c);
    f.b = b;
    f.inverse_a = reciprocal_approximate(a);
    f.dy_max = -1.0f;
    f.at = f.dy_star = 0.0f;
    const float t = TWO_LN_2 * (log_opacity + LOG2_OF_255);
    if (t > -FOOTPRINT_MARGIN && a > 0.0f && c > 0.0f && f.det * FOOTPRINT_WORST_RATIO > a * c) {
        const float inverse_det = reciprocal_approximate(f.det);
        const float raised = fmaxf(t, 0.0f) * (1.0f + FOOTPRINT_ROUNDING * (a * c * inverse_det)) + FOOTPRINT_MARGIN;
        f.at = a * raised;
        f.dy_max = root_approximate(f.at * inverse_det);
        f.dy_star = -b * root_approximate(raised * inverse_det * reciprocal_approximate(c));
    }
    return f;
}

__device__ __forceinline__ bool is_usable(const Footprint& f) { return f.dy_max > 0.0f; }

// Range of dx that a usable footprint reaches for dy in [low, high].
__device__ __forceinline__ Span span_of_band(const Footprint& f, float low, float high) {
    low = fmaxf(low, -f.dy_max);
    high = fminf(high, f.dy_max);
    if (low > high) return {1.0f, 0.0f};
    const float right_dy = fminf(fmaxf(f.dy_star, low), high);
    const float left_dy = fminf(fmaxf(-f.dy_star, low), high);
    const float right_root = root_approximate(fmaxf(0.0f, f.at - f.det * right_dy * right_dy));
    const float left_root = root_approximate(fmaxf(0.0f, f.at - f.det * left_dy * left_dy));
    const float right_shift = f.b * right_dy, left_shift = f.b * left_dy;
    const float right_slack = FOOTPRINT_SPAN_ROUNDING * (right_root + fabsf(right_shift));
    const float left_slack = FOOTPRINT_SPAN_ROUNDING * (left_root + fabsf(left_shift));
    return {(-left_shift - left_root - left_slack) * f.inverse_a - FOOTPRINT_MARGIN,
            (right_root - right_shift + right_slack) * f.inverse_a + FOOTPRINT_MARGIN};
}
