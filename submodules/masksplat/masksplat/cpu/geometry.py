# SPDX-License-Identifier: Apache-2.0
"""One Gaussian seen by one camera: the forward quantities that projection and its backward share (EWA, Zwicker 2001).

With camera coordinates p = W X + t, the mean is (fx x/z + cx, fy y/z + cy) and the 2D covariance
J W Sigma W^T J^T + eps2d I, where Sigma = R S S^T R^T and J is the Jacobian of the projection at p, its x/z and y/z
clamped to the image plus 15 % of its size on each side (3DGS, gsplat).
"""

from __future__ import annotations

import math

from masksplat.cpu.kernel import device

CAMERA_SIZE = 23
"""Floats of a packed camera: R (9, row-major), t (3), fx, fy, cx, cy, low and high clamp of x/z, of y/z, centre (3)."""

FX, FY, CX, CY = 12, 13, 14, 15
X_LOW, X_HIGH, Y_LOW, Y_HIGH = 16, 17, 18, 19


@device
def camera_point(camera, means, i):  # type: ignore[no-untyped-def]
    """Mean of Gaussian i in camera coordinates."""
    x, y, z = means[i, 0], means[i, 1], means[i, 2]
    return (
        camera[0] * x + camera[1] * y + camera[2] * z + camera[9],
        camera[3] * x + camera[4] * y + camera[5] * z + camera[10],
        camera[6] * x + camera[7] * y + camera[8] * z + camera[11],
    )


@device
def unit_quaternion(quats, i):  # type: ignore[no-untyped-def]
    """(w, x, y, z) of Gaussian i after normalisation, and 1 / norm."""
    w, x, y, z = quats[i, 0], quats[i, 1], quats[i, 2], quats[i, 3]
    inverse = quats.dtype.type(1) / math.sqrt(w * w + x * x + y * y + z * z)
    return w * inverse, x * inverse, y * inverse, z * inverse, inverse


@device
def rotation(quats, i):  # type: ignore[no-untyped-def]
    """Rotation matrix (9 floats, row-major) of Gaussian i: its quaternion (w, x, y, z), normalised."""
    one, two = quats.dtype.type(1), quats.dtype.type(2)
    w, x, y, z, _ = unit_quaternion(quats, i)
    return (
        one - two * (y * y + z * z), two * (x * y - w * z), two * (x * z + w * y),
        two * (x * y + w * z), one - two * (x * x + z * z), two * (y * z - w * x),
        two * (x * z - w * y), two * (y * z + w * x), one - two * (x * x + y * y),
    )  # fmt: skip


@device
def jacobian_terms(camera, x, y, z):  # type: ignore[no-untyped-def]
    """(u, v, j00, j02, j11, j12): the clamped x/z and y/z, and the non-zero entries of J."""
    inverse = camera.dtype.type(1) / z
    u = min(max(x * inverse, camera[X_LOW]), camera[X_HIGH])
    v = min(max(y * inverse, camera[Y_LOW]), camera[Y_HIGH])
    fx, fy = camera[FX] * inverse, camera[FY] * inverse
    return u, v, fx, -fx * u, fy, -fy * v


@device
def half_projection(camera, terms, turned, scale):  # type: ignore[no-untyped-def]
    """J W R S, (2, 3) as 6 floats: the square root of the 2D covariance."""
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
        (m00 * turned[0] + m01 * turned[3] + m02 * turned[6]) * scale[0],
        (m00 * turned[1] + m01 * turned[4] + m02 * turned[7]) * scale[1],
        (m00 * turned[2] + m01 * turned[5] + m02 * turned[8]) * scale[2],
        (m10 * turned[0] + m11 * turned[3] + m12 * turned[6]) * scale[0],
        (m10 * turned[1] + m11 * turned[4] + m12 * turned[7]) * scale[1],
        (m10 * turned[2] + m11 * turned[5] + m12 * turned[8]) * scale[2],
    )


@device
def covariance_2d(half):  # type: ignore[no-untyped-def]
    """(xx, xy, yy) of half half^T, without the low-pass."""
    return (
        half[0] * half[0] + half[1] * half[1] + half[2] * half[2],
        half[0] * half[3] + half[1] * half[4] + half[2] * half[5],
        half[3] * half[3] + half[4] * half[4] + half[5] * half[5],
    )


@device
def determinants(half, eps2d):  # type: ignore[no-untyped-def]
    """(det(cov), det(cov + eps2d I)) without cancellation: the first is the squared area of the cross product."""
    nx = half[1] * half[5] - half[2] * half[4]
    ny = half[2] * half[3] - half[0] * half[5]
    nz = half[0] * half[4] - half[1] * half[3]
    det = nx * nx + ny * ny + nz * nz
    xx, _, yy = covariance_2d(half)
    return det, det + eps2d * (xx + yy) + eps2d * eps2d


@device
def activated_scale(scales, i, activated):  # type: ignore[no-untyped-def]
    """The three standard deviations of Gaussian i in world units."""
    if activated:
        return scales[i, 0], scales[i, 1], scales[i, 2]
    return math.exp(scales[i, 0]), math.exp(scales[i, 1]), math.exp(scales[i, 2])


@device
def activated_opacity(opacities, i, activated):  # type: ignore[no-untyped-def]
    """Opacity of Gaussian i in [0, 1]."""
    one = opacities.dtype.type(1)
    return opacities[i] if activated else one / (one + math.exp(-opacities[i]))


@device
def view_direction(camera, means, i):  # type: ignore[no-untyped-def]
    """(unit direction from the camera centre to the mean, 1 / distance)."""
    dx, dy, dz = means[i, 0] - camera[20], means[i, 1] - camera[21], means[i, 2] - camera[22]
    inverse = means.dtype.type(1) / math.sqrt(dx * dx + dy * dy + dz * dz)
    return dx * inverse, dy * inverse, dz * inverse, inverse
