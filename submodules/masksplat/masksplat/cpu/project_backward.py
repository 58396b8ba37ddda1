# SPDX-License-Identifier: Apache-2.0
"""Gradient of projection, for eight Gaussians at a time: from ten values per splat to the parameters.

What the forward left in a splat's row (conic, opacity, colour) is read there; everything else is recomputed.
"""

from __future__ import annotations

import numpy as np

from masksplat.cpu.geometry import (
    FX,
    FY,
    HALF_HEIGHT,
    HALF_WIDTH,
    X_HIGH,
    X_LOW,
    Y_HIGH,
    Y_LOW,
    activated_opacity,
    activated_scale,
    camera_point,
    covariance_2d,
    cross,
    determinants,
    half_projection,
    image_turn,
    jacobian_terms,
    rotation,
    unit_quaternion,
    view_direction,
    world_turn,
)
from masksplat.cpu.kernel import allocating, device, kernel
from masksplat.cpu.lanes import (
    COEFFICIENTS,
    fill_batch,
    four_columns,
    load_transposed,
    read_rows,
    row_starts,
    store_eight,
    three_columns,
)
from masksplat.cpu.simd import (
    LANES,
    broadcast,
    cycle_of_three,
    load,
    repeated_thrice,
    select_gt,
    square_root,
    store,
)
from masksplat.cpu.spherical_harmonics import C0, basis_gradient, direction_gradient, times, write_basis
from masksplat.types import NUM_ROW_COLUMNS

MEAN, QUAT, SCALE, OPACITY, SH0, MASK, NORM, NUM_SMALL = 0, 3, 7, 10, 11, 14, 15, 16
"""Vectors of a batch's gradients, all but those of shN, in scratch; NORM is that of the mean's in NDC."""

BASES = 16

ROWS_PER_CHUNK = 512
"""Rows whose gradients are gathered before somebody takes them.

They fit the L2 cache (125 kB in float32), and malloc has them at hand: it would ask the system for more than 128 kB in
one piece, page by page and in every task. Fewer rows are shorter stretches of each of the 18 arrays of an update than
memory is read well in: with 64, a dense update takes 1.4 times as long.
"""

NUM_ATTRIBUTES = 6
"""means, quats, scales, opacities, sh0, shN: the order of every tuple here."""

SHN = 5
"""Place of shN among them, the attribute whose rows may be behind."""

MASKS, NORMS = 6, 7
"""Places in the gradients of a chunk behind the attributes."""


@allocating
def backward_scratch(real):
    """(basis, d_basis, coefficients, small, spread) for `batch_backward`: vectors, one after the other."""
    return (
        np.zeros((BASES + 1) * LANES, real),  # the last is 0 and stays it
        np.empty(BASES * LANES, real),
        np.empty(COEFFICIENTS * LANES, real),
        np.empty(NUM_SMALL * LANES, real),
        np.empty((2 * LANES + 3) * LANES, real),
    )


@allocating
def chunk_space(real, width):
    """(gradients of a chunk, visible rows, rows in the lanes, their splats) for `chunk_backward`.

    Gradients are flat arrays of means, quats, scales, opacities, sh0, shN, whose rows have `width` numbers, masks, and
    the norms of 3DGS's densify statistics. That of shN is longer than its rows, which are written in whole vectors.
    """
    gradients = (
        np.empty(ROWS_PER_CHUNK * 3, real),
        np.empty(ROWS_PER_CHUNK * 4, real),
        np.empty(ROWS_PER_CHUNK * 3, real),
        np.empty(ROWS_PER_CHUNK, real),
        np.empty(ROWS_PER_CHUNK * 3, real),
        np.empty(ROWS_PER_CHUNK * width + COEFFICIENTS, real),
        np.empty(ROWS_PER_CHUNK, real),
        np.empty(ROWS_PER_CHUNK, real),
    )
    return gradients, np.empty(ROWS_PER_CHUNK, np.int64), np.empty(LANES, np.int64), np.empty(LANES, np.int64)


@device
def chunk_backward(first, count, gaussian, cameras, limits, flags, slots, rows, d_rows, scratch, space):
    """Set the gradients in `space` to those of the Gaussians first, ..., first + count - 1, summed over the views.

    `gaussian` is (means, quats, scales, opacities, sh0, shN) and `rows` and `d_rows` are the splats' rows and their
    gradient, all flat; cameras have HALF_WIDTH and HALF_HEIGHT, `flags` is as for `project_rows`, `scratch` comes from
    `backward_scratch`, `space` from `chunk_space`.
    """
    gradients, visible, index, splat_index = space
    clear_gradients(gradients)
    for view in range(cameras.shape[0]):
        num_visible = 0
        for k in range(count):
            visible[num_visible] = first + k
            num_visible += slots[view, first + k] >= 0
        camera = cameras[view]
        for start in range(0, num_visible, LANES):
            lanes = min(LANES, num_visible - start)
            fill_batch(index, visible, start, lanes)
            for lane in range(LANES):
                splat_index[lane] = slots[view, index[lane]]
            batch_backward(gaussian, index, splat_index, camera, limits, flags, rows, d_rows, scratch)
            add_batch(index, first, lanes, flags, view > 0, scratch, gradients)


@device
def clear_gradients(gradients):
    """Zero the gradients of a chunk."""
    for q in range(len(gradients)):
        clear(gradients[q])


@device
def clear(values):
    """Zero an array, eight numbers at a time: its length is a multiple of that."""
    zero = broadcast(values.dtype.type(0))
    for k in range(0, values.size, LANES):
        store(values, k, zero)


@device
def batch_backward(gaussian, index, splat_index, camera, limits, flags, rows, d_rows, scratch):
    """Gradients of eight Gaussians from the gradients of their splats, into scratch."""
    turn, mean = world_turn(camera), three_columns(gaussian[0], index)
    at = row_starts(splat_index, NUM_ROW_COLUMNS)
    d_x, d_y, d_a, d_b = four_columns(d_rows, at, 0)
    d_c, d_opacity, d_red, d_green = four_columns(d_rows, at, 4)
    _, _, d_blue, d_mask = four_columns(d_rows, at, 6)
    a, b, c, alpha = four_columns(rows, at, 2)
    red, green, blue, _ = four_columns(rows, at, 6)
    u, v = d_x * broadcast(camera[HALF_WIDTH]), d_y * broadcast(camera[HALF_HEIGHT])
    store(scratch[3], MASK * LANES, d_mask)
    store(scratch[3], NORM * LANES, square_root(u * u + v * v))
    if flags[0] >= 0:  # channels clamped at 0 have no gradient
        zero = d_red - d_red
        d_red = select_gt(red, zero, d_red, zero)
        d_green, d_blue = select_gt(green, zero, d_green, zero), select_gt(blue, zero, d_blue, zero)
    d_mean = colour_backward(gaussian[5], index, camera, mean, flags, d_red, d_green, d_blue, scratch)
    d_camera = geometry_backward(
        gaussian, index, camera, turn, mean, limits[2], flags, (a, b, c), alpha, (d_x, d_y),
        (d_a, times(d_rows, 0.5, d_b), d_c), d_opacity, scratch[3],
    )  # fmt: skip
    for k in range(3):
        through = turn[k] * d_camera[0] + turn[3 + k] * d_camera[1] + turn[6 + k] * d_camera[2]
        store(scratch[3], (MEAN + k) * LANES, d_mean[k] + through)


@device
def colour_backward(shN, index, camera, mean, flags, d_red, d_green, d_blue, scratch):
    """SH bases and gradients into scratch; returns the mean's gradient through the viewing direction."""
    basis, d_basis, coefficients, small, spread = scratch
    degree, zero = flags[0], d_red - d_red
    if degree < 0:
        store(small, SH0 * LANES, d_red)
        store(small, (SH0 + 1) * LANES, d_green)
        store(small, (SH0 + 2) * LANES, d_blue)
        return zero, zero, zero
    store(small, SH0 * LANES, times(small, C0, d_red))
    store(small, (SH0 + 1) * LANES, times(small, C0, d_green))
    store(small, (SH0 + 2) * LANES, times(small, C0, d_blue))
    if degree == 0:
        return zero, zero, zero
    x, y, z, inverse = view_direction(camera, mean)
    write_basis(basis, degree, x, y, z)
    read_rows(shN, flags[3], index, 3 * ((degree + 1) * (degree + 1) - 1), coefficients)
    basis_gradient(coefficients, degree, d_red, d_green, d_blue, d_basis)
    store_eight(spread, 0, load_transposed(basis, LANES))
    store_eight(spread, LANES * LANES, load_transposed(basis, 9 * LANES))
    store(spread, 2 * LANES * LANES, d_red)
    store(spread, (2 * LANES + 1) * LANES, d_green)
    store(spread, (2 * LANES + 2) * LANES, d_blue)
    dx, dy, dz = direction_gradient(d_basis, degree, x, y, z)
    along = dx * x + dy * y + dz * z
    return (dx - along * x) * inverse, (dy - along * y) * inverse, (dz - along * z) * inverse


@device
def geometry_backward(
    gaussian, index, camera, turn, mean, eps, flags, conic, alpha, d_image, d_conic, d_opacity, small
):  # fmt: skip
    """Quaternion, scale and opacity into scratch; returns the gradient of the camera-space mean."""
    one, eps2d = broadcast(small.dtype.type(1)), broadcast(eps)
    x, y, z = camera_point(camera, turn, mean)
    inverse_z = one / z
    quaternion = unit_quaternion(gaussian[1], index)
    turned, scale = rotation(one, quaternion), activated_scale(gaussian[2], index, flags[1])
    terms = jacobian_terms(camera, x, y, inverse_z)
    m = image_turn(terms, turn)
    half = half_projection(m, turned, scale)
    d_half = conic_backward(one, half, eps2d, conic, d_conic)
    if flags[2]:
        alpha = activated_opacity(gaussian[3], index, flags[1])
        d_opacity, d_half = antialias_backward(half, eps2d, alpha, d_opacity, d_half)
    store(small, OPACITY * LANES, d_opacity if flags[1] else d_opacity * alpha * (one - alpha))
    d_turned = turned_backward(m, d_half)
    for k in range(3):
        d_scale = d_turned[k] * turned[k] + d_turned[3 + k] * turned[3 + k] + d_turned[6 + k] * turned[6 + k]
        store(small, (SCALE + k) * LANES, d_scale if flags[1] else d_scale * scale[k])
    quaternion_backward(quaternion, d_turned, scale, small)
    return camera_backward(camera, terms, turn, turned, scale, d_half, d_image, x, y, inverse_z)


@device
def conic_backward(one, half, eps2d, conic, d_conic):
    """dL/dhalf (6 vectors): -2 K G (K half) with K the conic and G the symmetric gradient, its entries in d_conic.

    In this order: K G K loses the part along a long thin splat to the rounding of the part across it. K half is
    adj(cov + eps2d I) half / det, and adj(half half^T) half has the rows b x n and n x a, with a, b the rows of half
    and n = a x b: no cancellation.
    """
    a, b = half[:3], half[3:]
    normal = cross(a, b)
    inverse = one / determinants(half, covariance_2d(half), eps2d)[1]
    top = combination(inverse, cross(b, normal), eps2d * inverse, a)
    bottom = combination(inverse, cross(normal, a), eps2d * inverse, b)
    zero = one - one
    g0, g1, g2 = zero - (d_conic[0] + d_conic[0]), zero - (d_conic[1] + d_conic[1]), zero - (d_conic[2] + d_conic[2])
    d_top, d_bottom = combination(g0, top, g1, bottom), combination(g1, top, g2, bottom)
    return combination(conic[0], d_top, conic[1], d_bottom) + combination(conic[1], d_top, conic[2], d_bottom)


@device
def combination(s, a, t, b):
    """The sum s a + t b of 3 vectors each."""
    return s * a[0] + t * b[0], s * a[1] + t * b[1], s * a[2] + t * b[2]


@device
def antialias_backward(half, eps2d, opacity, d_opacity, d_half):
    """(dL/dopacity, dL/dhalf) through opacity * sqrt(det(cov) / det(cov + eps2d I)); 0 where the first vanishes."""
    cov = covariance_2d(half)
    before, after = determinants(half, cov, eps2d)
    zero = before - before
    factor = square_root(before / after)
    shared = d_opacity * opacity * factor
    half_before = select_gt(before, zero, shared / (before + before), zero)
    half_after = zero - shared / (after + after)
    both = half_before + half_after
    # Twice dL/dcov: cov = half half^T.
    xx, yy = both * cov[2] + half_after * eps2d, both * cov[0] + half_after * eps2d
    xx, xy, yy = xx + xx, zero - (both + both) * cov[1], yy + yy
    d_top, d_bottom = combination(xx, half[:3], xy, half[3:]), combination(xy, half[:3], yy, half[3:])
    return d_opacity * factor, (
        d_half[0] + d_top[0], d_half[1] + d_top[1], d_half[2] + d_top[2],
        d_half[3] + d_bottom[0], d_half[4] + d_bottom[1], d_half[5] + d_bottom[2],
    )  # fmt: skip


@device
def camera_backward(camera, terms, turn, turned, scale, d_half, d_image, x, y, inverse_z):
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
    d_ratio_x = broadcast(camera[FX]) * d_image[0] + d_u
    d_ratio_y = broadcast(camera[FY]) * d_image[1] + d_v
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
def add_batch(index, base, count, flags, has_sum, scratch, gradients):
    """Add the first `count` lanes of the scratch to their rows, of which the first one is that of Gaussian `base`."""
    small, spread = scratch[3], scratch[4]
    add_columns(index, base, count, small, MEAN, 3, gradients[0])
    add_columns(index, base, count, small, QUAT, 4, gradients[1])
    add_columns(index, base, count, small, SCALE, 3, gradients[2])
    add_columns(index, base, count, small, OPACITY, 1, gradients[3])
    add_columns(index, base, count, small, SH0, 3, gradients[4])
    add_columns(index, base, count, small, MASK, 1, gradients[MASKS])
    add_columns(index, base, count, small, NORM, 1, gradients[NORMS])
    degree, d_colours = flags[0], 2 * LANES * LANES
    if degree < 1:
        return
    for lane in range(count):
        at = (index[lane] - base) * flags[3]
        red, green = spread[d_colours + lane], spread[d_colours + LANES + lane]
        colours = three_turns(red, green, spread[d_colours + 2 * LANES + lane])
        add_products(load(spread, lane * LANES), colours, has_sum, gradients[5], at)
        if degree >= 3:
            add_products(load(spread, (LANES + lane) * LANES), colours, has_sum, gradients[5], at + 3 * LANES)


@device
def three_turns(red, green, blue):
    """The 24 numbers red, green, blue, red, ..."""
    return (
        cycle_of_three(red, green, blue, 0),
        cycle_of_three(red, green, blue, 8),
        cycle_of_three(red, green, blue, 16),
    )


@device
def add_products(bases, colours, has_sum, target, at):
    """The products of eight bases with three colours each to target[at : at + 24].

    A sum that is there already counts with `has_sum` only, since what was just written would have to be waited for. A
    row may be shorter: the products behind its end are 0, and the row after it is written later.
    """
    first = repeated_thrice(bases, 0) * colours[0]
    second = repeated_thrice(bases, 8) * colours[1]
    third = repeated_thrice(bases, 16) * colours[2]
    if has_sum:
        first, second = first + load(target, at), second + load(target, at + LANES)
        third = third + load(target, at + 2 * LANES)
    store(target, at, first)
    store(target, at + LANES, second)
    store(target, at + 2 * LANES, third)


@device
def add_columns(index, base, count, small, start, width, target):
    """Add `width` vectors from number `start` on to the rows of one attribute."""
    for lane in range(count):
        at = (index[lane] - base) * width
        for c in range(width):
            target[at + c] += small[(start + c) * LANES + lane]


@kernel
def project_backward_rows(
    task, num_tasks, gaussian, cameras, limits, flags, slots, rows, d_rows, gradients, d_masks
):  # fmt: skip
    """Set `gradients` (flat: means, quats, scales, opacities, sh0, shN) and d_masks of the rows of this task."""
    real = gaussian[0].dtype
    scratch, space = backward_scratch(real), chunk_space(real, flags[3])
    widths = np.array([3, 4, 3, 1, 3, flags[3]])
    num_rows = d_masks.size
    start, stop = task * num_rows // num_tasks, (task + 1) * num_rows // num_tasks
    backward_span(
        start, stop, gaussian, cameras, limits, flags, slots, rows, d_rows, scratch, space, widths, gradients, d_masks
    )


@device
def backward_span(
    start, stop, gaussian, cameras, limits, flags, slots, rows, d_rows, scratch, space, widths, gradients, d_masks
):  # fmt: skip
    """`project_backward_rows` for the rows from `start` to `stop`, with arrays to work in."""
    for first in range(start, stop, ROWS_PER_CHUNK):
        count = min(ROWS_PER_CHUNK, stop - first)
        chunk_backward(first, count, gaussian, cameras, limits, flags, slots, rows, d_rows, scratch, space)
        for q in range(NUM_ATTRIBUTES):
            copy(space[0][q], gradients[q], first * widths[q], count * widths[q])
        copy(space[0][MASKS], d_masks, first, count)


@device
def copy(source, target, start, count):
    """Set target[start : start + count] to the first numbers of `source`."""
    whole = count - count % LANES
    for k in range(0, whole, LANES):
        store(target, start + k, load(source, k))
    for k in range(whole, count):
        target[start + k] = source[k]
