# SPDX-License-Identifier: Apache-2.0
"""What the three tile kernels (forward, backward, scores) share: the layout of a tile, covers, and alpha of a block.

A tile of 16 x 16 pixels is 8 x 4 blocks of 2 rows x 4 columns; one block is one vector. The values of a tile's pixels
lie block after block in one array, several vectors ("planes") to a block: pixel (x, y) of the tile is lane
(y % 2) * 4 + x % 4 of block (y // 2) * 4 + x // 4. A pixel that has ended, or lies outside the region, has a
transmittance <= 0.

A *cover* is a set of a tile's blocks, one bit each. The forward works out which blocks a splat may reach and then
goes from bit to bit, which costs one branch a block, and none that depends on pixels. It notes the blocks where it
did something; those are all the backward visits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from masksplat.cpu.exponential import exp2, exp2_constants
from masksplat.cpu.footprint import is_large, span_of_band
from masksplat.cpu.kernel import allocating, device
from masksplat.cpu.simd import (
    LANES,
    any_positive,
    broadcast,
    fma,
    load,
    lowest_bit,
    minus_magnitude,
    prefetch_row,
    select_ge,
    select_gt,
    store,
    zeros_like,
)
from masksplat.types import ALPHA_MAX, ALPHA_MIN, TILE, TRANSMITTANCE_MIN

Array = np.ndarray[Any, Any]

BLOCK_WIDTH, BLOCK_HEIGHT = 4, 2
BLOCK_COLUMNS, BLOCK_ROWS = TILE // BLOCK_WIDTH, TILE // BLOCK_HEIGHT
NUM_BLOCKS = BLOCK_COLUMNS * BLOCK_ROWS
EVERY_ROW = sum(1 << (BLOCK_COLUMNS * row) for row in range(BLOCK_ROWS))
"""Times a set of block columns: the cover of these columns in every row of blocks."""

CENTRE_X, CENTRE_Y, LIGHT = 0, LANES, 2 * LANES
"""Planes that every tile array begins with: where the pixels' centres are in the tile, and their transmittance."""

NUM_CONSTANTS, FIRST_OF_EXP2 = 20, 4
"""1, largest and smallest alpha, smallest transmittance, then those of exp2; what is left over is 0."""

LOG2_E = 1.4426950408889634

PREFETCH_AHEAD = 8
CHECK_EVERY = 16
"""Splats between two looks at which pixels of the tile have ended."""


@device
def plane_index(x, y, num_planes):
    """Position of plane 0 of the tile's pixel (x, y) in an array of `num_planes` planes."""
    block = (y // BLOCK_HEIGHT) * BLOCK_COLUMNS + x // BLOCK_WIDTH
    return block * num_planes * LANES + (y % BLOCK_HEIGHT) * BLOCK_WIDTH + x % BLOCK_WIDTH


@allocating
def blank_tile(num_planes, array):
    """A tile of the array's dtype before any splat: transmittance 1, and 0 in the planes behind it."""
    real = array.dtype.type
    blank = np.zeros(NUM_BLOCKS * num_planes * LANES, array.dtype)
    for y in range(TILE):
        for x in range(TILE):
            at = plane_index(x, y, num_planes)
            blank[at + CENTRE_X], blank[at + CENTRE_Y], blank[at + LIGHT] = real(x + 0.5), real(y + 0.5), real(1)
    return blank


@device
def start_tile(pixels, blank, num_planes, width, height):
    """Copy the blank tile to `pixels`; what lies outside width x height has ended."""
    for at in range(0, blank.size, LANES):
        store(pixels, at, load(blank, at))
    if width < TILE or height < TILE:
        for y in range(TILE):
            for x in range(TILE):
                if x >= width or y >= height:
                    pixels[plane_index(x, y, num_planes) + LIGHT] = -1


@device
def living_blocks(pixels, num_planes):
    """Cover of the blocks with a pixel that has not ended."""
    cover = 0
    for block in range(NUM_BLOCKS):
        cover |= int(any_positive(load(pixels, block * num_planes * LANES + LIGHT))) << block
    return cover


@device
def cover_of(boxes, footprints, rows, s, tile_x, tile_y):
    """Cover of the blocks that splat s may reach in the tile: those of its box, cut to its ellipse if it is large."""
    x0, x1 = max(boxes[s, 0] - tile_x, 0), min(boxes[s, 2] - tile_x, TILE)
    y0, y1 = max(boxes[s, 1] - tile_y, 0), min(boxes[s, 3] - tile_y, TILE)
    first, last = x0 // BLOCK_WIDTH, (x1 + BLOCK_WIDTH - 1) // BLOCK_WIDTH
    top, bottom = y0 // BLOCK_HEIGHT, (y1 + BLOCK_HEIGHT - 1) // BLOCK_HEIGHT
    if is_large(boxes, s) and footprints[s, 4] > 0.0:
        return ellipse_cover(footprints, rows, s, tile_x, tile_y, (first, last, top, bottom))
    columns = ((1 << last) - (1 << first)) * EVERY_ROW
    return columns & ((1 << (BLOCK_COLUMNS * bottom)) - (1 << (BLOCK_COLUMNS * top)))


@device
def ellipse_cover(footprints, rows, s, tile_x, tile_y, limits):
    """Cover of splat s by its footprint, within the block ranges `limits` (first, last column, top, bottom row)."""
    cover = 0
    a, b = np.float64(rows[s, 2]), np.float64(rows[s, 3])
    origin_x, origin_y = np.float64(rows[s, 0]) - 0.5 - tile_x, np.float64(rows[s, 1]) - 0.5 - tile_y
    for row in range(limits[2], limits[3]):
        low = row * BLOCK_HEIGHT - origin_y
        left, right = span_of_band(footprints, s, a, b, low, low + (BLOCK_HEIGHT - 1))
        if left <= right:
            first = max(limits[0], math.ceil(left + origin_x) // BLOCK_WIDTH)
            last = min(limits[1], math.floor(right + origin_x) // BLOCK_WIDTH + 1)
            if first < last:
                cover |= ((1 << last) - (1 << first)) << (BLOCK_COLUMNS * row)
    return cover


@device
def splat_shape(rows, s, tile_x, tile_y):
    """What `block_alpha` needs of splat s: (-a/2, -b, -c/2) log2(e), opacity, and its mean (x, y) in the tile."""
    real = rows.dtype.type
    return (
        broadcast(real(-0.5 * LOG2_E) * rows[s, 2]),
        broadcast(real(-LOG2_E) * rows[s, 3]),
        broadcast(real(-0.5 * LOG2_E) * rows[s, 4]),
        broadcast(rows[s, 5]),
        broadcast(rows[s, 0] - real(tile_x)),
        broadcast(rows[s, 1] - real(tile_y)),
    )


@device
def splat_colour(rows, s):
    """Red, green and blue of splat s."""
    return broadcast(rows[s, 6]), broadcast(rows[s, 7]), broadcast(rows[s, 8])


@device
def offsets(pixels, at, shape):
    """(dx, dy) from the splat's mean to the pixels of the block at `at`."""
    return load(pixels, at + CENTRE_X) - shape[4], load(pixels, at + CENTRE_Y) - shape[5]


@device
def block_alpha(shape, dx, dy, constants):
    """Opacity * exp(-(a dx^2 + c dy^2) / 2 - b dx dy), at most 0.99, and 0 where it is below 1/255.

    The one expression that every kernel evaluates.
    """
    alpha_max, alpha_min = constants[1], constants[2]
    power = fma(fma(shape[0], dx, shape[1] * dy), dx, shape[2] * dy * dy)
    uncapped = shape[3] * exp2(power, constants[FIRST_OF_EXP2:])
    alpha = select_gt(uncapped, alpha_max, alpha_max, uncapped)
    return select_ge(uncapped, alpha_min, alpha, zeros_like(alpha))


@device
def write_alphas(constants, shape, cover, pixels, num_planes, alphas):
    """Write alpha of the blocks of `cover` to `alphas`, one after the other.

    Apart from what is done with alpha: together they would be one chain of dependent instructions, too long for the
    processor to look beyond. Two short ones overlap with those of the blocks behind them.
    """
    at_alpha = 0
    while cover != 0:
        dx, dy = offsets(pixels, lowest_bit(cover) * num_planes * LANES, shape)
        cover &= cover - 1
        store(alphas, at_alpha, block_alpha(shape, dx, dy, constants))
        at_alpha += LANES


@device
def advance(before, effective, constants):
    """(transmittance behind, weight a T) of pixels with transmittance `before` and `effective` = mask * alpha.

    A pixel ends before the splat that would bring T below 1e-4: it keeps its T with a minus sign, and the weight is 0.
    """
    minimum = constants[3]
    product = before * effective
    after = before - product
    # Of an ended pixel `after` is negative as well: it stays as it is.
    light = select_ge(after, minimum, after, minus_magnitude(before))
    return light, select_ge(after, minimum, product, zeros_like(product))


@device
def prefetch_splat(position, stop, splats, rows, boxes):
    """Ask for the splat that the tile will need PREFETCH_AHEAD positions later: lists jump about in memory."""
    s = splats[min(position + PREFETCH_AHEAD, stop - 1)]
    prefetch_row(rows, s)
    prefetch_row(boxes, s)


def tile_constants(dtype: Any) -> Array:
    """The numbers (NUM_CONSTANTS,) that the kernels compare with and raise 2 to a power by, for `vectors_of`."""
    numbers = np.zeros(NUM_CONSTANTS, dtype)
    values = (1.0, ALPHA_MAX, ALPHA_MIN, TRANSMITTANCE_MIN, *exp2_constants(dtype))
    numbers[: len(values)] = values
    return numbers
