# SPDX-License-Identifier: Apache-2.0
"""Gradient of projection: from ten values per splat to the parameters of its Gaussian.

Everything is recomputed from the parameters; nothing is stored by the forward. A Gaussian's gradient is gathered in a
row of GRADIENT_COLUMNS + 3 (K - 1) floats: mean 3, quaternion 4, scale 3, opacity 1, mask 1, sh0 3, shN.
"""

from __future__ import annotations

import math

import numpy as np

from masksplat.cpu.geometry import (
    FX,
    FY,
    X_HIGH,
    X_LOW,
    Y_HIGH,
    Y_LOW,
    activated_opacity,
    activated_scale,
    camera_point,
    covariance_2d,
    determinants,
    half_projection,
    jacobian_terms,
    rotation,
    unit_quaternion,
    view_direction,
)
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.spherical_harmonics import (
    PADDED,
    coefficient_gradient,
    colour_of,
    colour_scratch,
    direction_gradient,
)

MEAN, QUAT, SCALE, OPACITY, MASK, SH0, SHN = 0, 3, 7, 10, 11, 12, 15


@device
def gaussian_backward(i, gaussian, cameras, limits, flags, slots, d_rows, scratch, out):  # type: ignore[no-untyped-def]
    """Set out to the gradient of Gaussian i summed over the views; True when some view has a splat of it.

    `gaussian` is (means, quats, scales, opacities, sh0, shN), `scratch` comes from
    `colour_scratch`; out has SHN + PADDED places.
    """
    found = False
    for k in range(out.size):
        out[k] = 0
    for view in range(cameras.shape[0]):
        slot = slots[view, i]
        if slot < 0:
            continue
        found = True
        camera = cameras[view]
        colour_backward(i, gaussian, camera, flags[0], d_rows, slot, scratch, out)
        geometry_backward(i, gaussian, camera, limits[2], flags, d_rows, slot, out)
        out[MASK] += d_rows[slot, 9]
    return found


@device
def colour_backward(i, gaussian, camera, degree, d_rows, slot, scratch, out):  # type: ignore[no-untyped-def]
    """SH coefficients and, through the viewing direction, the mean."""
    means, sh0, shN = gaussian[0], gaussian[4], gaussian[5]
    real = out.dtype.type
    d_red, d_green, d_blue = d_rows[slot, 6], d_rows[slot, 7], d_rows[slot, 8]
    if degree < 0:
        add_three(out, SH0, real(1), d_red, d_green, d_blue)
        return
    x, y, z, inverse = view_direction(camera, means, i)
    red, green, blue = colour_of(scratch, degree, sh0, shN, i, x, y, z)
    # Channels clamped at 0 have no gradient.
    d_red = d_red if red > real(-0.5) else real(0)
    d_green = d_green if green > real(-0.5) else real(0)
    d_blue = d_blue if blue > real(-0.5) else real(0)
    add_three(out, SH0, scratch[0][0], d_red, d_green, d_blue)
    coefficient_gradient(scratch, degree, d_red, d_green, d_blue, out, SHN)
    d_basis = scratch[1]
    dx, dy, dz = direction_gradient(d_basis, degree, x, y, z)
    along = dx * x + dy * y + dz * z
    add_three(out, MEAN, inverse, dx - along * x, dy - along * y, dz - along * z)


@device
def add_three(out, start, factor, a, b, c):  # type: ignore[no-untyped-def]
    """out[start : start + 3] += factor * (a, b, c)."""
    out[start] += factor * a
    out[start + 1] += factor * b
    out[start + 2] += factor * c


@device
def geometry_backward(i, gaussian, camera, eps2d, flags, d_rows, slot, out):  # type: ignore[no-untyped-def]
    """Mean, quaternion, scale and opacity from the gradients of the 2D mean, conic and opacity."""
    means, quats, scales, opacities = gaussian[0], gaussian[1], gaussian[2], gaussian[3]
    x, y, z = camera_point(camera, means, i)
    terms, turned, scale = jacobian_terms(camera, x, y, z), rotation(quats, i), activated_scale(scales, i, flags[1])
    half = half_projection(camera, terms, turned, scale)
    d_cov = covariance_backward(half, eps2d, d_rows, slot)
    d_opacity = d_rows[slot, 5]
    opacity = activated_opacity(opacities, i, flags[1])
    if flags[2]:
        d_opacity, d_cov = antialias_backward(half, eps2d, opacity, d_opacity, d_cov)
    out[OPACITY] += d_opacity if flags[1] else d_opacity * opacity * (out.dtype.type(1) - opacity)
    d_half = half_backward(half, d_cov)
    d_camera = camera_backward(camera, terms, turned, scale, d_half, d_rows, slot, x, y, z)
    for k in range(3):
        out[MEAN + k] += camera[k] * d_camera[0] + camera[3 + k] * d_camera[1] + camera[6 + k] * d_camera[2]
    shape_backward(i, quats, scale, flags[1], camera, terms, turned, d_half, out)


@device
def covariance_backward(half, eps2d, d_rows, slot):  # type: ignore[no-untyped-def]
    """dL/d(xx, xy, yy) from dL/dconic: -K G K with K the conic and G the symmetric gradient."""
    xx, xy, yy = covariance_2d(half)
    xx, yy = xx + eps2d, yy + eps2d
    inverse = d_rows.dtype.type(1) / determinants(half, eps2d)[1]
    a, b, c = yy * inverse, -xy * inverse, xx * inverse
    g0, g1, g2 = d_rows[slot, 2], d_rows.dtype.type(0.5) * d_rows[slot, 3], d_rows[slot, 4]
    r0, r1 = a * g0 + b * g1, a * g1 + b * g2
    s0, s1 = b * g0 + c * g1, b * g1 + c * g2
    return -(r0 * a + r1 * b), -d_rows.dtype.type(2) * (r0 * b + r1 * c), -(s0 * b + s1 * c)


@device
def antialias_backward(half, eps2d, opacity, d_opacity, d_cov):  # type: ignore[no-untyped-def]
    """(dL/dopacity, dL/dcov) through opacity * sqrt(det(cov) / det(cov + eps2d I))."""
    before, after = determinants(half, eps2d)
    xx, xy, yy = covariance_2d(half)
    factor = math.sqrt(before / after)
    if not factor > 0:
        return d_opacity * factor, d_cov
    shared = d_opacity * opacity * factor
    half_before, half_after = shared / (before + before), -shared / (after + after)
    both = half_before + half_after
    return d_opacity * factor, (
        d_cov[0] + both * yy + half_after * eps2d,
        d_cov[1] - (both + both) * xy,
        d_cov[2] + both * xx + half_after * eps2d,
    )


@device
def half_backward(half, d_cov):  # type: ignore[no-untyped-def]
    """dL/dhalf (6 floats) from cov = half half^T."""
    two_xx, xy, two_yy = d_cov[0] + d_cov[0], d_cov[1], d_cov[2] + d_cov[2]
    return (
        two_xx * half[0] + xy * half[3], two_xx * half[1] + xy * half[4], two_xx * half[2] + xy * half[5],
        xy * half[0] + two_yy * half[3], xy * half[1] + two_yy * half[4], xy * half[2] + two_yy * half[5],
    )  # fmt: skip


@device
def camera_backward(camera, terms, turned, scale, d_half, d_rows, slot, x, y, z):  # type: ignore[no-untyped-def]
    """dL/d(camera point) through the 2D mean and through the Jacobian's dependence on the point."""
    u, v, j00, j02, j11, j12 = terms
    real = d_rows.dtype.type
    # dJ = d_half (W R S)^T; row k of W R S is what multiplies J[., k].
    d00, d02, d11, d12 = real(0), real(0), real(0), real(0)
    for k in range(3):
        m0 = camera[0] * turned[k] + camera[1] * turned[3 + k] + camera[2] * turned[6 + k]
        m1 = camera[3] * turned[k] + camera[4] * turned[3 + k] + camera[5] * turned[6 + k]
        m2 = camera[6] * turned[k] + camera[7] * turned[3 + k] + camera[8] * turned[6 + k]
        d00 += d_half[k] * m0 * scale[k]
        d02 += d_half[k] * m2 * scale[k]
        d11 += d_half[3 + k] * m1 * scale[k]
        d12 += d_half[3 + k] * m2 * scale[k]
    inverse = real(1) / z
    d_u, d_v = -j00 * d02, -j11 * d12
    d_z = -(j00 * d00 + j02 * d02 + j11 * d11 + j12 * d12) * inverse
    # The 2D mean uses the unclamped ratio, J the clamped one.
    d_ratio_x = camera[FX] * d_rows[slot, 0] + (d_u if camera[X_LOW] < x * inverse < camera[X_HIGH] else real(0))
    d_ratio_y = camera[FY] * d_rows[slot, 1] + (d_v if camera[Y_LOW] < y * inverse < camera[Y_HIGH] else real(0))
    d_z -= (d_ratio_x * x + d_ratio_y * y) * inverse * inverse
    return d_ratio_x * inverse, d_ratio_y * inverse, d_z


@device
def shape_backward(i, quats, scale, activated, camera, terms, turned, d_half, out):  # type: ignore[no-untyped-def]
    """Scale and quaternion from dL/dhalf: half = (J W) R S."""
    d_turned = _turned_gradient(camera, terms, d_half)
    for k in range(3):
        d_scale = d_turned[k] * turned[k] + d_turned[3 + k] * turned[3 + k] + d_turned[6 + k] * turned[6 + k]
        out[SCALE + k] += d_scale if activated else d_scale * scale[k]
    quaternion_backward(i, quats, d_turned, scale, out)


@device
def _turned_gradient(camera, terms, d_half):  # type: ignore[no-untyped-def]
    """(J W)^T d_half, (3, 3) row-major: dL/d(R S), so that column k times scale k is dL/dR."""
    _, _, j00, j02, j11, j12 = terms
    m00, m01, m02 = (
        j00 * camera[0] + j02 * camera[6],
        j00 * camera[1] + j02 * camera[7],
        j00 * camera[2] + j02 * camera[8],
    )
    m10, m11, m12 = (
        j11 * camera[3] + j12 * camera[6],
        j11 * camera[4] + j12 * camera[7],
        j11 * camera[5] + j12 * camera[8],
    )
    return (
        m00 * d_half[0] + m10 * d_half[3], m00 * d_half[1] + m10 * d_half[4], m00 * d_half[2] + m10 * d_half[5],
        m01 * d_half[0] + m11 * d_half[3], m01 * d_half[1] + m11 * d_half[4], m01 * d_half[2] + m11 * d_half[5],
        m02 * d_half[0] + m12 * d_half[3], m02 * d_half[1] + m12 * d_half[4], m02 * d_half[2] + m12 * d_half[5],
    )  # fmt: skip


@device
def quaternion_backward(i, quats, d_turned, scale, out):  # type: ignore[no-untyped-def]
    """dL/dquat through the rotation matrix and the normalisation."""
    w, x, y, z, inverse = unit_quaternion(quats, i)
    r00, r01, r02 = d_turned[0] * scale[0], d_turned[1] * scale[1], d_turned[2] * scale[2]
    r10, r11, r12 = d_turned[3] * scale[0], d_turned[4] * scale[1], d_turned[5] * scale[2]
    r20, r21, r22 = d_turned[6] * scale[0], d_turned[7] * scale[1], d_turned[8] * scale[2]
    two = out.dtype.type(2)
    d_w = two * (x * (r21 - r12) + y * (r02 - r20) + z * (r10 - r01))
    d_x = two * (y * (r01 + r10) + z * (r02 + r20) + w * (r21 - r12) - two * x * (r11 + r22))
    d_y = two * (x * (r01 + r10) + z * (r12 + r21) + w * (r02 - r20) - two * y * (r00 + r22))
    d_z = two * (x * (r02 + r20) + y * (r12 + r21) + w * (r10 - r01) - two * z * (r00 + r11))
    along = w * d_w + x * d_x + y * d_y + z * d_z
    out[QUAT] += (d_w - along * w) * inverse
    out[QUAT + 1] += (d_x - along * x) * inverse
    out[QUAT + 2] += (d_y - along * y) * inverse
    out[QUAT + 3] += (d_z - along * z) * inverse


@kernel
def project_backward_rows(task, num_tasks, gaussian, cameras, limits, flags, slots, d_rows, gradients):  # type: ignore[no-untyped-def]
    """Fill `gradients` (means, quats, scales, opacities, sh0, shN, masks) for the rows of this task."""
    means, shN = gaussian[0], gaussian[5]
    scratch = colour_scratch(means)
    out = np.empty(SHN + PADDED, means.dtype)
    for i in range(task * means.shape[0] // num_tasks, (task + 1) * means.shape[0] // num_tasks):
        gaussian_backward(i, gaussian, cameras, limits, flags, slots, d_rows, scratch, out)
        gradients[0][i, :] = out[MEAN:QUAT]
        gradients[1][i, :] = out[QUAT:SCALE]
        gradients[2][i, :] = out[SCALE:OPACITY]
        gradients[3][i] = out[OPACITY]
        gradients[4][i, :] = out[SH0:SHN]
        for k in range(shN.shape[1]):
            for c in range(3):
                gradients[5][i, k, c] = out[SHN + 3 * k + c]
        gradients[6][i] = out[MASK]
