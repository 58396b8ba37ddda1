# SPDX-License-Identifier: Apache-2.0
"""Projection of a table of Gaussians into one view: cull, EWA, colour, exact pixel box, and compaction.

Gaussians in front of the camera are taken eight at a time; what needs a decision for each (visibility, box, packing)
is done lane by lane afterwards.
"""

from __future__ import annotations

import math

import numpy as np

from masksplat.cpu.footprint import MARGIN_PIXELS, MARGIN_T
from masksplat.cpu.geometry import (
    CX,
    CY,
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
    rotation,
    unit_quaternion,
    view_direction,
    world_turn,
)
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.lanes import COEFFICIENTS, fill_batch, maximum, read_rows, three_columns
from masksplat.cpu.lazy_adam import catch_up_drawn, task_rows
from masksplat.cpu.simd import LANES, any_positive, broadcast, select_gt, square_root, store
from masksplat.cpu.spherical_harmonics import colour_of, write_basis
from masksplat.types import ALPHA_MIN, NUM_ROW_COLUMNS, SLOT_NO_PIXEL, SLOT_UNSEEN, TILE

BASES = 16
NUM_VECTORS = 8
ROUNDING_PIXELS = 3.0
"""Slack of the cheap bound: the radius is rounded up, pixel centres differ by a half, float32 rounds."""
MEAN_X, MEAN_Y, DEPTH, COV_XX, COV_XY, COV_YY, DET, ALPHA = range(8)
"""Vectors of one projected batch, eight lanes each, in the array `lanes`."""


@kernel
def project_rows(task, num_tasks, gaussian, late, masks, camera, size, flags, limits, slots, rows, boxes, counts):
    """Project the rows of this task; visible ones are packed from the start of the task's own range.

    `gaussian` is (means, quats, scales, opacities, sh0, shN), flat arrays, `size` (width, height), `flags` (degree,
    activated, antialiased, numbers in a row of shN), `limits` (near, far, eps2d). slots[i] is set to the packed row
    within the task's range or to a negative SLOT_ value; counts[task] to the number of packed rows. rows has an 11th
    column, the depth. Rows of shN that are drawn are brought up to date, see `catch_up_block` for `late`.
    """
    means, (start, stop) = gaussian[0], task_rows(task, num_tasks, slots.size)
    lanes, index = np.empty(NUM_VECTORS * LANES, means.dtype), np.empty(LANES, np.int64)
    candidates = np.empty(stop - start, np.int64)
    harmonics = np.empty(BASES * LANES, means.dtype), np.empty(COEFFICIENTS * LANES, means.dtype)
    counts[task] = project_span(
        gaussian, late, masks, camera, size, flags, limits, slots, rows, boxes, start, stop, lanes, index,
        candidates, harmonics,
    )  # fmt: skip


@device
def project_span(
    gaussian, late, masks, camera, size, flags, limits, slots, rows, boxes, start, stop, lanes, index, candidates,
    harmonics,
):  # fmt: skip
    """`project_rows` for the rows from `start` to `stop`, with arrays to work in; returns the number of packed rows."""
    num_candidates = list_candidates(
        gaussian, start, stop, camera, size, flags, limits, slots, lanes, index, candidates
    )
    packed = start
    for first in range(0, num_candidates, LANES):
        count = min(LANES, num_candidates - first)
        fill_batch(index, candidates, first, count)
        project_batch(gaussian, index, camera, flags, limits, lanes)
        for lane in range(count):
            i = index[lane]
            slots[i], is_packed = pack_lane(lanes, lane, size, rows, boxes, packed)
            if is_packed:
                rows[packed, 9] = masks[i]
                slots[i] = packed - start
                candidates[packed - start] = i  # never ahead of `first`: the list of packed rows overwrites it
                packed += 1
    catch_up_drawn(candidates, packed - start, slots.size, flags[3], gaussian[5], late)
    colour_rows(gaussian, camera, flags, candidates, packed - start, start, lanes, index, harmonics, rows)
    return packed - start


@device
def colour_rows(gaussian, camera, flags, visible, num_visible, start, lanes, index, harmonics, rows):
    """Colours of the packed rows `start`, `start + 1`, ..., which are those of the Gaussians `visible`."""
    basis, coefficients = harmonics
    for first in range(0, num_visible, LANES):
        count = min(LANES, num_visible - first)
        fill_batch(index, visible, first, count)
        mean = three_columns(gaussian[0], index)
        red, green, blue = batch_colour(gaussian[4], gaussian[5], index, camera, mean, flags, basis, coefficients)
        store(lanes, 0, red)
        store(lanes, LANES, green)
        store(lanes, 2 * LANES, blue)
        for lane in range(count):
            for c in range(3):
                rows[start + first + lane, 6 + c] = lanes[c * LANES + lane]


@device
def list_candidates(gaussian, start, stop, camera, size, flags, limits, slots, lanes, index, candidates):
    """Write the rows from `start` to `stop` that may be seen to `candidates`; returns their number."""
    num_candidates = 0
    for first in range(start, stop, LANES):
        count = min(LANES, stop - first)
        for lane in range(LANES):
            index[lane] = first + min(lane, count - 1)
        is_any = write_may_be_seen(gaussian[0], gaussian[2], index, camera, size, flags[1], limits, lanes)
        for lane in range(count):
            slots[first + lane] = SLOT_UNSEEN
            if is_any and lanes[lane] > 0:
                candidates[num_candidates] = first + lane
                num_candidates += 1
    return num_candidates


@device
def write_may_be_seen(means, scales, index, camera, size, activated, limits, lanes):
    """Set the first lanes to 0 where Gaussians are beyond near or far plane, or certainly unseen by the rule of 3DGS.

    Returns False when all are. A cheap bound: the 2D covariance is at most (largest scale * |J|)^2 + eps2d,
    |J|^2 <= (fx^2 (1 + u^2) + fy^2 (1 + v^2)) / z^2.
    """
    real = means.dtype.type
    one, zero = broadcast(real(1)), broadcast(real(0))
    x, y, z = camera_point(camera, world_turn(camera), three_columns(means, index))
    seen = select_gt(z, broadcast(limits[0]), one, zero)
    seen = select_gt(broadcast(limits[1]), z, seen, zero)
    if not any_positive(seen):
        return False
    inverse = one / z
    mean_x = broadcast(camera[FX]) * x * inverse + broadcast(camera[CX])
    mean_y = broadcast(camera[FY]) * y * inverse + broadcast(camera[CY])
    beyond_x = maximum(zero - mean_x, mean_x - broadcast(real(size[0] + TILE)))
    beyond_y = maximum(zero - mean_y, mean_y - broadcast(real(size[1] + TILE)))
    outside = maximum(beyond_x, beyond_y) - broadcast(real(ROUNDING_PIXELS))
    if any_positive(seen * outside):
        scale = activated_scale(scales, index, activated)
        spread = maximum(scale[0], maximum(scale[1], scale[2])) * inverse
        u, v = max(-camera[X_LOW], camera[X_HIGH]), max(-camera[Y_LOW], camera[Y_HIGH])
        jacobian = camera[FX] * camera[FX] * (1 + u * u) + camera[FY] * camera[FY] * (1 + v * v)
        # lambda_max <= trace + 1/3, where 1/3 is the square root of 3DGS's 0.1 rounded up. 9 is 3 sigma squared, and a
        # thousandth of it far more than what rounds here.
        bound = spread * spread * broadcast(real(jacobian)) + broadcast(real(2.0 * limits[2] + 0.34))
        unseen = select_gt(outside * outside, broadcast(real(9.009)) * bound, zero, seen)
        seen = select_gt(outside, zero, unseen, seen)
    store(lanes, 0, seen)
    return True


@device
def project_batch(gaussian, index, camera, flags, limits, lanes):
    """Everything about eight Gaussians that needs no decision, into `lanes`."""
    means, quats, scales, opacities = gaussian[0], gaussian[1], gaussian[2], gaussian[3]
    one, eps2d = broadcast(means.dtype.type(1)), broadcast(limits[2])
    turn, mean = world_turn(camera), three_columns(means, index)
    x, y, z = camera_point(camera, turn, mean)
    inverse_z = one / z
    turned = rotation(one, unit_quaternion(quats, index))
    m = image_turn(jacobian_terms(camera, x, y, inverse_z), turn)
    half = half_projection(m, turned, activated_scale(scales, index, flags[1]))
    cov = covariance_2d(half)
    det_before, det = determinants(half, cov, eps2d)
    alpha = activated_opacity(opacities, index, flags[1])
    if flags[2]:
        alpha = alpha * square_root(det_before / det)
    store(lanes, MEAN_X * LANES, broadcast(camera[FX]) * x * inverse_z + broadcast(camera[CX]))
    store(lanes, MEAN_Y * LANES, broadcast(camera[FY]) * y * inverse_z + broadcast(camera[CY]))
    store(lanes, DEPTH * LANES, z)
    store(lanes, COV_XX * LANES, cov[0] + eps2d)
    store(lanes, COV_XY * LANES, cov[1])
    store(lanes, COV_YY * LANES, cov[2] + eps2d)
    store(lanes, DET * LANES, det)
    store(lanes, ALPHA * LANES, alpha)


@device
def batch_colour(sh0, shN, index, camera, mean, flags, basis, coefficients):
    """Colours of the batch; degree -1 takes sh0 as the colour."""
    degree, half = flags[0], broadcast(sh0.dtype.type(0.5))
    red, green, blue = three_columns(sh0, index)
    if degree < 0:
        return red, green, blue
    x, y, z, _ = view_direction(camera, mean)
    write_basis(basis, degree, x, y, z)
    read_rows(shN, flags[3], index, 3 * ((degree + 1) * (degree + 1) - 1), coefficients)
    red, green, blue = colour_of(basis, coefficients, degree, red, green, blue)
    zero = half - half
    return maximum(red + half, zero), maximum(green + half, zero), maximum(blue + half, zero)


@device
def pack_lane(lanes, lane, size, rows, boxes, packed):
    """Write one splat to row `packed`; (slot value, False) when no pixel can see it."""
    real = lanes.dtype.type
    mean_x, mean_y = lanes[MEAN_X * LANES + lane], lanes[MEAN_Y * LANES + lane]
    xx, yy, det = lanes[COV_XX * LANES + lane], lanes[COV_YY * LANES + lane], lanes[DET * LANES + lane]
    opacity = lanes[ALPHA * LANES + lane]
    if not det > 0 or not touches_tiles_by_3dgs(mean_x, mean_y, xx, yy, det, size):
        return SLOT_UNSEEN, False
    if not opacity >= real(ALPHA_MIN) or not write_box(boxes, packed, mean_x, mean_y, xx, yy, opacity, size):
        return SLOT_NO_PIXEL, False
    inverse = real(1) / det
    rows[packed, 0], rows[packed, 1] = mean_x, mean_y
    rows[packed, 2], rows[packed, 4] = yy * inverse, xx * inverse
    rows[packed, 3], rows[packed, 5] = -lanes[COV_XY * LANES + lane] * inverse, opacity
    rows[packed, NUM_ROW_COLUMNS] = lanes[DEPTH * LANES + lane]
    return SLOT_NO_PIXEL, True


@device
def touches_tiles_by_3dgs(mean_x, mean_y, xx, yy, det, size):
    """3DGS's visibility: the square of half size ceil(3 sqrt(lambda_max)) overlaps a tile of the image.

    3DGS places pixel centres at integers, hence the half pixel.
    """
    middle = 0.5 * np.float64(xx + yy)
    radius = math.ceil(3.0 * math.sqrt(middle + math.sqrt(max(0.1, middle * middle - det))))
    x, y = np.float64(mean_x) - 0.5, np.float64(mean_y) - 0.5
    tiles_x, tiles_y = (size[0] + TILE - 1) // TILE, (size[1] + TILE - 1) // TILE
    # Truncation towards zero followed by clamping at 0, as there; a float compare avoids integer overflow.
    first_x, last_x = max(0.0, (x - radius) / TILE), (x + radius + TILE - 1) / TILE
    first_y, last_y = max(0.0, (y - radius) / TILE), (y + radius + TILE - 1) / TILE
    spans_x = last_x >= 1.0 and first_x < tiles_x and math.floor(first_x) < math.floor(min(last_x, float(tiles_x)))
    spans_y = last_y >= 1.0 and first_y < tiles_y and math.floor(first_y) < math.floor(min(last_y, float(tiles_y)))
    return spans_x and spans_y


@device
def write_box(boxes, packed, mean_x, mean_y, xx, yy, opacity, size):
    """Bounding box of the ellipse alpha >= 1/255 in pixels, clipped to the image; False when it is empty."""
    t = 2.0 * math.log(np.float64(opacity) / ALPHA_MIN) + MARGIN_T
    reach_x = math.sqrt(t * np.float64(xx)) + MARGIN_PIXELS
    reach_y = math.sqrt(t * np.float64(yy)) + MARGIN_PIXELS
    # Pixel x is inside when |x + 0.5 - mean_x| <= reach_x. Clamp before the cast: huge splats overflow int32.
    x0 = math.ceil(min(max(0.0, mean_x - reach_x - 0.5), float(size[0])))
    x1 = math.floor(max(min(float(size[0] - 1), mean_x + reach_x - 0.5), -1.0)) + 1
    y0 = math.ceil(min(max(0.0, mean_y - reach_y - 0.5), float(size[1])))
    y1 = math.floor(max(min(float(size[1] - 1), mean_y + reach_y - 0.5), -1.0)) + 1
    boxes[packed, 0], boxes[packed, 1], boxes[packed, 2], boxes[packed, 3] = x0, y0, x1, y1
    return x0 < x1 and y0 < y1


@kernel
def compact_rows(
    task, num_tasks, ids, slots, packed, packed_boxes, first, base, rows, boxes, depths, out_ids, gaussians
):
    """Move the packed rows of this task to first[task] on, and make slots global (`base` rows precede the view)."""
    start, stop = task_rows(task, num_tasks, slots.size)
    for i in range(start, stop):
        if slots[i] < 0:
            continue
        source, target = start + slots[i], first[task] + slots[i]
        for c in range(NUM_ROW_COLUMNS):
            rows[target, c] = packed[source, c]
        for c in range(4):
            boxes[target, c] = packed_boxes[source, c]
        depths[target] = packed[source, NUM_ROW_COLUMNS]
        out_ids[target] = ids[i]
        gaussians[target] = i
        slots[i] += base + first[task]
