// SPDX-License-Identifier: Apache-2.0
// Rows of the coefficients shN, which are too long for coalesced reads by one thread each, on their way through shared
// memory: whole 16-byte words are copied by all lanes of a warp, then every lane reads its own row there.
#pragma once

#include "common.cuh"

// Starts a copy of 16 bytes from global to shared memory; `wait_for_copies` and a barrier of the warp end it.
__device__ __forceinline__ void copy_word(float4* shared, const float4* global) {
#ifndef EMULATED
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
    *shared = *global;
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#ifndef EMULATED
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Start copying the first `used` floats of the rows r < num_rows <= 32 of `values` for which bit r of `wanted` is set to
// staged[r * stride]. What lies between may be written, too. All lanes of a warp call it; `values` (rows of `stride` >= 3
// floats) and `staged` are aligned to 16 bytes.
__device__ __forceinline__ void stage_rows(const float* __restrict__ values, int num_rows, int stride, int used,
                                           unsigned wanted, float* staged) {
    constexpr int STEP = 4 * WARP;  // floats that the warp copies at once
    const int num_floats = num_rows * stride, num_words = num_floats / 4;
    const int row_step = STEP / stride, column_step = STEP % stride;
    int row = 4 * lane_index() / stride, column = 4 * lane_index() % stride;
    for (int word = lane_index(); word < num_words; word += WARP) {
        const unsigned here = wanted >> row;  // bit 0: its row, bit 1: the next one
        if (((here & 1u) != 0 && column < used) || ((here & 2u) != 0 && column + 3 >= stride)) {
            copy_word(reinterpret_cast<float4*>(staged) + word, reinterpret_cast<const float4*>(values) + word);
        }
        row += row_step;
        column += column_step;
        if (column >= stride) {
            column -= stride;
            ++row;
        }
    }
#pragma unroll 1  // the last rows of all at most
    for (int k = 4 * num_words + lane_index(); k < num_floats; k += WARP) staged[k] = values[k];
}

// --- rows that only some of the warps want, waited for by all of the block ----------------------------------------------

// From Hopper on a stretch of rows is one instruction, and a barrier in shared memory counts the bytes that have come.
#if !defined(EMULATED) && __CUDA_ARCH__ >= 900
#define HAS_BULK_COPIES 1
#else
#define HAS_BULK_COPIES 0
#endif

struct Arrivals {
    unsigned long long barrier;
};

// Once, by all threads; `num_warps` of them will call `bring_rows` each time. A barrier of the block is inside.
__device__ __forceinline__ void begin_arrivals(Arrivals& arrivals, int num_warps) {
#if HAS_BULK_COPIES
    if (threadIdx.x == 0) {
        const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(&arrivals.barrier));
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(num_warps) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
#endif
}

// Start copying the first `used` floats of the rows first + r, r < num_rows <= 32, whose bit of `wanted` is set to
// staged[r * stride]. What lies between may be written, too. All lanes of a warp call it, rows or not; `values` (rows of
// `stride` floats) and `staged` are aligned to 16 bytes, `first` is a multiple of four.
__device__ __forceinline__ void bring_rows(const float* __restrict__ values, int first, int num_rows, int stride,
                                           int used, unsigned wanted, float* staged, Arrivals& arrivals) {
    const float* from = values + static_cast<long long>(first) * stride;
#if HAS_BULK_COPIES
    const int lane = threadIdx.x % WARP;
    const unsigned barrier = static_cast<unsigned>(__cvta_generic_to_shared(&arrivals.barrier));
    if (stride == used && num_rows == WARP) {
        // Each stretch of wanted rows is copied by its first lane, in whole words: 32 rows are a whole number of them.
        const bool is_first = ((wanted & ~(wanted << 1)) >> lane & 1u) != 0;
        const unsigned behind = ~(wanted >> lane);
        const int length = behind == 0 ? WARP : __ffs(behind) - 1;
        const int begin = 4 * stride * lane / 16 * 16, end = (4 * stride * (lane + length) + 15) / 16 * 16;
        const unsigned num_bytes = __reduce_add_sync(ALL_LANES, is_first ? unsigned(end - begin) : 0u);
        if (lane == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(num_bytes)
                         : "memory");
        }
        __syncwarp();
        if (is_first) {
            const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(staged));
            asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                             to + begin),
                         "l"(reinterpret_cast<const char*>(from) + begin), "r"(end - begin), "r"(barrier)
                         : "memory");
        }
        return;
    }
    if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
    if (wanted != 0) stage_rows(from, num_rows, stride, used, wanted, staged);
}

// Wait for the rows of all warps; `parity` is 0 the first time, then 1, 0, 1, ... Each thread must have been through
// `wait_for_copies` and then a barrier of the block since `bring_rows`.
__device__ __forceinline__ void await_rows(Arrivals& arrivals, int parity) {
#if HAS_BULK_COPIES
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(&arrivals.barrier));
    unsigned is_complete = 0;
    while (is_complete == 0) {
        asm volatile(
            "{\n.reg .pred complete;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
            "selp.u32 %0, 1, 0, complete;\n}"
            : "=r"(is_complete)
            : "r"(address), "r"(parity)
            : "memory");
    }
#endif
}

// Before the barrier of the block after which memory that was read or written goes to `bring_rows` again.
__device__ __forceinline__ void order_before_copies() {
#if HAS_BULK_COPIES
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
