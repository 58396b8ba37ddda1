# SPDX-License-Identifier: Apache-2.0
"""Exact gradient of masked compositing, front to back (docs/masks.md derives it).

With g = dL/dC, a_i = m_i alpha_i and S_i the part of g . C that lies behind splat i (background included),
    dL/da_i = T_i g . c_i - S_i / (1 - a_i),
    dL/dm_i = alpha_i dL/da_i,      dL/dalpha_i = m_i dL/da_i,      dL/dc_i = a_i T_i g.
The kernel walks in forward order over the blocks that the forward changed, repeats its decisions bit for bit, and
takes each splat's share off the remaining g . C, so it stores nothing per pair. Splats with m = 0 need only
sum(alpha dL/da) and take a short path.

Of a splat a tile leaves ten sums over its pixels: with p = dL/dpower (power: the logarithm of alpha), p dx^2, p dx dy,
p dy^2, p dx, p dy, p, and dL/d(red, green, blue, mask). `sum_instances` adds a splat's tiles up and turns the moments
into gradients of mean, conic and opacity: once per splat, not once per tile.
"""

from __future__ import annotations

import numpy as np

from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import (
    LANES,
    broadcast,
    fma,
    horizontal_sum,
    load,
    lowest_bit,
    prefetch_row,
    prefetch_to_write,
    select_gt,
    store,
    sums_of_eight,
    vectors_of,
    zeros_like,
)
from masksplat.cpu.tile import (
    LIGHT,
    NUM_BLOCKS,
    NUM_CONSTANTS,
    PREFETCH_AHEAD,
    advance,
    blank_tile,
    offsets,
    plane_index,
    splat_colour,
    splat_shape,
    start_tile,
    write_alphas,
)
from masksplat.types import NUM_ROW_COLUMNS, TILE

BEHIND, G_RED, G_GREEN, G_BLUE = (LIGHT + k * LANES for k in range(1, 5))
NUM_PLANES = 7

XX, XY, YY, X, Y, P = range(6)
"""Columns of the moments in an instance's sums; colour and mask follow as in `Splats.rows`."""


@kernel
def rasterize_backward_tiles(
    task, num_tasks, constants, rows, tile_offsets, splats, instances, region, rgb, transmittance, ends, covers, d_rgb,
    d_transmittance, sums,
):  # fmt: skip
    """Write the sums of every instance of the tiles task, task + num_tasks, ... to sums[10 * instance : ...]."""
    blank = blank_tile(NUM_PLANES, rgb)
    pixels = np.empty_like(blank)
    alphas = np.empty(NUM_BLOCKS * LANES, rgb.dtype)
    numbers = vectors_of(constants, NUM_CONSTANTS)
    for tile in range(task, tile_offsets.size - 1, num_tasks):
        tile_x = (tile % region[2]) * TILE
        tile_y = region[0] + (tile // region[2]) * TILE
        width, height = min(TILE, region[3] - tile_x), min(TILE, region[1] - tile_y)
        start_tile(pixels, blank, NUM_PLANES, width, height)
        read_tile(rgb, transmittance, d_rgb, d_transmittance, pixels, tile_x, tile_y - region[0], width, height)
        for position in range(tile_offsets[tile], ends[tile]):
            ahead = min(position + PREFETCH_AHEAD, ends[tile] - 1)
            prefetch_row(rows, splats[ahead])
            prefetch_to_write(sums, instances[ahead] * NUM_ROW_COLUMNS)
            prefetch_to_write(sums, instances[ahead] * NUM_ROW_COLUMNS + NUM_ROW_COLUMNS - 1)
            s, cover, out = splats[position], covers[position], instances[position] * NUM_ROW_COLUMNS
            if rows[s, 9] != 0:
                sampled(numbers, rows, s, cover, tile_x, tile_y, pixels, alphas, sums, out)
            else:
                unsampled(numbers, rows, s, cover, tile_x, tile_y, pixels, alphas, sums, out)
        for position in range(ends[tile], tile_offsets[tile + 1]):
            for column in range(NUM_ROW_COLUMNS):
                sums[instances[position] * NUM_ROW_COLUMNS + column] = 0


@kernel
def read_tile(rgb, transmittance, d_rgb, d_transmittance, pixels, tile_x, top, width, height):
    """Load g = dL/dC and S_0 = g . C + T_end dL/dT_end of each pixel into the block layout."""
    for y in range(height):
        for x in range(width):
            at = plane_index(x, y, NUM_PLANES)
            total = transmittance[top + y, tile_x + x] * d_transmittance[top + y, tile_x + x]
            for channel in range(3):
                g = d_rgb[top + y, tile_x + x, channel]
                pixels[at + G_RED + channel * LANES] = g
                total += g * rgb[top + y, tile_x + x, channel]
            pixels[at + BEHIND] = total


@device
def sampled(constants, rows, s, cover, tile_x, tile_y, pixels, alphas, sums, out):
    """All ten sums of one splat with m != 0 over the blocks of `cover`."""
    one, alpha_max, mask = constants[0], constants[1], broadcast(rows[s, 9])
    shape, colour = splat_shape(rows, s, tile_x, tile_y), splat_colour(rows, s)
    zero = zeros_like(one)
    s_0 = s_x = s_y = s_xx = s_xy = s_yy = d_red = d_green = d_blue = d_mask = zero
    write_alphas(constants, shape, cover, pixels, NUM_PLANES, alphas)
    at_alpha = 0
    while cover != 0:
        at = lowest_bit(cover) * NUM_PLANES * LANES
        cover &= cover - 1
        alpha = load(alphas, at_alpha)
        at_alpha += LANES
        effective = mask * alpha
        light, weight = advance(load(pixels, at + LIGHT), effective, constants)
        store(pixels, at + LIGHT, light)
        # Where the pixel has ended, or ends here, the splat has no part in the image. The quotient waits for nothing.
        odds = select_gt(light, zero, effective / (one - effective), zero)
        g_red, g_green, g_blue = load(pixels, at + G_RED), load(pixels, at + G_GREEN), load(pixels, at + G_BLUE)
        d_red, d_green, d_blue = fma(weight, g_red, d_red), fma(weight, g_green, d_green), fma(weight, g_blue, d_blue)
        share = weight * fma(g_red, colour[0], fma(g_green, colour[1], g_blue * colour[2]))
        remaining = load(pixels, at + BEHIND) - share
        store(pixels, at + BEHIND, remaining)
        d_effective = share - remaining * odds  # a dL/da = m alpha dL/da
        d_mask = d_mask + d_effective
        power = select_gt(alpha_max, alpha, d_effective, zero)
        dx, dy = offsets(pixels, at, shape)
        moment_x, moment_y = power * dx, power * dy
        s_0, s_x, s_y = s_0 + power, s_x + moment_x, s_y + moment_y
        s_xx, s_xy, s_yy = fma(moment_x, dx, s_xx), fma(moment_x, dy, s_xy), fma(moment_y, dy, s_yy)
    store(sums, out, sums_of_eight(s_xx, s_xy, s_yy, s_x, s_y, s_0, d_red, d_green))
    sums[out + 8], sums[out + 9] = horizontal_sum(d_blue), horizontal_sum(d_mask) / rows[s, 9]


@device
def unsampled(constants, rows, s, cover, tile_x, tile_y, pixels, alphas, sums, out):
    """Only the mask's gradient of a splat with m = 0, alpha (T g . c - S); no pixel is touched."""
    red, green, blue = splat_colour(rows, s)
    zero = d_mask = zeros_like(constants[0])
    write_alphas(constants, splat_shape(rows, s, tile_x, tile_y), cover, pixels, NUM_PLANES, alphas)
    at_alpha = 0
    while cover != 0:
        at = lowest_bit(cover) * NUM_PLANES * LANES
        cover &= cover - 1
        before, alpha = load(pixels, at + LIGHT), load(alphas, at_alpha)
        at_alpha += LANES
        g_colour = fma(load(pixels, at + G_GREEN), green, load(pixels, at + G_BLUE) * blue)
        g_colour = fma(load(pixels, at + G_RED), red, g_colour)
        accepted = select_gt(before, zero, alpha, zero)
        d_mask = fma(accepted, before * g_colour - load(pixels, at + BEHIND), d_mask)
    store(sums, out, zero)
    sums[out + 8], sums[out + 9] = 0, horizontal_sum(d_mask)


@kernel
def sum_instances(task, num_tasks, instance_offsets, rows, sums, d_rows):
    """Add each splat's sums, in tile order, and their gradients to d_rows (V, 10)."""
    half = sums.dtype.type(0.5)
    total = np.empty(NUM_ROW_COLUMNS, sums.dtype)
    for s in range(task * d_rows.shape[0] // num_tasks, (task + 1) * d_rows.shape[0] // num_tasks):
        first = last = broadcast(sums.dtype.type(0))  # eight columns each: six of the ten are in both
        for instance in range(instance_offsets[s], instance_offsets[s + 1]):
            first = first + load(sums, instance * NUM_ROW_COLUMNS)
            last = last + load(sums, instance * NUM_ROW_COLUMNS + NUM_ROW_COLUMNS - LANES)
        store(total, 0, first)
        store(total, NUM_ROW_COLUMNS - LANES, last)
        d_rows[s, 0] += rows[s, 2] * total[X] + rows[s, 3] * total[Y]
        d_rows[s, 1] += rows[s, 3] * total[X] + rows[s, 4] * total[Y]
        d_rows[s, 2] -= half * total[XX]
        d_rows[s, 3] -= total[XY]
        d_rows[s, 4] -= half * total[YY]
        d_rows[s, 5] += total[P] / rows[s, 5]
        for column in range(6, NUM_ROW_COLUMNS):
            d_rows[s, column] += total[column]
