# SPDX-License-Identifier: Apache-2.0
"""Eight Gaussians seen by one camera: the quantities that projection and its backward share (EWA, Zwicker 2001).

With camera coordinates p = W X + t, the mean is (fx x/z + cx, fy y/z + cy) and the 2D covariance
J W Sigma W^T J^T + eps2d I, where Sigma = R S S^T R^T and J is the Jacobian of the projection at p, its x/z and y/z
clamped to the image plus 15 % of its size on each side (3DGS, gsplat). Every value is a vector of eight lanes.
"""

from __future__ import annotations

from masksplat.cpu.exponential import exp
from masksplat.cpu.kernel import device
from masksplat.cpu.lanes import entry, four_columns, maximum, minimum, row_starts, three_columns
from masksplat.cpu.simd import broadcast, square_root

CAMERA_SIZE = 23
"""Floats of a packed camera: R (9, row-major), t (3), fx, fy, cx, cy, low and high clamp of x/z, of y/z, centre (3)."""

FX, FY, CX, CY = 12, 13, 14, 15
X_LOW, X_HIGH, Y_LOW, Y_HIGH = 16, 17, 18, 19
CENTRE = 20
HALF_WIDTH, HALF_HEIGHT = CAMERA_SIZE, CAMERA_SIZE + 1
"""Of the image, in pixels: behind a packed camera where gradients are asked for."""

EXP_LIMIT = 80
"""Arguments of exp are clamped here, before float32 overflows: a scale or an odds ratio of 5e34 is no scene."""


@device
def world_turn(camera):
    """The nine entries of W, row-major."""
    return (
        broadcast(camera[0]), broadcast(camera[1]), broadcast(camera[2]),
        broadcast(camera[3]), broadcast(camera[4]), broadcast(camera[5]),
        broadcast(camera[6]), broadcast(camera[7]), broadcast(camera[8]),
    )  # fmt: skip


@device
def camera_point(camera, turn, mean):
    """World points to camera coordinates."""
    x, y, z = mean
    return (
        turn[0] * x + turn[1] * y + turn[2] * z + broadcast(camera[9]),
        turn[3] * x + turn[4] * y + turn[5] * z + broadcast(camera[10]),
        turn[6] * x + turn[7] * y + turn[8] * z + broadcast(camera[11]),
    )


@device
def unit_quaternion(quats, index):
    """(w, x, y, z) after normalisation, and 1 / norm."""
    w, x, y, z = four_columns(quats, row_starts(index, 4), 0)
    inverse = broadcast(quats.dtype.type(1)) / square_root(w * w + x * x + y * y + z * z)
    return w * inverse, x * inverse, y * inverse, z * inverse, inverse


@device
def rotation(one, quaternion):
    """Rotation matrix (9 vectors, row-major) of unit quaternions."""
    w, x, y, z, _ = quaternion
    two = one + one
    return (
        one - two * (y * y + z * z), two * (x * y - w * z), two * (x * z + w * y),
        two * (x * y + w * z), one - two * (x * x + z * z), two * (y * z - w * x),
        two * (x * z - w * y), two * (y * z + w * x), one - two * (x * x + y * y),
    )  # fmt: skip


@device
def jacobian_terms(camera, x, y, inverse_z):
    """(j00, j02, j11, j12): the non-zero entries of J at the clamped x/z and y/z."""
    u = minimum(maximum(x * inverse_z, broadcast(camera[X_LOW])), broadcast(camera[X_HIGH]))
    v = minimum(maximum(y * inverse_z, broadcast(camera[Y_LOW])), broadcast(camera[Y_HIGH]))
    fx, fy = broadcast(camera[FX]) * inverse_z, broadcast(camera[FY]) * inverse_z
    zero = fx - fx
    return fx, (zero - fx) * u, fy, (zero - fy) * v


@device
def image_turn(terms, turn):
    """J W, (2, 3) as 6 vectors."""
    j00, j02, j11, j12 = terms
    return (
        j00 * turn[0] + j02 * turn[6], j00 * turn[1] + j02 * turn[7], j00 * turn[2] + j02 * turn[8],
        j11 * turn[3] + j12 * turn[6], j11 * turn[4] + j12 * turn[7], j11 * turn[5] + j12 * turn[8],
    )  # fmt: skip


@device
def half_projection(m, turned, scale):
    """J W R S, (2, 3) as 6 vectors: the square root of the 2D covariance. `m` is J W."""
    return (
        (m[0] * turned[0] + m[1] * turned[3] + m[2] * turned[6]) * scale[0],
        (m[0] * turned[1] + m[1] * turned[4] + m[2] * turned[7]) * scale[1],
        (m[0] * turned[2] + m[1] * turned[5] + m[2] * turned[8]) * scale[2],
        (m[3] * turned[0] + m[4] * turned[3] + m[5] * turned[6]) * scale[0],
        (m[3] * turned[1] + m[4] * turned[4] + m[5] * turned[7]) * scale[1],
        (m[3] * turned[2] + m[4] * turned[5] + m[5] * turned[8]) * scale[2],
    )


@device
def covariance_2d(half):
    """(xx, xy, yy) of half half^T, without the low-pass."""
    return (
        half[0] * half[0] + half[1] * half[1] + half[2] * half[2],
        half[0] * half[3] + half[1] * half[4] + half[2] * half[5],
        half[3] * half[3] + half[4] * half[4] + half[5] * half[5],
    )


@device
def cross(a, b):
    """The cross product of 3 vectors each."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@device
def determinants(half, cov, eps2d):
    """(det(cov), det(cov + eps2d I)) without cancellation: the first is the squared area of the cross product."""
    nx, ny, nz = cross(half[:3], half[3:])
    det = nx * nx + ny * ny + nz * nz
    return det, det + eps2d * (cov[0] + cov[2]) + eps2d * eps2d


@device
def activated_scale(scales, index, activated):
    """The three standard deviations in world units."""
    x, y, z = three_columns(scales, index)
    if activated:
        return x, y, z
    highest = broadcast(scales.dtype.type(EXP_LIMIT))
    return exp(minimum(x, highest)), exp(minimum(y, highest)), exp(minimum(z, highest))


@device
def activated_opacity(opacities, index, activated):
    """Opacities in [0, 1]."""
    value = entry(opacities, index)
    if activated:
        return value
    one = broadcast(opacities.dtype.type(1))
    return one / (one + exp(minimum(broadcast(opacities.dtype.type(EXP_LIMIT)), (one - one) - value)))


@device
def view_direction(camera, mean):
    """(unit direction from the camera centre to the mean, 1 / distance)."""
    dx, dy = mean[0] - broadcast(camera[CENTRE]), mean[1] - broadcast(camera[CENTRE + 1])
    dz = mean[2] - broadcast(camera[CENTRE + 2])
    inverse = broadcast(camera.dtype.type(1)) / square_root(dx * dx + dy * dy + dz * dz)
    return dx * inverse, dy * inverse, dz * inverse, inverse
