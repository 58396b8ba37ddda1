// SPDX-License-Identifier: Apache-2.0
// The probabilistic mask: sampling, and the straight-through update of its logits. The contract: masksplat/masks.py.
#include "adam.cuh"
#include "philox.cuh"

constexpr int BLOCK = 256;
constexpr float LOWEST_LOGIT = -60.0f;  // the derivative is 0 below; exp(60) 2^24 does not overflow

// What changes from step to step comes by value, or, in launches that are recorded once and replayed, from memory.
struct UpdateNumbers {
    float factor, beta1, beta2, rate, root, eps;
};

// Hard sample (N), derivative of the soft one by the logit (N), and the number of ones, added to *num_drawn. The step is
// *step_at unless that is null.
extern "C" __global__ void __launch_bounds__(BLOCK)
    sample(const float* __restrict__ logits, const long long* __restrict__ ids, int count, unsigned step,
           const unsigned* __restrict__ step_at, unsigned stream, unsigned seed_low, unsigned seed_high,
           float* __restrict__ mask, float* __restrict__ keep_gradient, unsigned long long* __restrict__ num_drawn) {
    const int i = blockIdx.x * BLOCK + threadIdx.x;
    if (step_at != nullptr) step = *step_at;
    bool is_drawn = false;
    if (i < count) {
        const unsigned long long id = static_cast<unsigned long long>(ids[i]);
        const uint4 counter =
            make_uint4(static_cast<unsigned>(id), static_cast<unsigned>(id >> 32), step, stream);
        const unsigned word = philox(counter, make_uint2(seed_low, seed_high)).x;
        const float drawn = static_cast<float>(word >> 9) + 0.5f;  // u 2^23, exact
        const float against = expf(-fmaxf(logits[i], LOWEST_LOGIT)) * ((8388608.0f - drawn) / drawn);
        const float total = 1.0f + against;
        is_drawn = against < 1.0f;
        mask[i] = is_drawn ? 1.0f : 0.0f;
        keep_gradient[i] = against / (total * total);
    }
    const int drawn_in_block = __syncthreads_count(is_drawn);
    if (threadIdx.x == 0 && drawn_in_block > 0) {
        atomicAdd(num_drawn, static_cast<unsigned long long>(drawn_in_block));
    }
}

// One Adam update with the gradient (d_mask + d_all) * keep_gradient. d_all is `factor` and, unless null, times *num_drawn;
// a null d_mask is 0. The numbers are *numbers unless that is null.
extern "C" __global__ void __launch_bounds__(BLOCK)
    update(float* __restrict__ logits, const float* __restrict__ d_mask, const float* __restrict__ keep_gradient,
           float* __restrict__ first, float* __restrict__ second, int count, float factor,
           const long long* __restrict__ num_drawn, float beta1, float beta2, float rate, float root, float eps,
           const UpdateNumbers* __restrict__ numbers, const int* __restrict__ status) {
    if (is_stopped(status)) return;
    const int i = blockIdx.x * BLOCK + threadIdx.x;
    if (i >= count) return;
    const UpdateNumbers by = numbers != nullptr ? *numbers : UpdateNumbers{factor, beta1, beta2, rate, root, eps};
    const float every = num_drawn == nullptr ? by.factor : __fmul_rn(by.factor, static_cast<float>(*num_drawn));
    const float own = d_mask == nullptr ? 0.0f : d_mask[i];
    float logit = logits[i], m = first[i], v = second[i];
    adam_value(logit, m, v, (own + every) * keep_gradient[i],
               {by.beta1, by.beta2, by.rate, by.root, by.eps, 1.0f});
    logits[i] = logit;
    first[i] = m;
    second[i] = v;
}
