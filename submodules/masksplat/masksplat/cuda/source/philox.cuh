// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers: Philox4x32-10 of Salmon, Moraes, Dror and Shaw (SC 2011), bit-equal to
// masksplat/random.py. The counter is (id low, id high, step, stream), the key (seed low, seed high).
#pragma once

#include "common.cuh"

constexpr unsigned PHILOX_MULTIPLIER_0 = 0xD2511F53u, PHILOX_MULTIPLIER_1 = 0xCD9E8D57u;
constexpr unsigned PHILOX_WEYL_0 = 0x9E3779B9u, PHILOX_WEYL_1 = 0xBB67AE85u;
constexpr int PHILOX_ROUNDS = 10;

// The four output words.
__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < PHILOX_ROUNDS; ++round) {
        const unsigned high_0 = __umulhi(PHILOX_MULTIPLIER_0, counter.x), low_0 = PHILOX_MULTIPLIER_0 * counter.x;
        const unsigned high_1 = __umulhi(PHILOX_MULTIPLIER_1, counter.z), low_1 = PHILOX_MULTIPLIER_1 * counter.z;
        counter = make_uint4(high_1 ^ counter.y ^ key.x, low_1, high_0 ^ counter.w ^ key.y, low_0);
        key.x += PHILOX_WEYL_0;
        key.y += PHILOX_WEYL_1;
    }
    return counter;
}
