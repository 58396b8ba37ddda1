# SPDX-License-Identifier: Apache-2.0
"""Real spherical harmonics up to degree 3 in the sign convention of 3DGS, with their gradient.

basis[0] is the constant; colour = sum_k basis[k](direction) * coefficient[k] + 0.5, clamped at 0.
"""

from __future__ import annotations

import numpy as np

from masksplat.cpu.kernel import device
from masksplat.cpu.simd import LANES, load, store

C0 = 0.28209479177387814  # sqrt(1 / (4 pi))
C1 = 0.4886025119029199  # sqrt(3 / (4 pi))
C2_0 = 1.0925484305920792  # sqrt(15 / (4 pi))
C2_1 = 0.31539156525252005  # sqrt(5 / (16 pi))
C2_2 = 0.5462742152960396  # sqrt(15 / (16 pi))
C3_0 = 0.5900435899266435  # sqrt(35 / (32 pi))
C3_1 = 2.890611442640554  # sqrt(105 / (4 pi))
C3_2 = 0.4570457994644658  # sqrt(21 / (32 pi))
C3_3 = 0.3731763325901154  # sqrt(7 / (16 pi))
C3_4 = 1.445305721320277  # sqrt(105 / (16 pi))


PADDED = 48
"""A row of shN, 3 (K - 1) <= 45 coefficients (r, g, b of every basis), in whole vectors."""

PERIOD = 24
"""Coefficients after which vectors meet the same channel in the same lane."""


@device
def colour_scratch(array):  # type: ignore[no-untyped-def]
    """(basis, d_basis, coefficients, expanded, tiled, products) for one Gaussian at a time; padding stays 0."""
    dtype = array.dtype
    return (
        np.empty(16, dtype),
        np.empty(16, dtype),
        np.zeros(PADDED, dtype),
        np.zeros(PADDED, dtype),
        np.zeros(PERIOD, dtype),
        np.zeros(PADDED, dtype),
    )


@device
def colour_of(scratch, degree, sh0, shN, i, x, y, z):  # type: ignore[no-untyped-def]
    """Colour before the 0.5 offset at the unit direction; leaves basis, coefficients and expanded basis in scratch."""
    basis, _, coefficients, expanded, _, products = scratch
    write_basis(basis, degree, x, y, z)
    count = (degree + 1) * (degree + 1)
    for k in range(count - 1):
        for c in range(3):
            coefficients[3 * k + c] = shN[i, k, c]
            expanded[3 * k + c] = basis[k + 1]
    for lane in range(0, PERIOD, LANES):
        total = load(expanded, lane) * load(coefficients, lane)
        total = total + load(expanded, lane + PERIOD) * load(coefficients, lane + PERIOD)
        store(products, lane, total)
    red, green, blue = basis[0] * sh0[i, 0], basis[0] * sh0[i, 1], basis[0] * sh0[i, 2]
    for k in range(0, PERIOD, 3):
        red, green, blue = red + products[k], green + products[k + 1], blue + products[k + 2]
    return red, green, blue


@device
def coefficient_gradient(scratch, degree, d_red, d_green, d_blue, out, start):  # type: ignore[no-untyped-def]
    """Add dL/dshN to out[start : start + PADDED] and set d_basis, after `colour_of` of the same Gaussian."""
    _, d_basis, coefficients, expanded, tiled, products = scratch
    for k in range(0, PERIOD, 3):
        tiled[k], tiled[k + 1], tiled[k + 2] = d_red, d_green, d_blue
    for j in range(0, PADDED, LANES):
        d_colour = load(tiled, j % PERIOD)
        store(out, start + j, load(out, start + j) + load(expanded, j) * d_colour)
        store(products, j, load(coefficients, j) * d_colour)
    for k in range(1, (degree + 1) * (degree + 1)):
        d_basis[k] = products[3 * k - 3] + products[3 * k - 2] + products[3 * k - 1]


@device
def write_basis(basis, degree, x, y, z):  # type: ignore[no-untyped-def]
    """basis[0 .. (degree + 1)^2 - 1] at the unit direction (x, y, z)."""
    real = basis.dtype.type
    basis[0] = real(C0)
    if degree < 1:
        return
    basis[1], basis[2], basis[3] = real(-C1) * y, real(C1) * z, real(-C1) * x
    if degree < 2:
        return
    xx, yy, zz = x * x, y * y, z * z
    basis[4], basis[5] = real(C2_0) * x * y, real(-C2_0) * y * z
    basis[6] = real(C2_1) * (real(2) * zz - xx - yy)
    basis[7], basis[8] = real(-C2_0) * x * z, real(C2_2) * (xx - yy)
    if degree < 3:
        return
    basis[9] = real(-C3_0) * y * (real(3) * xx - yy)
    basis[10] = real(C3_1) * x * y * z
    basis[11] = real(-C3_2) * y * (real(4) * zz - xx - yy)
    basis[12] = real(C3_3) * z * (real(2) * zz - real(3) * xx - real(3) * yy)
    basis[13] = real(-C3_2) * x * (real(4) * zz - xx - yy)
    basis[14] = real(C3_4) * z * (xx - yy)
    basis[15] = real(-C3_0) * x * (xx - real(3) * yy)


@device
def direction_gradient(d_basis, degree, x, y, z):  # type: ignore[no-untyped-def]
    """dL/d(x, y, z) from d_basis[k] = dL/dbasis[k], before the direction's normalisation."""
    real = d_basis.dtype.type
    dx, dy, dz = real(0), real(0), real(0)
    if degree < 1:
        return dx, dy, dz
    dx, dy, dz = real(-C1) * d_basis[3], real(-C1) * d_basis[1], real(C1) * d_basis[2]
    if degree < 2:
        return dx, dy, dz
    two, three, four, six = real(2), real(3), real(4), real(6)
    p0, p1, p2 = real(C2_0), real(C2_1) * d_basis[6], real(C2_2) * d_basis[8]
    dx += p0 * (y * d_basis[4] - z * d_basis[7]) - two * x * p1 + two * x * p2
    dy += p0 * (x * d_basis[4] - z * d_basis[5]) - two * y * p1 - two * y * p2
    dz += p0 * (-y * d_basis[5] - x * d_basis[7]) + four * z * p1
    if degree < 3:
        return dx, dy, dz
    xx, yy, zz = x * x, y * y, z * z
    q9, q10, q11 = real(-C3_0) * d_basis[9], real(C3_1) * d_basis[10], real(-C3_2) * d_basis[11]
    q12, q13, q14 = real(C3_3) * d_basis[12], real(-C3_2) * d_basis[13], real(C3_4) * d_basis[14]
    q15 = real(-C3_0) * d_basis[15]
    dx += q9 * six * x * y + q10 * y * z - q11 * two * x * y - q12 * six * x * z
    dx += q13 * (four * zz - three * xx - yy) + q14 * two * x * z + q15 * three * (xx - yy)
    dy += q9 * three * (xx - yy) + q10 * x * z + q11 * (four * zz - xx - three * yy) - q12 * six * y * z
    dy += -q13 * two * x * y - q14 * two * y * z - q15 * six * x * y
    dz += q10 * x * y + q11 * real(8) * y * z + q12 * three * (two * zz - xx - yy)
    dz += q13 * real(8) * x * z + q14 * (xx - yy)
    return dx, dy, dz
