// SPDX-License-Identifier: Apache-2.0
// One Adam update of a flat array.
#include "adam.cuh"

// param, first and second moment in place, `count` floats. The factors are those of `AdamFactors`.
extern "C" __global__ void __launch_bounds__(256)
    update(float* __restrict__ param, const float* __restrict__ gradient, float* __restrict__ first,
           float* __restrict__ second, long long count, float beta1, float beta2, float rate, float root, float eps,
           float drift, const int* __restrict__ status) {
    if (is_stopped(status)) return;
    const AdamFactors factors = {beta1, beta2, rate, root, eps, 1.0f, drift};
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long num_words = count / 4;
    if (i < num_words) {
        float4 p = reinterpret_cast<float4*>(param)[i], m = reinterpret_cast<float4*>(first)[i];
        float4 v = reinterpret_cast<float4*>(second)[i];
        adam_word(p, m, v, reinterpret_cast<const float4*>(gradient)[i], factors);
        reinterpret_cast<float4*>(param)[i] = p;
        reinterpret_cast<float4*>(first)[i] = m;
        reinterpret_cast<float4*>(second)[i] = v;
    }
    const long long rest = 4 * num_words + i;
    if (i < 4 && rest < count) adam_value(param[rest], first[rest], second[rest], gradient[rest], factors);
}
