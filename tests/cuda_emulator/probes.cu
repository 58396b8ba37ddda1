// SPDX-License-Identifier: Apache-2.0
// Kernels that show CUDA's semantics one by one; run by the emulator and by a GPU, which must agree.
#include "common.cuh"

extern "C" __global__ void shuffles(const int* input, int* output) {
    const int thread = threadIdx.x, lane = lane_index(), value = input[thread];
    int* mine = output + thread * 8;
    mine[0] = __shfl_sync(ALL_LANES, value, 5);
    mine[1] = __shfl_sync(ALL_LANES, value, lane + 3, 8);
    mine[2] = __shfl_up_sync(ALL_LANES, value, 2);
    mine[3] = __shfl_up_sync(ALL_LANES, value, 1, 4);
    mine[4] = __shfl_down_sync(ALL_LANES, value, 3);
    mine[5] = __shfl_down_sync(ALL_LANES, value, 1, 16);
    mine[6] = __shfl_xor_sync(ALL_LANES, value, 9);
    mine[7] = __shfl_xor_sync(ALL_LANES, value, 4, 4);
}

extern "C" __global__ void votes(const int* input, unsigned* output) {
    const int thread = threadIdx.x, lane = lane_index(), value = input[thread];
    unsigned* mine = output + thread * 9;
    mine[0] = __ballot_sync(ALL_LANES, value & 1);
    mine[1] = __any_sync(ALL_LANES, value == 7);
    mine[2] = __all_sync(ALL_LANES, value < 100);
    mine[3] = __match_any_sync(ALL_LANES, value % 3);
    mine[4] = __reduce_add_sync(ALL_LANES, unsigned(value));
    mine[5] = __reduce_max_sync(ALL_LANES, value - 20);
    mine[6] = 0;
    mine[7] = 0;
    mine[8] = 0;
    if (lane % 2) {  // two groups apart from each other, the inner one diverging again
        mine[6] = __reduce_add_sync(0xaaaaaaaau, unsigned(value));
        if (lane < 16) mine[7] = __shfl_sync(0x0000aaaau, value, 1);
    } else {
        mine[6] = __ballot_sync(0x55555555u, value > 10);
    }
    __syncwarp();
    mine[8] = __ballot_sync(ALL_LANES, mine[7] != 0);
}

// Sum of each block's part, through shared memory of both kinds, with threads that have returned early.
extern "C" __global__ void block_sums(const float* input, float* output, unsigned* counts, int size) {
    __shared__ float partial[32];
    extern __shared__ float staged[];
    const int thread = threadIdx.x, index = blockIdx.x * blockDim.x + thread;
    staged[thread] = index < size ? input[index] : 0.0f;
    __syncthreads();
    const float turned = staged[blockDim.x - 1 - thread];
    const float sum = warp_sum(turned);
    if (lane_index() == 0) partial[warp_index()] = sum;
    const int positive = __syncthreads_count(turned > 0.0f);
    const int any = __syncthreads_or(turned > 1e6f);
    if (warp_index() != 0) return;
    const float total = warp_sum(lane_index() < int(blockDim.x) / WARP ? partial[lane_index()] : 0.0f);
    if (thread == 0) {
        output[blockIdx.x] = total;
        atomicAdd(counts, unsigned(positive));
        atomicAdd(counts + 1, unsigned(any));
    }
}

extern "C" __global__ void bits(const int* input, int* output, int size) {
    const int index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= size) return;
    const int value = input[index];
    int* mine = output + index * 12;
    mine[0] = __popc(value);
    mine[1] = __ffs(value);
    mine[2] = __clz(value);
    mine[3] = int(__brev(unsigned(value)));
    mine[4] = int(__umulhi(unsigned(value), 0xD2511F53u));
    mine[5] = __float2int_rd(__int_as_float(value));
    mine[6] = __float2int_ru(__int_as_float(value));
    mine[7] = __float2int_rn(__int_as_float(value) * 0.5f);
    mine[8] = __float_as_int(__fmaf_rn(float(index), 1.000001f, -0.5f));
    mine[9] = __float_as_int(sqrtf(float(index)));
    mine[10] = __float_as_int(__fdiv_rn(1.0f, float(index + 1)));
    mine[11] = int(__byte_perm(unsigned(value), unsigned(index), 0x5140) ^ unsigned(min(value, index) ^ max(value, index)));
}

#define SCALED(FACTOR) \
    extern "C" __global__ void scaled_##FACTOR(const float4* __restrict__ input, float4* __restrict__ output) { \
        float4 value = input[threadIdx.x]; \
        value.x *= FACTOR; \
        output[threadIdx.x] = value; \
    }
SCALED(2)
SCALED(3)

template <typename T>
__device__ T through_shared(T value) {
    __shared__ T kept[64];
    kept[threadIdx.x] = value;
    __syncthreads();
    return kept[threadIdx.x ^ 1];
}

extern "C" __global__ void __launch_bounds__(64) scalars(
    int a, unsigned b, long long c, unsigned long long d, float e, double f, const float* nothing, double* output) {
    const double sum = a + double(b) + double(c) + double(d) + e + f + (nothing == nullptr ? 0.5 : 0.0);
    output[threadIdx.x] = through_shared(float(threadIdx.x)) + through_shared(sum) + through_shared(int(threadIdx.y));
}

extern "C" __global__ void where(int* output) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    output[block * threads + thread_rank()] = block * 10000 + int(threadIdx.z * 1000 + threadIdx.y * 100 + threadIdx.x);
}

// Prefix sum over blocks with lower numbers, each waiting for none: they have run already, or the order does not matter.
extern "C" __global__ void counted(int* counter, int* order) {
    __shared__ int place;
    if (threadIdx.x == 0) place = atomicAdd(counter, 1);
    __syncthreads();
    order[place * blockDim.x + threadIdx.x] = int(threadIdx.x);
}
