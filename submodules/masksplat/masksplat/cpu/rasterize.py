# SPDX-License-Identifier: Apache-2.0
"""Forward compositing: per tile, front to back, a vector of 8 pixels at a time (MaskGaussian eq. 3-4).

C = sum_i m_i alpha_i T_i c_i + T_end background and T_{i+1} = T_i (1 - m_i alpha_i). Splats with m = 0 leave every
pixel as it is and are not evaluated here at all.
"""

from __future__ import annotations

import numpy as np

from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import LANES, any_positive, broadcast, fma, load, lowest_bit, num_bits, store, vectors_of
from masksplat.cpu.tile import (
    CHECK_EVERY,
    LIGHT,
    NUM_BLOCKS,
    NUM_CONSTANTS,
    advance,
    blank_tile,
    cover_of,
    living_blocks,
    plane_index,
    prefetch_splat,
    splat_colour,
    splat_shape,
    start_tile,
    write_alphas,
)
from masksplat.types import TILE

RED, GREEN, BLUE = LIGHT + LANES, LIGHT + 2 * LANES, LIGHT + 3 * LANES
NUM_PLANES = 6


@kernel
def rasterize_tiles(
    task, num_tasks, constants, rows, boxes, footprints, tile_offsets, splats, region, background, rgb, transmittance,
    ends, covers, pairs,
):  # fmt: skip
    """Composite the tiles task, task + num_tasks, ... into rgb (h, w, 3) and transmittance (h, w).

    `region` is (row_start, row_stop, tile columns, width). ends[tile] is set to one past the last list position
    that some pixel could still see, covers[position] (I,) to the cover that the backward has to visit, and
    pairs[tile] to the number of evaluated (pixel, splat) pairs.
    """
    blank = blank_tile(NUM_PLANES, rgb)
    pixels = np.empty_like(blank)
    alphas = np.empty(NUM_BLOCKS * LANES, rgb.dtype)
    numbers = vectors_of(constants, NUM_CONSTANTS)
    for tile in range(task, tile_offsets.size - 1, num_tasks):
        tile_x = (tile % region[2]) * TILE
        tile_y = region[0] + (tile // region[2]) * TILE
        width, height = min(TILE, region[3] - tile_x), min(TILE, region[1] - tile_y)
        start_tile(pixels, blank, NUM_PLANES, width, height)
        start, stop = tile_offsets[tile], tile_offsets[tile + 1]
        position, evaluated, alive = start, 0, 0
        while position < stop:
            if (position - start) % CHECK_EVERY == 0:
                alive = living_blocks(pixels, NUM_PLANES)
                if alive == 0:
                    break
            prefetch_splat(position, stop, splats, rows, boxes)
            s = splats[position]
            cover = cover_of(boxes, footprints, rows, s, tile_x, tile_y) & alive
            if rows[s, 9] != 0:
                evaluated += num_bits(cover)
                cover = composite(numbers, rows, s, cover, tile_x, tile_y, pixels, alphas)
            covers[position] = cover
            position += 1
        ends[tile] = position
        pairs[tile] = evaluated * LANES
        write_tile(pixels, background, rgb, transmittance, tile_x, tile_y - region[0], width, height)


@device
def composite(constants, rows, s, cover, tile_x, tile_y, pixels, alphas):
    """Put one splat over the blocks of `cover`; returns the cover of those that it reaches."""
    mask = broadcast(rows[s, 9])
    red, green, blue = splat_colour(rows, s)
    write_alphas(constants, splat_shape(rows, s, tile_x, tile_y), cover, pixels, NUM_PLANES, alphas)
    reached, at_alpha = 0, 0
    while cover != 0:
        block = lowest_bit(cover)
        cover &= cover - 1
        alpha = load(alphas, at_alpha)
        at_alpha += LANES
        reached |= int(any_positive(alpha)) << block
        at = block * NUM_PLANES * LANES
        light, weight = advance(load(pixels, at + LIGHT), mask * alpha, constants)
        store(pixels, at + LIGHT, light)
        store(pixels, at + RED, fma(weight, red, load(pixels, at + RED)))
        store(pixels, at + GREEN, fma(weight, green, load(pixels, at + GREEN)))
        store(pixels, at + BLUE, fma(weight, blue, load(pixels, at + BLUE)))
    return reached


@kernel
def write_tile(pixels, background, rgb, transmittance, tile_x, top, width, height):
    """Undo the block layout and add what passes through of the background; `top` is the row inside the region."""
    for y in range(height):
        for x in range(width):
            at = plane_index(x, y, NUM_PLANES)
            passed = abs(pixels[at + LIGHT])
            transmittance[top + y, tile_x + x] = passed
            rgb[top + y, tile_x + x, 0] = pixels[at + RED] + passed * background[0]
            rgb[top + y, tile_x + x, 1] = pixels[at + GREEN] + passed * background[1]
            rgb[top + y, tile_x + x, 2] = pixels[at + BLUE] + passed * background[2]
