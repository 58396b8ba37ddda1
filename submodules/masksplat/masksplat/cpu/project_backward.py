# SPDX-License-Identifier: Apache-2.0
"""Gradient of projection, for eight Gaussians at a time: from ten values per splat to the parameters.

Everything is recomputed from the parameters; nothing is stored by the forward.
"""

from __future__ import annotations

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
    image_turn,
    jacobian_terms,
    mean_of,
    rotation,
    unit_quaternion,
    view_direction,
    world_turn,
)
from masksplat.cpu.kernel import allocating, device, kernel
from masksplat.cpu.lanes import (
    COEFFICIENTS,
    column,
    fill_batch,
    group_start,
    load_transposed,
    read_rows,
    store_eight,
)
from masksplat.cpu.simd import LANES, broadcast, load, select_gt, square_root, store
from masksplat.cpu.spherical_harmonics import (
    C0,
    coefficient_gradient,
    colour_of,
    direction_gradient,
    times,
    write_basis,
)

MEAN, QUAT, SCALE, OPACITY, MASK, SH0, NUM_SMALL = 0, 3, 7, 10, 11, 12, 15
"""Vectors of a batch's gradients, all but those of shN, in scratch."""

BASES = 16


@allocating
def backward_scratch(means):
    """(basis, coefficients, small) for `batch_backward`: vectors, one after the other."""
    return (
        np.empty(BASES * LANES, means.dtype),
        np.empty((COEFFICIENTS + LANES) * LANES, means.dtype),
        np.empty(NUM_SMALL * LANES, means.dtype),
    )


@device
def chunk_backward(
    first, count, base, gaussian, flat_shN, cameras, limits, flags, slots, d_rows, scratch, batches, gradients
):
    """Add the gradients of the Gaussians first, ..., first + count - 1, summed over the views, to `gradients`.

    `gradients` are flat arrays of means, quats, scales, opacities, sh0, shN and masks, their first row that of
    Gaussian `base`. `gaussian` is (means, quats, scales, opacities, sh0, shN), `scratch` comes from
    `backward_scratch`, `batches` is (visible rows (count,), rows in the lanes (8,), their splats (8,)) as work space.
    """
    visible, index, splat_index = batches
    for view in range(cameras.shape[0]):
        num_visible = 0
        for k in range(count):
            if slots[view, first + k] >= 0:
                visible[num_visible] = first + k
                num_visible += 1
        camera = cameras[view]
        for start in range(0, num_visible, LANES):
            lanes = min(LANES, num_visible - start)
            fill_batch(index, visible, start, lanes)
            for lane in range(LANES):
                splat_index[lane] = slots[view, index[lane]]
            batch_backward(gaussian, flat_shN, index, splat_index, camera, limits, flags, d_rows, scratch)
            add_batch(index, base, lanes, flags[0], 3 * gaussian[5].shape[1], scratch, gradients)


@device
def batch_backward(gaussian, flat_shN, index, splat_index, camera, limits, flags, d_rows, scratch):
    """Gradients of eight Gaussians from the gradients of their splats, into scratch."""
    basis, coefficients, small = scratch
    means, sh0, shN = gaussian[0], gaussian[4], gaussian[5]
    turn, mean = world_turn(camera), mean_of(means, index)
    d_mean = colour_backward(
        sh0, shN, flat_shN, index, splat_index, camera, mean, flags[0], d_rows, basis, coefficients, small
    )
    d_camera = geometry_backward(gaussian, index, splat_index, camera, turn, mean, limits[2], flags, d_rows, small)
    for c in range(3):
        through = turn[c] * d_camera[0] + turn[3 + c] * d_camera[1] + turn[6 + c] * d_camera[2]
        store(small, (MEAN + c) * LANES, d_mean[c] + through)
    store(small, MASK * LANES, column(d_rows, splat_index, 9))


@device
def colour_backward(sh0, shN, flat_shN, index, splat_index, camera, mean, degree, d_rows, basis, coefficients, small):
    """SH gradients into scratch; returns the mean's gradient through the viewing direction."""
    d_red, d_green, d_blue = (
        column(d_rows, splat_index, 6),
        column(d_rows, splat_index, 7),
        column(d_rows, splat_index, 8),
    )
    zero = d_red - d_red
    if degree < 0:
        store(small, SH0 * LANES, d_red)
        store(small, (SH0 + 1) * LANES, d_green)
        store(small, (SH0 + 2) * LANES, d_blue)
        return zero, zero, zero
    x, y, z, inverse = view_direction(camera, mean)
    write_basis(basis, degree, x, y, z)
    read_rows(flat_shN, 3 * shN.shape[1], index, 3 * ((degree + 1) * (degree + 1) - 1), coefficients)
    red, green, blue = column(sh0, index, 0), column(sh0, index, 1), column(sh0, index, 2)
    red, green, blue = colour_of(basis, coefficients, degree, red, green, blue)
    # Channels clamped at 0 have no gradient.
    clamp = broadcast(d_rows.dtype.type(-0.5))
    d_red = select_gt(red, clamp, d_red, zero)
    d_green, d_blue = select_gt(green, clamp, d_green, zero), select_gt(blue, clamp, d_blue, zero)
    store(small, SH0 * LANES, times(d_rows, C0, d_red))
    store(small, (SH0 + 1) * LANES, times(d_rows, C0, d_green))
    store(small, (SH0 + 2) * LANES, times(d_rows, C0, d_blue))
    coefficient_gradient(basis, coefficients, degree, d_red, d_green, d_blue)
    dx, dy, dz = direction_gradient(basis, degree, x, y, z)
    along = dx * x + dy * y + dz * z
    return (dx - along * x) * inverse, (dy - along * y) * inverse, (dz - along * z) * inverse


@device
def geometry_backward(gaussian, index, splat_index, camera, turn, mean, eps, flags, d_rows, small):
    """Quaternion, scale and opacity into scratch; returns the gradient of the camera-space mean."""
    one, eps2d = broadcast(d_rows.dtype.type(1)), broadcast(eps)
    x, y, z = camera_point(camera, turn, mean)
    inverse_z = one / z
    quaternion = unit_quaternion(gaussian[1], index)
    turned, scale = rotation(one, quaternion), activated_scale(gaussian[2], index, flags[1])
    terms = jacobian_terms(camera, x, y, inverse_z)
    m = image_turn(terms, turn)
    half = half_projection(m, turned, scale)
    cov = covariance_2d(half)
    before, after = determinants(half, cov, eps2d)
    d_cov = covariance_backward(cov, eps2d, one / after, d_rows, splat_index)
    d_opacity = column(d_rows, splat_index, 5)
    opacity = activated_opacity(gaussian[3], index, flags[1])
    if flags[2]:
        d_opacity, d_cov = antialias_backward(cov, before, after, eps2d, opacity, d_opacity, d_cov)
    store(small, OPACITY * LANES, d_opacity if flags[1] else d_opacity * opacity * (one - opacity))
    d_half = half_backward(half, d_cov)
    d_turned = turned_backward(m, d_half)
    for k in range(3):
        d_scale = d_turned[k] * turned[k] + d_turned[3 + k] * turned[3 + k] + d_turned[6 + k] * turned[6 + k]
        store(small, (SCALE + k) * LANES, d_scale if flags[1] else d_scale * scale[k])
    quaternion_backward(quaternion, d_turned, scale, small)
    return camera_backward(camera, terms, turn, turned, scale, d_half, d_rows, splat_index, x, y, inverse_z)


@device
def covariance_backward(cov, eps2d, inverse, d_rows, splat_index):
    """dL/d(xx, xy, yy) from dL/dconic: -K G K with K the conic and G the symmetric gradient."""
    zero = inverse - inverse
    a, b, c = (cov[2] + eps2d) * inverse, zero - cov[1] * inverse, (cov[0] + eps2d) * inverse
    g0, g2 = column(d_rows, splat_index, 2), column(d_rows, splat_index, 4)
    g1 = broadcast(d_rows.dtype.type(0.5)) * column(d_rows, splat_index, 3)
    r0, r1 = a * g0 + b * g1, a * g1 + b * g2
    s0, s1 = b * g0 + c * g1, b * g1 + c * g2
    xy = r0 * b + r1 * c
    return zero - (r0 * a + r1 * b), zero - (xy + xy), zero - (s0 * b + s1 * c)


@device
def antialias_backward(cov, before, after, eps2d, opacity, d_opacity, d_cov):
    """(dL/dopacity, dL/dcov) through opacity * sqrt(det(cov) / det(cov + eps2d I)); 0 where the first vanishes."""
    zero = before - before
    factor = square_root(before / after)
    shared = d_opacity * opacity * factor
    half_before = select_gt(before, zero, shared / (before + before), zero)
    half_after = zero - shared / (after + after)
    both = half_before + half_after
    d_xy = (both + both) * cov[1]
    return d_opacity * factor, (
        d_cov[0] + both * cov[2] + half_after * eps2d,
        d_cov[1] - d_xy,
        d_cov[2] + both * cov[0] + half_after * eps2d,
    )


@device
def half_backward(half, d_cov):
    """dL/dhalf (6 vectors) from cov = half half^T."""
    two_xx, xy, two_yy = d_cov[0] + d_cov[0], d_cov[1], d_cov[2] + d_cov[2]
    return (
        two_xx * half[0] + xy * half[3], two_xx * half[1] + xy * half[4], two_xx * half[2] + xy * half[5],
        xy * half[0] + two_yy * half[3], xy * half[1] + two_yy * half[4], xy * half[2] + two_yy * half[5],
    )  # fmt: skip


@device
def camera_backward(camera, terms, turn, turned, scale, d_half, d_rows, splat_index, x, y, inverse_z):
    """dL/d(camera point) through the 2D mean and through the Jacobian's dependence on the point."""
    j00, j02, j11, j12 = terms
    zero = j00 - j00
    d00, d02, d11, d12 = zero, zero, zero, zero
    for k in range(3):  # dJ = d_half (W R S)^T
        m0 = (turn[0] * turned[k] + turn[1] * turned[3 + k] + turn[2] * turned[6 + k]) * scale[k]
        m1 = (turn[3] * turned[k] + turn[4] * turned[3 + k] + turn[5] * turned[6 + k]) * scale[k]
        m2 = (turn[6] * turned[k] + turn[7] * turned[3 + k] + turn[8] * turned[6 + k]) * scale[k]
        d00, d02 = d00 + d_half[k] * m0, d02 + d_half[k] * m2
        d11, d12 = d11 + d_half[3 + k] * m1, d12 + d_half[3 + k] * m2
    d_z = zero - (j00 * d00 + j02 * d02 + j11 * d11 + j12 * d12) * inverse_z
    # The 2D mean uses the unclamped ratio, J the clamped one.
    ratio_x, ratio_y = x * inverse_z, y * inverse_z
    d_u = inside(camera, X_LOW, X_HIGH, ratio_x, zero - j00 * d02, zero)
    d_v = inside(camera, Y_LOW, Y_HIGH, ratio_y, zero - j11 * d12, zero)
    d_ratio_x = broadcast(camera[FX]) * column(d_rows, splat_index, 0) + d_u
    d_ratio_y = broadcast(camera[FY]) * column(d_rows, splat_index, 1) + d_v
    d_z = d_z - (d_ratio_x * ratio_x + d_ratio_y * ratio_y) * inverse_z
    return d_ratio_x * inverse_z, d_ratio_y * inverse_z, d_z


@device
def inside(camera, low, high, ratio, value, zero):
    """`value` where the ratio lies strictly between the camera's clamps, else 0."""
    above = select_gt(ratio, broadcast(camera[low]), value, zero)
    return select_gt(broadcast(camera[high]), ratio, above, zero)


@device
def turned_backward(m, d_half):
    """(J W)^T d_half, (3, 3) row-major: dL/d(R S), so that column k times scale k is dL/dR."""
    return (
        m[0] * d_half[0] + m[3] * d_half[3], m[0] * d_half[1] + m[3] * d_half[4], m[0] * d_half[2] + m[3] * d_half[5],
        m[1] * d_half[0] + m[4] * d_half[3], m[1] * d_half[1] + m[4] * d_half[4], m[1] * d_half[2] + m[4] * d_half[5],
        m[2] * d_half[0] + m[5] * d_half[3], m[2] * d_half[1] + m[5] * d_half[4], m[2] * d_half[2] + m[5] * d_half[5],
    )  # fmt: skip


@device
def quaternion_backward(quaternion, d_turned, scale, small):
    """dL/dquat through the rotation matrix and the normalisation, into scratch."""
    w, x, y, z, inverse = quaternion
    r00, r01, r02 = d_turned[0] * scale[0], d_turned[1] * scale[1], d_turned[2] * scale[2]
    r10, r11, r12 = d_turned[3] * scale[0], d_turned[4] * scale[1], d_turned[5] * scale[2]
    r20, r21, r22 = d_turned[6] * scale[0], d_turned[7] * scale[1], d_turned[8] * scale[2]
    half_w = x * (r21 - r12) + y * (r02 - r20) + z * (r10 - r01)
    half_x = y * (r01 + r10) + z * (r02 + r20) + w * (r21 - r12) - (x + x) * (r11 + r22)
    half_y = x * (r01 + r10) + z * (r12 + r21) + w * (r02 - r20) - (y + y) * (r00 + r22)
    half_z = x * (r02 + r20) + y * (r12 + r21) + w * (r10 - r01) - (z + z) * (r00 + r11)
    along = w * half_w + x * half_x + y * half_y + z * half_z
    twice = inverse + inverse
    store(small, QUAT * LANES, (half_w - along * w) * twice)
    store(small, (QUAT + 1) * LANES, (half_x - along * x) * twice)
    store(small, (QUAT + 2) * LANES, (half_y - along * y) * twice)
    store(small, (QUAT + 3) * LANES, (half_z - along * z) * twice)


@device
def add_batch(index, base, count, degree, width, scratch, gradients):
    """Add the first `count` lanes of the scratch to their rows; rows of shN have `width` numbers."""
    _, coefficients, small = scratch
    add_columns(index, base, count, small, MEAN, 3, gradients[0])
    add_columns(index, base, count, small, QUAT, 4, gradients[1])
    add_columns(index, base, count, small, SCALE, 3, gradients[2])
    add_columns(index, base, count, small, OPACITY, 1, gradients[3])
    add_columns(index, base, count, small, SH0, 3, gradients[4])
    add_columns(index, base, count, small, MASK, 1, gradients[6])
    num_active = 3 * ((degree + 1) * (degree + 1) - 1) if degree > 0 else 0
    spare = COEFFICIENTS * LANES
    for group in range((num_active + LANES - 1) // LANES):
        start = group_start(group, width)
        blank(coefficients, start, group * LANES)  # added with the group before
        blank(coefficients, num_active, start + LANES)  # coefficients of degrees that are not in use yet
        store_eight(coefficients, spare, load_transposed(coefficients, start * LANES))
        for lane in range(count):
            at = (index[lane] - base) * width + start
            store(gradients[5], at, load(gradients[5], at) + load(coefficients, spare + lane * LANES))


@device
def add_columns(index, base, count, small, start, width, target):
    """Add `width` vectors from number `start` on to the rows of one attribute."""
    for lane in range(count):
        at = (index[lane] - base) * width
        for c in range(width):
            target[at + c] += small[(start + c) * LANES + lane]


@device
def blank(coefficients, start, stop):
    """Zero the columns [start, stop) of a batch of coefficients."""
    zero = broadcast(coefficients.dtype.type(0))
    for j in range(start, stop):
        store(coefficients, j * LANES, zero)


@kernel
def project_backward_rows(task, num_tasks, gaussian, flat_shN, cameras, limits, flags, slots, d_rows, gradients):
    """Add to `gradients` (flat: means, quats, scales, opacities, sh0, shN, masks) for the rows of this task."""
    means = gaussian[0]
    scratch = backward_scratch(means)
    start, stop = task * means.shape[0] // num_tasks, (task + 1) * means.shape[0] // num_tasks
    batches = (np.empty(stop - start, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64))
    chunk_backward(
        start, stop - start, 0, gaussian, flat_shN, cameras, limits, flags, slots, d_rows, scratch, batches, gradients
    )
