# SPDX-License-Identifier: Apache-2.0
"""Forward compositing: per tile, front to back, a vector of 8 pixels at a time (MaskGaussian eq. 3-4).

C = sum_i m_i alpha_i T_i c_i + T_end background and T_{i+1} = T_i (1 - m_i alpha_i). Splats with m = 0 leave every
pixel as it is and are not evaluated here at all.
"""

from __future__ import annotations

import numpy as np

from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import any_positive, broadcast, fma, load, select_gt, store
from masksplat.cpu.tile import (
    BLOCK_COLUMNS,
    BLOCK_HEIGHT,
    BLOCK_WIDTH,
    CHECK_EVERY,
    TILE_PIXELS,
    advance,
    any_alive,
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
from masksplat.types import TILE


@kernel
def rasterize_tiles(
    task, num_tasks, rows, boxes, footprints, tile_offsets, splats, region, background, rgb, transmittance, ends, pairs
):
    """Composite the tiles task, task + num_tasks, ... into rgb (h, w, 3) and transmittance (h, w).

    `region` is (row_start, row_stop, tile columns, width). ends[tile] is set to one past the last list position
    that some pixel could still see, and pairs[tile] to the number of evaluated (pixel, splat) pairs.
    """
    light = np.empty(TILE_PIXELS, rgb.dtype)
    red, green, blue = (
        np.empty(TILE_PIXELS, rgb.dtype),
        np.empty(TILE_PIXELS, rgb.dtype),
        np.empty(TILE_PIXELS, rgb.dtype),
    )
    lanes = np.empty(16, rgb.dtype)
    lane_offsets(lanes)
    for tile in range(task, tile_offsets.size - 1, num_tasks):
        tile_x = (tile % region[2]) * TILE
        tile_y = region[0] + (tile // region[2]) * TILE
        width, height = min(TILE, region[3] - tile_x), min(TILE, region[1] - tile_y)
        start_transmittance(light, width, height)
        red[:], green[:], blue[:] = 0, 0, 0
        position, evaluated = tile_offsets[tile], 0
        while position < tile_offsets[tile + 1]:
            if (position - tile_offsets[tile]) % CHECK_EVERY == 0 and not any_alive(light):
                break
            prefetch_splat(splats, position, tile_offsets[tile + 1], rows, boxes)
            s = splats[position]
            if rows[s, 9] != 0:
                evaluated += composite(rows, boxes, footprints, s, tile_x, tile_y, lanes, light, red, green, blue)
            position += 1
        ends[tile] = position
        pairs[tile] = evaluated
        write_tile(light, red, green, blue, background, rgb, transmittance, tile_x, tile_y - region[0], width, height)


@device
def composite(rows, boxes, footprints, s, tile_x, tile_y, lanes, light, red, green, blue):
    """Put one splat over the tile; returns the number of evaluated pairs."""
    real = light.dtype.type
    limits = constants(light)
    zero = limits[0]
    form, lane_x, lane_y = splat_shape(rows, s, lanes, tile_x, tile_y)
    mask = broadcast(rows[s, 9])
    c_red, c_green, c_blue = splat_colour(rows, s)
    first_row, last_row, first, last = block_rows(boxes, s, tile_x, tile_y)
    blocks = 0
    for block_row in range(first_row, last_row):
        y = block_row * BLOCK_HEIGHT
        left, right = block_columns(footprints, rows, s, tile_x, tile_y + y, first, last)
        dy = lane_y + broadcast(real(y))
        for column in range(left, right):
            at = (block_row * BLOCK_COLUMNS + column) * 8
            before = load(light, at)
            dx = lane_x + broadcast(real(column * BLOCK_WIDTH))
            alpha, _ = block_alpha(form, dx, dy, limits)
            if any_positive(select_gt(before, zero, alpha, zero)):
                weight = advance(light, at, before, mask * alpha, zero)
                store(red, at, fma(weight, c_red, load(red, at)))
                store(green, at, fma(weight, c_green, load(green, at)))
                store(blue, at, fma(weight, c_blue, load(blue, at)))
        blocks += max(0, right - left)
    return blocks * BLOCK_WIDTH * BLOCK_HEIGHT


@kernel
def write_tile(light, red, green, blue, background, rgb, transmittance, tile_x, top, width, height):
    """Undo the block layout and add what passes through of the background; `top` is the row inside the region."""
    for y in range(height):
        for x in range(width):
            at = tile_index(x, y)
            passed = abs(light[at])
            transmittance[top + y, tile_x + x] = passed
            rgb[top + y, tile_x + x, 0] = red[at] + passed * background[0]
            rgb[top + y, tile_x + x, 1] = green[at] + passed * background[1]
            rgb[top + y, tile_x + x, 2] = blue[at] + passed * background[2]
