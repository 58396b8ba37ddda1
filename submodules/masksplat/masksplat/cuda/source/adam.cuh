// SPDX-License-Identifier: Apache-2.0
// Adam, dense as torch.optim.Adam: rows without a gradient decay and move, too (Kingma and Ba, 2015).
#pragma once

#include "common.cuh"

// What one attribute's update needs, as masksplat/cuda/projection.py packs it.
struct AdamFactors {
    float beta1, beta2;
    float rate;   // learning rate / (1 - beta1^t)
    float root;   // 1 / sqrt(1 - beta2^t)
    float eps;
    float scale;  // of the gradient
    float drift;  // subtracted after the update
};

constexpr int ADAM_FACTORS = 7;
constexpr int LAZY_CAPACITY = 128;  // updates that can be replayed: CAPACITY in masksplat/lazy.py

// What an update does to the parameter, once its moments are new. Contraction is written out: every kernel that makes or
// replays an update rounds alike.
__device__ __forceinline__ void adam_move(float& param, float first, float second, const AdamFactors& f) {
    // Approximate to a few ulp of the update, far below what the parameter can hold; rounding as IEEE 754 says takes
    // three times the instructions. A second moment that is denormal counts as 0: its root is far below any eps.
    const float inverse = reciprocal_approximate(__fmaf_rn(root_approximate(second), f.root, f.eps));
    param = __fmaf_rn(-__fmul_rn(f.rate, first), inverse, param) - f.drift;
}

__device__ __forceinline__ void adam_value(float& param, float& first, float& second, float gradient,
                                           const AdamFactors& f) {
    const float g = gradient * f.scale;
    first = __fmaf_rn(f.beta1, first, __fmul_rn(1.0f - f.beta1, g));
    second = __fmaf_rn(f.beta2, second, __fmul_rn(__fmul_rn(1.0f - f.beta2, g), g));
    adam_move(param, first, second, f);
}

// The same where the gradient is 0.
__device__ __forceinline__ void adam_without_gradient(float& param, float& first, float& second, const AdamFactors& f) {
    first = __fmaf_rn(f.beta1, first, 0.0f);
    second = __fmaf_rn(f.beta2, second, 0.0f);
    adam_move(param, first, second, f);
}

__device__ __forceinline__ void adam_word(float4& param, float4& first, float4& second, float4 gradient,
                                          const AdamFactors& f) {
    adam_value(param.x, first.x, second.x, gradient.x, f);
    adam_value(param.y, first.y, second.y, gradient.y, f);
    adam_value(param.z, first.z, second.z, gradient.z, f);
    adam_value(param.w, first.w, second.w, gradient.w, f);
}
