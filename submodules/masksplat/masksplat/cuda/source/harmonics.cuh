// SPDX-License-Identifier: Apache-2.0
// Real spherical harmonics up to degree 3 in the sign convention of 3DGS, and their gradient.
//
// colour = sum_k basis_k(direction) * coefficient_k + 0.5, clamped at 0. Every function is made for one DEGREE, so that
// the arrays below are registers. Coefficient 3 (k - 1) + channel of a Gaussian, k >= 1, lies in shared memory.
#pragma once

#include "geometry.cuh"

constexpr int NO_HARMONICS = -1;           // sh0 is the colour

constexpr float SH_C0 = 0.28209479177387814f;  // sqrt(1 / (4 pi))
constexpr float SH_C1 = 0.4886025119029199f;   // sqrt(3 / (4 pi))
constexpr float SH_C2_0 = 1.0925484305920792f;  // sqrt(15 / (4 pi))
constexpr float SH_C2_1 = 0.31539156525252005f;  // sqrt(5 / (16 pi))
constexpr float SH_C2_2 = 0.5462742152960396f;  // sqrt(15 / (16 pi))
constexpr float SH_C3_0 = 0.5900435899266435f;  // sqrt(35 / (32 pi))
constexpr float SH_C3_1 = 2.890611442640554f;   // sqrt(105 / (4 pi))
constexpr float SH_C3_2 = 0.4570457994644658f;  // sqrt(21 / (32 pi))
constexpr float SH_C3_3 = 0.3731763325901154f;  // sqrt(7 / (16 pi))
constexpr float SH_C3_4 = 1.445305721320277f;   // sqrt(105 / (16 pi))

// Bases beyond the constant one.
__host__ __device__ constexpr int higher_bases(int degree) { return degree < 1 ? 0 : (degree + 1) * (degree + 1) - 1; }

// Values of the bases 1, 2, ... at a unit direction. Never empty, for the sake of C++.
template <int DEGREE>
struct Basis {
    float value[higher_bases(DEGREE) > 0 ? higher_bases(DEGREE) : 1];
};

template <int DEGREE>
__device__ __forceinline__ Basis<DEGREE> basis_at(Vector d) {
    Basis<DEGREE> basis;
    float* b = basis.value;
    if constexpr (DEGREE >= 1) {
        b[0] = -SH_C1 * d.y;
        b[1] = SH_C1 * d.z;
        b[2] = -SH_C1 * d.x;
    }
    const float xx = d.x * d.x, yy = d.y * d.y, zz = d.z * d.z;
    if constexpr (DEGREE >= 2) {
        b[3] = SH_C2_0 * d.x * d.y;
        b[4] = -SH_C2_0 * d.y * d.z;
        b[5] = SH_C2_1 * (zz + zz - xx - yy);
        b[6] = -SH_C2_0 * d.x * d.z;
        b[7] = SH_C2_2 * (xx - yy);
    }
    if constexpr (DEGREE >= 3) {
        b[8] = -SH_C3_0 * d.y * (3.0f * xx - yy);
        b[9] = SH_C3_1 * d.x * d.y * d.z;
        b[10] = -SH_C3_2 * d.y * (4.0f * zz - xx - yy);
        b[11] = SH_C3_3 * d.z * (zz + zz - 3.0f * xx - 3.0f * yy);
        b[12] = -SH_C3_2 * d.x * (4.0f * zz - xx - yy);
        b[13] = SH_C3_4 * d.z * (xx - yy);
        b[14] = -SH_C3_0 * d.x * (xx - 3.0f * yy);
    }
    return basis;
}

// Colour before the offset of 0.5 and the clamp.
template <int DEGREE>
__device__ __forceinline__ Vector harmonics_sum(const Basis<DEGREE>& basis, Vector sh0, const float* coefficients) {
    Vector colour = {SH_C0 * sh0.x, SH_C0 * sh0.y, SH_C0 * sh0.z};
#pragma unroll
    for (int k = 0; k < higher_bases(DEGREE); ++k) {
        colour.x = fmaf(basis.value[k], coefficients[3 * k], colour.x);
        colour.y = fmaf(basis.value[k], coefficients[3 * k + 1], colour.y);
        colour.z = fmaf(basis.value[k], coefficients[3 * k + 2], colour.z);
    }
    return colour;
}

// dL/d(direction), before the direction's normalisation, from q_k = dL/dbasis_k.
template <int DEGREE>
__device__ __forceinline__ Vector direction_gradient(const Basis<DEGREE>& d_basis, Vector d) {
    const float* q = d_basis.value;
    Vector g = {0.0f, 0.0f, 0.0f};
    if constexpr (DEGREE >= 1) g = {-SH_C1 * q[2], -SH_C1 * q[0], SH_C1 * q[1]};
    if constexpr (DEGREE >= 2) {
        const float q3 = SH_C2_0 * q[3], q4 = -SH_C2_0 * q[4], q5 = 2.0f * SH_C2_1 * q[5];
        const float q6 = -SH_C2_0 * q[6], q7 = 2.0f * SH_C2_2 * q[7];
        g.x += d.y * q3 + d.z * q6 - d.x * q5 + d.x * q7;
        g.y += d.x * q3 + d.z * q4 - d.y * q5 - d.y * q7;
        g.z += d.y * q4 + d.x * q6 + 2.0f * d.z * q5;
    }
    if constexpr (DEGREE >= 3) {
        const float q8 = -3.0f * SH_C3_0 * q[8], q9 = SH_C3_1 * q[9], q10 = -SH_C3_2 * q[10];
        const float q11 = 3.0f * SH_C3_3 * q[11], q12 = -SH_C3_2 * q[12], q13 = SH_C3_4 * q[13];
        const float q14 = -3.0f * SH_C3_0 * q[14];
        const float xx = d.x * d.x, yy = d.y * d.y, zz = d.z * d.z;
        const float xy = d.x * d.y, xy2 = 2.0f * xy, xz2 = 2.0f * d.x * d.z, yz2 = 2.0f * d.y * d.z;
        g.x += q8 * xy2 + q9 * d.y * d.z - q10 * xy2 - q11 * xz2 + q12 * (4.0f * zz - 3.0f * xx - yy) + q13 * xz2 +
               q14 * (xx - yy);
        g.y += q8 * (xx - yy) + q9 * d.x * d.z + q10 * (4.0f * zz - xx - 3.0f * yy) - q11 * yz2 - q12 * xy2 -
               q13 * yz2 - q14 * xy2;
        g.z += q9 * xy + 4.0f * q10 * yz2 + q11 * (zz + zz - xx - yy) + 4.0f * q12 * xz2 + q13 * (xx - yy);
    }
    return g;
}
