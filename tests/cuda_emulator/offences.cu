// SPDX-License-Identifier: Apache-2.0
// Kernels that do what is undefined on a GPU; the emulator must say so instead of hanging or giving numbers.

#define ALL 0xffffffffu

extern "C" __global__ void lane_never_comes(int* output) {
    if (threadIdx.x == 3) {
        __syncthreads();
    } else {
        output[threadIdx.x] = __shfl_sync(ALL, int(threadIdx.x), 3);
        __syncthreads();
    }
}

extern "C" __global__ void different_barriers(int* output) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        output[0] = 1;
        __syncthreads();
    }
}

extern "C" __global__ void caller_left_out(int* output) { output[threadIdx.x] = __ballot_sync(1u, 1); }

extern "C" __global__ void writes_beyond(float* output, int size) { output[size + int(threadIdx.x)] = 1.0f; }

extern "C" __global__ void reads_before(const float* input, float* output) { output[0] = input[-2048]; }

extern "C" __global__ void null_write(int* output) { output[threadIdx.x] = 1; }

extern "C" __global__ void shared_overrun(float* output, int offset) {
    __shared__ float kept[32];
    kept[threadIdx.x + offset] = 1.0f;
    __syncthreads();
    output[threadIdx.x] = kept[threadIdx.x];
}

extern "C" __global__ void dynamic_overrun(float* output, int offset) {
    extern __shared__ float kept[];
    kept[threadIdx.x + offset] = 1.0f;
    output[threadIdx.x] = 1.0f;
}

extern "C" __global__ void misaligned(const float* input, float4* output) {
    output[0] = *reinterpret_cast<const float4*>(input + 1);
}

extern "C" __global__ void float_too_large(const float* input, int* output) { output[0] = int(input[0]); }

extern "C" __global__ void divides_by_zero(const int* input, int* output) { output[0] = 7 / input[0]; }

extern "C" __global__ void deep_stack(float* output, int depth) {
    volatile float local[100000];
    for (int index = 0; index < depth; ++index) local[index] = float(index);
    output[0] = local[depth - 1];
}

extern "C" __global__ void traps(int* output) {
    output[0] = 1;
    __trap();
}

// Not an error, but a race: the result depends on who comes first.
extern "C" __global__ void forgotten_barrier(int* output) {
    __shared__ int kept[64];
    kept[threadIdx.x] = int(threadIdx.x);
    output[threadIdx.x] = kept[threadIdx.x ^ 1];
}

extern "C" __global__ void unwritten_shared(float* output) {
    __shared__ float kept[32];
    extern __shared__ float more[];
    output[threadIdx.x] = kept[threadIdx.x];
    output[threadIdx.x + 32] = more[threadIdx.x];
    kept[threadIdx.x] = more[threadIdx.x] = 1.0f;
}

extern "C" __global__ void never_ends(const int* flag, int* output) {
    while (*static_cast<const volatile int*>(flag) == 0) {
    }
    output[0] = 1;
}
