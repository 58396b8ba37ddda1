// SPDX-License-Identifier: Apache-2.0
// The CUDA C++ that masksplat's kernels use, for g++. What is missing here does not compile: add it with CUDA's meaning.
// Not supported: volatile spins, inline PTX (guard it with #ifndef EMULATED), clock, textures, cooperative groups.
#pragma once

#include <math.h>
#include <string.h>

#include "runtime.h"

#define EMULATED 1
#define __CUDA_ARCH__ 900
#define __host__
#define __device__
#define __global__
#define __constant__ static
#define __shared__ static __attribute__((section("emulator_shared")))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define alignas(n) __attribute__((aligned(n)))
#define __grid_constant__

// --- vector types -----------------------------------------------------------------------------------------------------
#define EMULATOR_VECTORS(T, NAME, ALIGN2, ALIGN4)                                     \
    struct NAME##1 { T x; };                                                          \
    struct __align__(ALIGN2) NAME##2 { T x, y; };                                     \
    struct NAME##3 { T x, y, z; };                                                    \
    struct __align__(ALIGN4) NAME##4 { T x, y, z, w; };                               \
    inline NAME##1 make_##NAME##1(T x) { return {x}; }                                \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                        \
    inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float, 8, 16)
EMULATOR_VECTORS(double, double, 16, 16)
EMULATOR_VECTORS(int, int, 8, 16)
EMULATOR_VECTORS(unsigned, uint, 8, 16)
EMULATOR_VECTORS(short, short, 4, 8)
EMULATOR_VECTORS(unsigned short, ushort, 4, 8)
EMULATOR_VECTORS(signed char, char, 2, 4)
EMULATOR_VECTORS(unsigned char, uchar, 2, 4)
EMULATOR_VECTORS(long long, longlong, 16, 16)
EMULATOR_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef EMULATOR_VECTORS
struct dim3 { unsigned x = 1, y = 1, z = 1; };

#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::block_index)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)
constexpr int warpSize = 32;

// --- bits -------------------------------------------------------------------------------------------------------------
namespace emulator {
template <typename To, typename From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To result;
    memcpy(&result, &value, sizeof(To));
    return result;
}
template <typename T>
inline std::uint64_t widen(T value) {
    static_assert(sizeof(T) <= 8, "warp functions take up to 8 bytes");
    std::uint64_t wide = 0;
    memcpy(&wide, &value, sizeof(T));
    return wide;
}
template <typename T>
inline T narrow(std::uint64_t wide) {
    T value;
    memcpy(&value, &wide, sizeof(T));
    return value;
}
template <typename To>
inline To saturated(double value) {  // CUDA's conversions clamp, and turn NaN into 0
    constexpr To low = To(-1) < To(0) ? To(1ull << (8 * sizeof(To) - 1)) : To(0);
    constexpr To high = To(~low);
    if (value != value) return 0;
    if (value <= double(low)) return low;
    if (value >= double(high)) return high;
    return To(value);
}
}  // namespace emulator

inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator::bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1u) << (31 - bit);
    return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return unsigned(((unsigned long long)high << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        unsigned byte = unsigned(bytes >> (8 * (selector >> (4 * i) & 7))) & 0xff;
        if (selector >> (4 * i) & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __vabsdiffu4(unsigned a, unsigned b) {
    unsigned result = 0;
    for (int shift = 0; shift < 32; shift += 8) {
        const int difference = int(a >> shift & 0xff) - int(b >> shift & 0xff);
        result |= unsigned(difference < 0 ? -difference : difference) << shift;
    }
    return result;
}

// --- arithmetic -------------------------------------------------------------------------------------------------------
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return float(1.0 / sqrt(double(a))); }
inline float rsqrtf(float a) { return float(1.0 / sqrt(double(a))); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
// glibc declares functions of these names, so they are macros here.
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __powf(x, y) powf(x, y)
#define __sincosf(x, s, c) sincosf(x, s, c)

#define EMULATOR_MINMAX(T)                                  \
    inline T min(T a, T b) { return b < a ? b : a; }        \
    inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MINMAX(int)
EMULATOR_MINMAX(unsigned)
EMULATOR_MINMAX(long)
EMULATOR_MINMAX(unsigned long)
EMULATOR_MINMAX(long long)
EMULATOR_MINMAX(unsigned long long)
#undef EMULATOR_MINMAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }

inline int __float2int_rz(float x) { return emulator::saturated<int>(trunc(double(x))); }
inline int __float2int_rd(float x) { return emulator::saturated<int>(floor(double(x))); }
inline int __float2int_ru(float x) { return emulator::saturated<int>(ceil(double(x))); }
inline int __float2int_rn(float x) { return emulator::saturated<int>(nearbyint(double(x))); }
inline unsigned __float2uint_rz(float x) { return emulator::saturated<unsigned>(trunc(double(x))); }
inline unsigned __float2uint_rd(float x) { return emulator::saturated<unsigned>(floor(double(x))); }
inline unsigned __float2uint_ru(float x) { return emulator::saturated<unsigned>(ceil(double(x))); }
inline unsigned __float2uint_rn(float x) { return emulator::saturated<unsigned>(nearbyint(double(x))); }
inline long long __float2ll_rz(float x) { return emulator::saturated<long long>(trunc(double(x))); }
inline long long __float2ll_rn(float x) { return emulator::saturated<long long>(nearbyint(double(x))); }
inline long long __double2ll_rn(double x) { return emulator::saturated<long long>(nearbyint(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ll2float_rn(long long x) { return float(x); }
inline float __double2float_rn(double x) { return float(x); }

// --- memory -----------------------------------------------------------------------------------------------------------
template <typename T> inline T __ldg(const T* p) { return *p; }
template <typename T> inline T __ldcs(const T* p) { return *p; }
template <typename T> inline T __ldcg(const T* p) { return *p; }
template <typename T> inline T __ldca(const T* p) { return *p; }
template <typename T> inline T __ldcv(const T* p) { return *p; }
template <typename T> inline T __ldlu(const T* p) { return *p; }
template <typename T> inline void __stcs(T* p, T value) { *p = value; }
template <typename T> inline void __stcg(T* p, T value) { *p = value; }
template <typename T> inline void __stwb(T* p, T value) { *p = value; }
template <typename T> inline void __stwt(T* p, T value) { *p = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
inline void __trap() { emulator::fail("__trap()"); }

#define EMULATOR_ATOMIC(NAME, T, EXPRESSION)        \
    inline T NAME(T* address, T value) {            \
        const T old = *address;                     \
        *address = (T)(EXPRESSION);                 \
        return old;                                 \
    }
#define EMULATOR_INTEGER_ATOMICS(T)                               \
    EMULATOR_ATOMIC(atomicMin, T, value < old ? value : old)      \
    EMULATOR_ATOMIC(atomicMax, T, value > old ? value : old)      \
    EMULATOR_ATOMIC(atomicAnd, T, old& value)                     \
    EMULATOR_ATOMIC(atomicOr, T, old | value)                     \
    EMULATOR_ATOMIC(atomicXor, T, old ^ value)                    \
    EMULATOR_ATOMIC(atomicExch, T, value)                         \
    inline T atomicCAS(T* address, T expected, T value) {         \
        const T old = *address;                                   \
        if (old == expected) *address = value;                    \
        return old;                                               \
    }
EMULATOR_INTEGER_ATOMICS(int)
EMULATOR_INTEGER_ATOMICS(unsigned)
EMULATOR_INTEGER_ATOMICS(long long)
EMULATOR_INTEGER_ATOMICS(unsigned long long)
EMULATOR_ATOMIC(atomicAdd, int, unsigned(old) + unsigned(value))
EMULATOR_ATOMIC(atomicAdd, unsigned, old + value)
EMULATOR_ATOMIC(atomicAdd, unsigned long long, old + value)
EMULATOR_ATOMIC(atomicAdd, float, old + value)
EMULATOR_ATOMIC(atomicAdd, double, old + value)
EMULATOR_ATOMIC(atomicSub, int, unsigned(old) - unsigned(value))
EMULATOR_ATOMIC(atomicSub, unsigned, old - value)
EMULATOR_ATOMIC(atomicExch, float, value)
#undef EMULATOR_INTEGER_ATOMICS
#undef EMULATOR_ATOMIC

// --- warps and blocks -------------------------------------------------------------------------------------------------
#define EMULATOR_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncwarp(unsigned mask = ~0u, EMULATOR_SITE) {
    emulator::collective(emulator::SYNC, mask, 0, 0, 32, file, line);
}

#define EMULATOR_SHUFFLE(NAME, OPERATION)                                                                              \
    template <typename T>                                                                                              \
    inline T NAME(unsigned mask, T value, int argument, int width = 32, EMULATOR_SITE) {                               \
        return emulator::narrow<T>(                                                                                    \
            emulator::collective(emulator::OPERATION, mask, emulator::widen(value), argument, width, file, line));     \
    }
EMULATOR_SHUFFLE(__shfl_sync, SHUFFLE)
EMULATOR_SHUFFLE(__shfl_up_sync, SHUFFLE_UP)
EMULATOR_SHUFFLE(__shfl_down_sync, SHUFFLE_DOWN)
EMULATOR_SHUFFLE(__shfl_xor_sync, SHUFFLE_XOR)
#undef EMULATOR_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return unsigned(emulator::collective(emulator::BALLOT, mask, predicate != 0, 0, 32, file, line));
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return int(emulator::collective(emulator::ANY, mask, predicate != 0, 0, 32, file, line));
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return int(emulator::collective(emulator::ALL, mask, predicate != 0, 0, 32, file, line));
}
template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value, EMULATOR_SITE) {
    return unsigned(emulator::collective(emulator::MATCH_ANY, mask, emulator::widen(value), 0, 32, file, line));
}
template <typename T>
inline unsigned __match_all_sync(unsigned mask, T value, int* predicate, EMULATOR_SITE) {
    const unsigned equal =
        unsigned(emulator::collective(emulator::MATCH_ALL, mask, emulator::widen(value), 0, 32, file, line));
    *predicate = equal != 0;
    return equal;
}

#define EMULATOR_REDUCE(NAME, T, OPERATION)                                                                     \
    inline T NAME(unsigned mask, T value, EMULATOR_SITE) {                                                      \
        return T(unsigned(emulator::collective(emulator::OPERATION, mask, unsigned(value), 0, 32, file, line))); \
    }
EMULATOR_REDUCE(__reduce_add_sync, int, REDUCE_ADD)
EMULATOR_REDUCE(__reduce_add_sync, unsigned, REDUCE_ADD)
EMULATOR_REDUCE(__reduce_min_sync, int, REDUCE_MIN_SIGNED)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, REDUCE_MIN)
EMULATOR_REDUCE(__reduce_max_sync, int, REDUCE_MAX_SIGNED)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, REDUCE_MAX)
EMULATOR_REDUCE(__reduce_and_sync, unsigned, REDUCE_AND)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, REDUCE_OR)
EMULATOR_REDUCE(__reduce_xor_sync, unsigned, REDUCE_XOR)
#undef EMULATOR_REDUCE

inline void __syncthreads(EMULATOR_SITE) { emulator::block_barrier(emulator::BARRIER, 1, file, line); }
inline int __syncthreads_and(int predicate, EMULATOR_SITE) {
    return emulator::block_barrier(emulator::BARRIER_AND, predicate, file, line);
}
inline int __syncthreads_or(int predicate, EMULATOR_SITE) {
    return emulator::block_barrier(emulator::BARRIER_OR, predicate, file, line);
}
inline int __syncthreads_count(int predicate, EMULATOR_SITE) {
    return emulator::block_barrier(emulator::BARRIER_COUNT, predicate, file, line);
}
#undef EMULATOR_SITE
