// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers of many ids at once. The contract: `words` in masksplat/random.py.
#include "philox.cuh"

constexpr int BLOCK = 256;

// The four words of each id, (N, 4).
extern "C" __global__ void __launch_bounds__(BLOCK)
    fill_words(const long long* __restrict__ ids, int count, unsigned step, unsigned stream, unsigned seed_low,
               unsigned seed_high, long long* __restrict__ words) {
    const int i = blockIdx.x * BLOCK + threadIdx.x;
    if (i >= count) return;
    const unsigned long long id = static_cast<unsigned long long>(ids[i]);
    const uint4 drawn = philox(make_uint4(static_cast<unsigned>(id), static_cast<unsigned>(id >> 32), step, stream),
                               make_uint2(seed_low, seed_high));
    words[4 * static_cast<long long>(i)] = drawn.x;
    words[4 * static_cast<long long>(i) + 1] = drawn.y;
    words[4 * static_cast<long long>(i) + 2] = drawn.z;
    words[4 * static_cast<long long>(i) + 3] = drawn.w;
}
