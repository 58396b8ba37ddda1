// SPDX-License-Identifier: Apache-2.0
// Constants of masksplat/types.py and the small helpers that every kernel shares.
//
// House rules of these files: every kernel is `extern "C" __global__`; no standard headers (NVRTC has none): the integer
// types are int, unsigned, long long and unsigned long long; no float atomics; nobody waits in a loop but for blocks
// that started before. Inline PTX stands in `#ifndef EMULATED` beside a C++ twin: tests compile this text for the CPU.
#pragma once

constexpr int TILE = 16;                       // edge of a tile in pixels
constexpr int TILE_PIXELS = TILE * TILE;
constexpr float ALPHA_MAX = 0.99f;             // alpha is capped here; no gradient through the cap
constexpr float ALPHA_MIN = 1.0f / 255.0f;     // pairs with a smaller alpha are skipped
constexpr float TRANSMITTANCE_MIN = 1e-4f;     // a pixel ends before the splat that would go below
constexpr int NUM_ROW_COLUMNS = 10;            // floats of a row of Splats.rows
constexpr int SLOT_UNSEEN = -1;                // Splats.slots: behind the near plane or beside the image
constexpr int SLOT_NO_PIXEL = -2;              // Splats.slots: seen, but no pixel reaches ALPHA_MIN

// Columns of a row, in the order of ROW_COLUMNS.
constexpr int MEAN_X = 0, MEAN_Y = 1, CONIC_A = 2, CONIC_B = 3, CONIC_C = 4, OPACITY = 5;
constexpr int RED = 6, GREEN = 7, BLUE = 8, MASK = 9;

// Body-wide status words on the device.
constexpr int STATUS_OVERFLOW = 0;             // not 0: some buffer was too small, nothing may be updated
constexpr int STATUS_NEEDED = 1;               // instances that would have been needed (maximum)
constexpr int STATUS_WORDS = 8;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// True when an overflow has been noted, so that a kernel that changes state must do nothing. Null: never.
__device__ __forceinline__ bool is_stopped(const int* status) {
    return status != nullptr && status[STATUS_OVERFLOW] != 0;
}

// Index of a thread in a block of one, two or three dimensions, in the order that warps are cut from.
__device__ __forceinline__ int thread_rank() {
    return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
}

__device__ __forceinline__ int lane_index() { return thread_rank() & (WARP - 1); }

__device__ __forceinline__ int warp_index() { return thread_rank() / WARP; }

__device__ __forceinline__ int divide_up(int value, int divisor) { return (value + divisor - 1) / divisor; }

// Sum over the warp, the same bits in every lane. All 32 lanes take part.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// Maximum over the warp, in every lane. All 32 lanes take part.
template <typename T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(ALL_LANES, value, step);
        value = other > value ? other : value;
    }
    return value;
}

// Sum over this lane and all lanes before it. All 32 lanes take part.
template <typename T>
__device__ __forceinline__ T warp_inclusive_sum(T value) {
    const int lane = lane_index();
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const T other = __shfl_up_sync(ALL_LANES, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// Good to 2 ulp for arguments that are far from denormal.
__device__ __forceinline__ float reciprocal_approximate(float x) {
#ifndef EMULATED
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return 1.0f / x;
#endif
}

// Good to 1 ulp where the reciprocal is an ordinary number; for an infinite x it is not one.
__device__ __forceinline__ float reciprocal(float x) {
    const float estimate = reciprocal_approximate(x);
    return __fmaf_rn(estimate, __fmaf_rn(-x, estimate, 1.0f), estimate);
}

// 1 / sqrt(x) to 2 ulp, for ordinary x > 0.
__device__ __forceinline__ float inverse_root(float x) {
#ifndef EMULATED
    float estimate;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(x));
#else
    const float estimate = rsqrtf(x);
#endif
    const float error = __fmaf_rn(__fmul_rn(-x, estimate), estimate, 1.0f);
    return __fmaf_rn(__fmul_rn(0.5f, estimate), error, estimate);
}

// Off by less than 3e-7, or 3e-7 of itself.
__device__ __forceinline__ float log2_approximate(float x) {
#ifndef EMULATED
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return log2f(x);
#endif
}

// Good to 1 ulp, 0 for 0.
__device__ __forceinline__ float root_approximate(float x) {
#ifndef EMULATED
    float result;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
#else
    return sqrtf(x);
#endif
}
