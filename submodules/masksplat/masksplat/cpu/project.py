# SPDX-License-Identifier: Apache-2.0
"""Projection of a table of Gaussians into one view: cull, EWA, colour, exact pixel box, and compaction."""

from __future__ import annotations

import math

import numpy as np

from masksplat.cpu.footprint import MARGIN_PIXELS, MARGIN_T
from masksplat.cpu.geometry import (
    CX,
    CY,
    FX,
    FY,
    activated_opacity,
    activated_scale,
    camera_point,
    covariance_2d,
    determinants,
    half_projection,
    jacobian_terms,
    rotation,
    view_direction,
)
from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.spherical_harmonics import colour_of, colour_scratch
from masksplat.types import ALPHA_MIN, NUM_ROW_COLUMNS, SLOT_NO_PIXEL, SLOT_UNSEEN, TILE


@kernel
def project_rows(
    task, num_tasks, means, quats, scales, opacities, sh0, shN, masks, camera, size, flags, limits,
    slots, rows, boxes, counts,
):  # fmt: skip  # type: ignore[no-untyped-def]
    """Project the rows of this task; visible ones are packed from the start of the task's own range.

    `size` is (width, height), `flags` (degree, activated, antialiased), `limits` (near, far, eps2d). slots[i] is set to
    the packed row within the task's range or to a negative SLOT_ value; counts[task] to the number of packed rows.
    rows has 11 columns here: the last one is the depth.
    """
    start, stop = task * means.shape[0] // num_tasks, (task + 1) * means.shape[0] // num_tasks
    scratch = colour_scratch(means)
    packed = start
    for i in range(start, stop):
        slots[i] = SLOT_UNSEEN
        x, y, z = camera_point(camera, means, i)
        if not (z > limits[0] and z < limits[1]):
            continue
        if not project_geometry(
            i, x, y, z, quats, scales, opacities, camera, size, flags, limits, slots, rows, boxes, packed
        ):
            continue
        write_colour(scratch, flags[0], camera, means, sh0, shN, i, rows, packed)
        rows[packed, 9] = masks[i]
        rows[packed, NUM_ROW_COLUMNS] = z
        slots[i] = packed - start
        packed += 1
    counts[task] = packed - start


@device
def project_geometry(i, x, y, z, quats, scales, opacities, camera, size, flags, limits, slots, rows, boxes, packed):  # type: ignore[no-untyped-def]
    """Fill mean, conic, opacity and box of one splat; False when no pixel can see it (slots[i] says why)."""
    real = rows.dtype.type
    half = half_projection(
        camera, jacobian_terms(camera, x, y, z), rotation(quats, i), activated_scale(scales, i, flags[1])
    )
    xx, xy, yy = covariance_2d(half)
    det_before, det = determinants(half, limits[2])
    xx, yy = xx + limits[2], yy + limits[2]
    if not det > 0:
        return False
    mean_x, mean_y = camera[FX] * x / z + camera[CX], camera[FY] * y / z + camera[CY]
    if not touches_tiles_by_3dgs(mean_x, mean_y, xx, yy, det, size):
        return False
    slots[i] = SLOT_NO_PIXEL
    opacity = activated_opacity(opacities, i, flags[1])
    if flags[2]:
        opacity *= math.sqrt(det_before / det)
    if not opacity >= real(ALPHA_MIN):
        return False
    inverse = real(1) / det
    rows[packed, 0], rows[packed, 1] = mean_x, mean_y
    rows[packed, 2], rows[packed, 3], rows[packed, 4] = yy * inverse, -xy * inverse, xx * inverse
    rows[packed, 5] = opacity
    return write_box(boxes, packed, mean_x, mean_y, xx, yy, opacity, size)


@device
def touches_tiles_by_3dgs(mean_x, mean_y, xx, yy, det, size):  # type: ignore[no-untyped-def]
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
def write_box(boxes, packed, mean_x, mean_y, xx, yy, opacity, size):  # type: ignore[no-untyped-def]
    """Bounding box of the ellipse alpha >= 1/255 in pixels, clipped to the image; False when it is empty."""
    t = 2.0 * math.log(np.float64(opacity) / ALPHA_MIN) + MARGIN_T
    reach_x = math.sqrt(t * np.float64(xx)) + MARGIN_PIXELS
    reach_y = math.sqrt(t * np.float64(yy)) + MARGIN_PIXELS
    # Pixel x is inside when |x + 0.5 - mean_x| <= reach_x. Clamp before the cast: huge splats overflow int32.
    x0 = math.ceil(max(0.0, mean_x - reach_x - 0.5))
    x1 = math.floor(min(float(size[0] - 1), mean_x + reach_x - 0.5)) + 1
    y0 = math.ceil(max(0.0, mean_y - reach_y - 0.5))
    y1 = math.floor(min(float(size[1] - 1), mean_y + reach_y - 0.5)) + 1
    x0, y0, x1, y1 = min(x0, size[0]), min(y0, size[1]), max(x1, 0), max(y1, 0)
    boxes[packed, 0], boxes[packed, 1], boxes[packed, 2], boxes[packed, 3] = x0, y0, x1, y1
    return x0 < x1 and y0 < y1


@device
def write_colour(scratch, degree, camera, means, sh0, shN, i, rows, packed):  # type: ignore[no-untyped-def]
    """Colour of Gaussian i from this camera into rows[packed, 6:9]; degree -1 takes sh0 as the colour."""
    real = rows.dtype.type
    if degree < 0:
        rows[packed, 6], rows[packed, 7], rows[packed, 8] = sh0[i, 0], sh0[i, 1], sh0[i, 2]
        return
    x, y, z, _ = view_direction(camera, means, i)
    red, green, blue = colour_of(scratch, degree, sh0, shN, i, x, y, z)
    half, zero = real(0.5), real(0)
    rows[packed, 6], rows[packed, 7] = max(red + half, zero), max(green + half, zero)
    rows[packed, 8] = max(blue + half, zero)


@kernel
def compact_rows(
    task, num_tasks, ids, slots, packed, packed_boxes, first, base, rows, boxes, depths, out_ids, gaussians
):  # type: ignore[no-untyped-def]
    """Move the packed rows of this task to first[task] on, and make slots global (`base` rows precede the view)."""
    start, stop = task * slots.size // num_tasks, (task + 1) * slots.size // num_tasks
    for i in range(start, stop):
        if slots[i] < 0:
            continue
        source, target = start + slots[i], first[task] + slots[i]
        for column in range(NUM_ROW_COLUMNS):
            rows[target, column] = packed[source, column]
        for column in range(4):
            boxes[target, column] = packed_boxes[source, column]
        depths[target] = packed[source, NUM_ROW_COLUMNS]
        out_ids[target] = ids[i]
        gaussians[target] = i
        slots[i] += base + first[task]
