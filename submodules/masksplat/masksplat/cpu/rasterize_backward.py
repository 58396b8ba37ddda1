# SPDX-License-Identifier: Apache-2.0
"""Exact gradient of masked compositing, front to back (docs/masks.md derives it).

With g = dL/dC, a_i = m_i alpha_i and S_i the part of g . C that lies behind splat i (background included),
    dL/da_i = T_i g . c_i - S_i / (1 - a_i),
    dL/dm_i = alpha_i dL/da_i,      dL/dalpha_i = m_i dL/da_i,      dL/dc_i = a_i T_i g.
The kernel walks in forward order, repeats the forward's decisions bit for bit, and takes each splat's share off the
remaining g . C, so it stores nothing per pair. Splats with m = 0 need only sum(alpha dL/da) and take a short path.
"""

from __future__ import annotations

import numpy as np

from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import any_positive, broadcast, fma, horizontal_sum, load, select_ge, select_gt, store
from masksplat.cpu.tile import (
    BLOCK_COLUMNS,
    BLOCK_HEIGHT,
    BLOCK_WIDTH,
    TILE_PIXELS,
    advance,
    block_alpha,
    block_columns,
    block_rows,
    constants,
    lane_offsets,
    prefetch_splat,
    splat_colour,
    splat_shape,
    start_transmittance,
    tile_index,
)
from masksplat.types import NUM_ROW_COLUMNS, TILE, TRANSMITTANCE_MIN


@kernel
def rasterize_backward_tiles(
    task, num_tasks, rows, boxes, footprints, tile_offsets, splats, instances, region, rgb, transmittance, ends, d_rgb,
    d_transmittance, gradients,
):  # fmt: skip
    """Write the gradient of every instance of the tiles task, task + num_tasks, ... to gradients[instance] (I, 10)."""
    light = np.empty(TILE_PIXELS, rgb.dtype)
    behind = np.empty(TILE_PIXELS, rgb.dtype)
    pixel_gradient = np.empty(3 * TILE_PIXELS, rgb.dtype)
    lanes = np.empty(16, rgb.dtype)
    lane_offsets(lanes)
    for tile in range(task, tile_offsets.size - 1, num_tasks):
        tile_x = (tile % region[2]) * TILE
        tile_y = region[0] + (tile // region[2]) * TILE
        width, height = min(TILE, region[3] - tile_x), min(TILE, region[1] - tile_y)
        start_transmittance(light, width, height)
        read_tile(
            rgb,
            transmittance,
            d_rgb,
            d_transmittance,
            behind,
            pixel_gradient,
            tile_x,
            tile_y - region[0],
            width,
            height,
        )
        for position in range(tile_offsets[tile], ends[tile]):
            prefetch_splat(splats, position, ends[tile], rows, boxes)
            s = splats[position]
            out = instances[position]
            if rows[s, 9] != 0:
                sampled(
                    rows, boxes, footprints, s, tile_x, tile_y, lanes, light, behind, pixel_gradient, gradients, out
                )
            else:
                unsampled(
                    rows, boxes, footprints, s, tile_x, tile_y, lanes, light, behind, pixel_gradient, gradients, out
                )
        for position in range(ends[tile], tile_offsets[tile + 1]):
            for column in range(NUM_ROW_COLUMNS):
                gradients[instances[position], column] = 0


@kernel
def read_tile(rgb, transmittance, d_rgb, d_transmittance, behind, pixel_gradient, tile_x, top, width, height):
    """Load g = dL/dC and S_0 = g . C + T_end dL/dT_end of each pixel into the block layout."""
    behind[:] = 0
    pixel_gradient[:] = 0
    for y in range(height):
        for x in range(width):
            at = tile_index(x, y)
            total = transmittance[top + y, tile_x + x] * d_transmittance[top + y, tile_x + x]
            for channel in range(3):
                g = d_rgb[top + y, tile_x + x, channel]
                pixel_gradient[channel * TILE_PIXELS + at] = g
                total += g * rgb[top + y, tile_x + x, channel]
            behind[at] = total


@device
def sampled(rows, boxes, footprints, s, tile_x, tile_y, lanes, light, behind, pixel_gradient, gradients, out):
    """All ten gradients of one splat with m != 0 over the tile, into gradients[out]."""
    real = light.dtype.type
    limits = constants(light)
    zero = limits[0]
    form, lane_x, lane_y = splat_shape(rows, s, lanes, tile_x, tile_y)
    one, minimum = broadcast(real(1)), broadcast(real(TRANSMITTANCE_MIN))
    mask = broadcast(rows[s, 9])
    red, green, blue = splat_colour(rows, s)
    s_0 = s_x = s_y = s_xx = s_xy = s_yy = d_red = d_green = d_blue = d_mask = zero
    first_row, last_row, first, last = block_rows(boxes, s, tile_x, tile_y)
    for block_row in range(first_row, last_row):
        y = block_row * BLOCK_HEIGHT
        left, right = block_columns(footprints, rows, s, tile_x, tile_y + y, first, last)
        dy = lane_y + broadcast(real(y))
        for column in range(left, right):
            at = (block_row * BLOCK_COLUMNS + column) * 8
            before = load(light, at)
            dx = lane_x + broadcast(real(column * BLOCK_WIDTH))
            alpha, uncapped = block_alpha(form, dx, dy, limits)
            if any_positive(select_gt(before, zero, alpha, zero)):
                effective = mask * alpha
                weight = advance(light, at, before, effective, zero)
                g_red, g_green = load(pixel_gradient, at), load(pixel_gradient, TILE_PIXELS + at)
                g_blue = load(pixel_gradient, 2 * TILE_PIXELS + at)
                g_colour = fma(g_red, red, fma(g_green, green, g_blue * blue))
                remaining = load(behind, at) - weight * g_colour
                store(behind, at, remaining)
                d_effective = before * g_colour - remaining / (one - effective)
                # Ended pixels and the splat that ends one have no part in the image.
                accepted = select_ge(before - before * effective, minimum, alpha, zero)
                shared = accepted * d_effective
                d_mask = d_mask + shared
                d_red, d_green, d_blue = (
                    fma(weight, g_red, d_red),
                    fma(weight, g_green, d_green),
                    fma(weight, g_blue, d_blue),
                )
                d_power = select_gt(uncapped, limits[1], zero, mask * shared)
                s_0, moment_x, moment_y = s_0 + d_power, d_power * dx, d_power * dy
                s_x, s_y = s_x + moment_x, s_y + moment_y
                s_xx, s_xy, s_yy = fma(moment_x, dx, s_xx), fma(moment_x, dy, s_xy), fma(moment_y, dy, s_yy)
    _finish(rows, s, gradients, out, (s_0, s_x, s_y, s_xx, s_xy, s_yy), (d_red, d_green, d_blue, d_mask))


@device
def _finish(rows, s, gradients, out, power_sums, other_sums):
    """Turn the moments of dL/dpower into gradients of mean, conic and opacity."""
    half = gradients.dtype.type(0.5)
    s_0, s_x, s_y = horizontal_sum(power_sums[0]), horizontal_sum(power_sums[1]), horizontal_sum(power_sums[2])
    gradients[out, 0] = rows[s, 2] * s_x + rows[s, 3] * s_y
    gradients[out, 1] = rows[s, 3] * s_x + rows[s, 4] * s_y
    gradients[out, 2] = -half * horizontal_sum(power_sums[3])
    gradients[out, 3] = -horizontal_sum(power_sums[4])
    gradients[out, 4] = -half * horizontal_sum(power_sums[5])
    gradients[out, 5] = s_0 / rows[s, 5]
    for k in range(4):
        gradients[out, 6 + k] = horizontal_sum(other_sums[k])


@device
def unsampled(rows, boxes, footprints, s, tile_x, tile_y, lanes, light, behind, pixel_gradient, gradients, out):
    """Only the mask's gradient of a splat with m = 0, alpha (T g . c - S); nothing else is touched."""
    real = light.dtype.type
    limits = constants(light)
    zero = limits[0]
    form, lane_x, lane_y = splat_shape(rows, s, lanes, tile_x, tile_y)
    red, green, blue = splat_colour(rows, s)
    d_mask = zero
    first_row, last_row, first, last = block_rows(boxes, s, tile_x, tile_y)
    for block_row in range(first_row, last_row):
        y = block_row * BLOCK_HEIGHT
        left, right = block_columns(footprints, rows, s, tile_x, tile_y + y, first, last)
        dy = lane_y + broadcast(real(y))
        for column in range(left, right):
            at = (block_row * BLOCK_COLUMNS + column) * 8
            before = load(light, at)
            dx = lane_x + broadcast(real(column * BLOCK_WIDTH))
            alpha, _ = block_alpha(form, dx, dy, limits)
            alive_alpha = select_gt(before, zero, alpha, zero)
            if any_positive(alive_alpha):
                g_colour = load(pixel_gradient, 2 * TILE_PIXELS + at) * blue
                g_colour = fma(
                    load(pixel_gradient, at), red, fma(load(pixel_gradient, TILE_PIXELS + at), green, g_colour)
                )
                d_mask = fma(alive_alpha, before * g_colour - load(behind, at), d_mask)
    for column in range(9):
        gradients[out, column] = 0
    gradients[out, 9] = horizontal_sum(d_mask)


@kernel
def sum_instances(task, num_tasks, instance_offsets, gradients, d_rows):
    """Add each splat's instance gradients, in tile order, into d_rows (V, 10)."""
    for s in range(task * d_rows.shape[0] // num_tasks, (task + 1) * d_rows.shape[0] // num_tasks):
        for instance in range(instance_offsets[s], instance_offsets[s + 1]):
            for column in range(NUM_ROW_COLUMNS):
                d_rows[s, column] += gradients[instance, column]
