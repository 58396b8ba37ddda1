# SPDX-License-Identifier: Apache-2.0
"""What the three tile kernels (forward, backward, scores) share: the layout of a tile and alpha of a block.

A tile of 16 x 16 pixels is 8 x 4 blocks of 2 rows x 4 columns; one block is one vector. Per-pixel values of a tile
live in arrays of 256, block after block: pixel (x, y) of the tile is lane (y % 2) * 4 + x % 4 of block
(y // 2) * 4 + x // 4. A pixel that has ended, or lies outside the region, has a transmittance <= 0.
"""

from __future__ import annotations

import math

import numpy as np

from masksplat.cpu.exponential import exp
from masksplat.cpu.footprint import span_of_band
from masksplat.cpu.kernel import device
from masksplat.cpu.simd import any_positive, broadcast, fma, load, prefetch, select_ge, select_gt, store
from masksplat.types import ALPHA_MAX, ALPHA_MIN, TILE, TRANSMITTANCE_MIN

BLOCK_WIDTH, BLOCK_HEIGHT = 4, 2
BLOCK_COLUMNS = TILE // BLOCK_WIDTH
TILE_PIXELS = TILE * TILE
PREFETCH_AHEAD = 8
CHECK_EVERY = 16
"""Splats between two tests whether every pixel of the tile has ended."""


@device
def lane_offsets(lanes):
    """Fill lanes (16,) with the x (first 8) and y (last 8) offsets of the pixel centres of a block."""
    for lane in range(8):
        lanes[lane] = lane % BLOCK_WIDTH + 0.5
        lanes[8 + lane] = lane // BLOCK_WIDTH + 0.5


@device
def tile_index(x, y):
    """Position of the tile's pixel (x, y) in a per-tile array."""
    block = (y // BLOCK_HEIGHT) * BLOCK_COLUMNS + x // BLOCK_WIDTH
    return block * 8 + (y % BLOCK_HEIGHT) * BLOCK_WIDTH + x % BLOCK_WIDTH


@device
def block_rows(boxes, s, tile_x, tile_y):
    """Half-open ranges (row_first, row_last, column_first, column_last) of blocks that splat s's pixel box touches."""
    x0, x1 = max(boxes[s, 0] - tile_x, 0), min(boxes[s, 2] - tile_x, TILE)
    y0, y1 = max(boxes[s, 1] - tile_y, 0), min(boxes[s, 3] - tile_y, TILE)
    return (
        y0 // BLOCK_HEIGHT,
        (y1 + BLOCK_HEIGHT - 1) // BLOCK_HEIGHT,
        x0 // BLOCK_WIDTH,
        (x1 + BLOCK_WIDTH - 1) // BLOCK_WIDTH,
    )


@device
def block_columns(footprints, rows, s, tile_x, block_y, first, last):
    """Narrow the half-open block columns [first, last) of the block row at pixel `block_y` to the splat's ellipse."""
    # A narrow splat has no footprint; asking its box instead spares a cache line.
    if last - first < 3 or footprints[s, 4] == 0.0:
        return first, last
    low = block_y + 0.5 - np.float64(rows[s, 1])
    left, right = span_of_band(
        footprints, s, np.float64(rows[s, 2]), np.float64(rows[s, 3]), low, low + (BLOCK_HEIGHT - 1)
    )
    if left > right:
        return 0, 0
    origin = np.float64(rows[s, 0]) - 0.5 - tile_x
    narrowed_first = max(first, math.ceil(left + origin) // BLOCK_WIDTH)
    return narrowed_first, min(last, math.floor(right + origin) // BLOCK_WIDTH + 1)


@device
def splat_shape(rows, s, lanes, tile_x, tile_y):
    """What `block_alpha` and the block loops need of splat s: (-a/2, -b, -c/2, opacity), and the lanes' offsets
    (x, y) from the mean to the pixels of the tile's first block."""
    real = rows.dtype.type
    form = (
        broadcast(real(-0.5) * rows[s, 2]),
        broadcast(-rows[s, 3]),
        broadcast(real(-0.5) * rows[s, 4]),
        broadcast(rows[s, 5]),
    )
    lane_x = load(lanes, 0) - broadcast(rows[s, 0] - real(tile_x))
    lane_y = load(lanes, 8) - broadcast(rows[s, 1] - real(tile_y))
    return form, lane_x, lane_y


@device
def splat_colour(rows, s):
    """Red, green and blue of splat s."""
    return broadcast(rows[s, 6]), broadcast(rows[s, 7]), broadcast(rows[s, 8])


@device
def block_alpha(form, dx, dy, limits):
    """(alpha, uncapped) with uncapped = opacity * exp(-(a dx^2 + c dy^2) / 2 - b dx dy); alpha is at most 0.99, or 0.

    `limits` comes from `constants`. The one expression that every kernel evaluates.
    """
    half_a, b, half_c, opacity = form
    zero, alpha_max, alpha_min = limits
    uncapped = opacity * exp(fma(fma(half_a, dx, b * dy), dx, half_c * dy * dy))
    alpha = select_gt(uncapped, alpha_max, alpha_max, uncapped)
    return select_ge(alpha, alpha_min, alpha, zero), uncapped


@device
def any_alive(transmittance):
    """True while some pixel of the tile has not ended."""
    for at in range(0, TILE_PIXELS, 8):
        if any_positive(load(transmittance, at)):
            return True
    return False


@device
def prefetch_splat(splats, position, stop, rows, boxes):
    """Ask for the splat that the tile will need PREFETCH_AHEAD positions later: lists jump about in memory."""
    s = splats[min(position + PREFETCH_AHEAD, stop - 1)]
    prefetch(rows, s)
    prefetch(boxes, s)


@device
def start_transmittance(transmittance, width, height):
    """1 for the tile's pixels inside width x height, -1 (ended) for those outside."""
    one = transmittance.dtype.type(1)
    for y in range(TILE):
        for x in range(TILE):
            transmittance[tile_index(x, y)] = one if x < width and y < height else -one


@device
def advance(transmittance, at, before, effective, zero):
    """Let the lanes `before` (> 0: alive) pass a splat of `effective` = mask * alpha; returns the weight a T.

    The pixel ends before the splat that would bring T below 1e-4: then the weight is 0 and -T is stored.
    """
    real = transmittance.dtype.type
    after = before - before * effective
    minimum = broadcast(real(TRANSMITTANCE_MIN))
    kept = select_ge(after, minimum, after, zero - before)
    store(transmittance, at, select_gt(before, zero, kept, before))
    weight = select_ge(after, minimum, before * effective, zero)
    return select_gt(before, zero, weight, zero)


@device
def constants(array):
    """(zero, alpha_max, alpha_min) as vectors of the array's dtype."""
    real = array.dtype.type
    return broadcast(real(0)), broadcast(real(ALPHA_MAX)), broadcast(real(ALPHA_MIN))
