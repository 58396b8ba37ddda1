# SPDX-License-Identifier: Apache-2.0
"""Real spherical harmonics up to degree 3 in the sign convention of 3DGS, with their gradient, for eight Gaussians.

colour = sum_k basis_k(direction) * coefficient_k + 0.5, clamped at 0. Vectors of the bases and of the coefficients
3 (k - 1) + channel lie one after the other in scratch arrays, eight lanes each.
"""

from __future__ import annotations

from masksplat.cpu.kernel import device
from masksplat.cpu.simd import LANES, broadcast, fma, load, store

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


@device
def times(values, factor, vector):
    """Factor * vector, with the Python number in the dtype of the array `values`."""
    return broadcast(values.dtype.type(factor)) * vector


@device
def write_basis(basis, degree, x, y, z):
    """Vectors basis[8 k :] for 1 <= k < (degree + 1)^2 at the unit direction (x, y, z); basis 0 is the constant C0."""
    if degree < 1:
        return
    store(basis, 8, times(basis, -C1, y))
    store(basis, 16, times(basis, C1, z))
    store(basis, 24, times(basis, -C1, x))
    if degree < 2:
        return
    xx, yy, zz = x * x, y * y, z * z
    store(basis, 32, times(basis, C2_0, x * y))
    store(basis, 40, times(basis, -C2_0, y * z))
    store(basis, 48, times(basis, C2_1, zz + zz - xx - yy))
    store(basis, 56, times(basis, -C2_0, x * z))
    store(basis, 64, times(basis, C2_2, xx - yy))
    if degree < 3:
        return
    three_xx, three_yy, four_zz = times(basis, 3, xx), times(basis, 3, yy), times(basis, 4, zz)
    store(basis, 72, times(basis, -C3_0, y * (three_xx - yy)))
    store(basis, 80, times(basis, C3_1, x * y * z))
    store(basis, 88, times(basis, -C3_2, y * (four_zz - xx - yy)))
    store(basis, 96, times(basis, C3_3, z * (zz + zz - three_xx - three_yy)))
    store(basis, 104, times(basis, -C3_2, x * (four_zz - xx - yy)))
    store(basis, 112, times(basis, C3_4, z * (xx - yy)))
    store(basis, 120, times(basis, -C3_0, x * (xx - three_yy)))


@device
def colour_of(basis, coefficients, degree, red, green, blue):
    """Colour before the 0.5 offset from the degree-0 coefficients (red, green, blue) and the higher ones in scratch."""
    red, green, blue = times(basis, C0, red), times(basis, C0, green), times(basis, C0, blue)
    for k in range(1, (degree + 1) * (degree + 1)):
        at = 3 * LANES * (k - 1)
        value = load(basis, LANES * k)
        red = fma(value, load(coefficients, at), red)
        green = fma(value, load(coefficients, at + LANES), green)
        blue = fma(value, load(coefficients, at + 2 * LANES), blue)
    return red, green, blue


@device
def basis_gradient(coefficients, degree, d_red, d_green, d_blue, d_basis):
    """Vectors d_basis[8 k :] = dL/dbasis_k for 1 <= k < (degree + 1)^2."""
    for k in range(1, (degree + 1) * (degree + 1)):
        at = 3 * LANES * (k - 1)
        total = fma(load(coefficients, at + LANES), d_green, load(coefficients, at) * d_red)
        store(d_basis, LANES * k, fma(load(coefficients, at + 2 * LANES), d_blue, total))


@device
def direction_gradient(d_basis, degree, x, y, z):
    """dL/d(x, y, z), before the direction's normalisation, from the vectors dL/dbasis_k at d_basis[8 k :]."""
    zero = x - x
    if degree < 1:
        return zero, zero, zero
    dx, dy = times(d_basis, -C1, load(d_basis, 24)), times(d_basis, -C1, load(d_basis, 8))
    dz = times(d_basis, C1, load(d_basis, 16))
    if degree >= 2:
        q4, q5 = times(d_basis, C2_0, load(d_basis, 32)), times(d_basis, -C2_0, load(d_basis, 40))
        q6, q7 = times(d_basis, 2 * C2_1, load(d_basis, 48)), times(d_basis, -C2_0, load(d_basis, 56))
        q8 = times(d_basis, 2 * C2_2, load(d_basis, 64))
        dx = dx + y * q4 + z * q7 - x * q6 + x * q8
        dy = dy + x * q4 + z * q5 - y * q6 - y * q8
        dz = dz + y * q5 + x * q7 + z * q6 + z * q6
    if degree >= 3:
        cx, cy, cz = _cubic_gradient(d_basis, x, y, z)
        dx, dy, dz = dx + cx, dy + cy, dz + cz
    return dx, dy, dz


@device
def _cubic_gradient(d_basis, x, y, z):
    """The share of the seven bases of degree 3."""
    q9, q10 = times(d_basis, 3 * -C3_0, load(d_basis, 72)), times(d_basis, C3_1, load(d_basis, 80))
    q11, q12 = times(d_basis, -C3_2, load(d_basis, 88)), times(d_basis, 3 * C3_3, load(d_basis, 96))
    q13, q14 = times(d_basis, -C3_2, load(d_basis, 104)), times(d_basis, C3_4, load(d_basis, 112))
    q15 = times(d_basis, 3 * -C3_0, load(d_basis, 120))
    xx, yy, zz, xy = x * x, y * y, z * z, x * y
    two_xy, two_xz, two_yz = xy + xy, x * z + x * z, y * z + y * z
    four_zz = times(d_basis, 4, zz)
    dx = q9 * two_xy + q10 * y * z - q11 * two_xy - q12 * two_xz
    dx = dx + q13 * (four_zz - times(d_basis, 3, xx) - yy) + q14 * two_xz + q15 * (xx - yy)
    dy = q9 * (xx - yy) + q10 * x * z + q11 * (four_zz - xx - times(d_basis, 3, yy)) - q12 * two_yz
    dy = dy - q13 * two_xy - q14 * two_yz - q15 * two_xy
    dz = q10 * xy + times(d_basis, 4, q11 * two_yz) + q12 * (zz + zz - xx - yy)
    return dx, dy, dz + times(d_basis, 4, q13 * two_xz) + q14 * (xx - yy)
