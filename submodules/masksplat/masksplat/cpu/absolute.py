# SPDX-License-Identifier: Apache-2.0
"""Sums over pixels of |dL/d mean2d| (AbsGS, Ye et al. 2024): the backward of rasterize_backward.py, for this alone.

It walks as that one does, over the covers that the forward left, but knows any number D of channels and takes each
pixel's size before it adds up. Splats with m = 0 have no gradient of their means.
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
    minus_magnitude,
    select_gt,
    store,
    vectors_of,
    zeros_like,
)
from masksplat.cpu.tile import (
    LIGHT,
    NUM_BLOCKS,
    NUM_CONSTANTS,
    advance,
    blank_tile,
    offsets,
    plane_index,
    splat_shape,
    start_tile,
    write_alphas,
)
from masksplat.types import TILE

BEHIND, FIRST_CHANNEL = LIGHT + LANES, LIGHT + 2 * LANES
PLANES_BESIDE_CHANNELS = 4


@kernel
def absolute_tiles(
    task, num_tasks, constants, rows, colours, tile_offsets, splats, instances, region, ends, covers, d_image, behind,
    sums,
):  # fmt: skip
    """Write the sums (I, 2) of every instance of the tiles task, task + num_tasks, ..., which begin as zeros."""
    num_planes = PLANES_BESIDE_CHANNELS + colours.shape[1]
    blank = blank_tile(num_planes, rows)
    pixels = np.empty_like(blank)
    alphas = np.empty(NUM_BLOCKS * LANES, rows.dtype)
    numbers = vectors_of(constants, NUM_CONSTANTS)
    for tile in range(task, tile_offsets.size - 1, num_tasks):
        tile_x = (tile % region[2]) * TILE
        tile_y = region[0] + (tile // region[2]) * TILE
        width, height = min(TILE, region[3] - tile_x), min(TILE, region[1] - tile_y)
        start_tile(pixels, blank, num_planes, width, height)
        for y in range(height):
            for x in range(width):
                at = plane_index(x, y, num_planes)
                pixels[at + BEHIND] = behind[tile_y - region[0] + y, tile_x + x]
                for channel in range(colours.shape[1]):
                    g = d_image[tile_y - region[0] + y, tile_x + x, channel]
                    pixels[at + FIRST_CHANNEL + channel * LANES] = g
        for position in range(tile_offsets[tile], ends[tile]):
            s = splats[position]
            if rows[s, 9] != 0:
                sum_sizes(
                    numbers, rows, colours, s, covers[position], tile_x, tile_y, num_planes, pixels, alphas,
                    sums, instances[position],
                )  # fmt: skip


@device
def sum_sizes(constants, rows, colours, s, cover, tile_x, tile_y, num_planes, pixels, alphas, sums, instance):
    """The two sums of splat s over the blocks of `cover`."""
    one, alpha_max, mask = constants[0], constants[1], broadcast(rows[s, 9])
    a, b, c = broadcast(rows[s, 2]), broadcast(rows[s, 3]), broadcast(rows[s, 4])
    shape = splat_shape(rows, s, tile_x, tile_y)
    zero = minus_x = minus_y = zeros_like(one)
    write_alphas(constants, shape, cover, pixels, num_planes, alphas)
    at_alpha = 0
    while cover != 0:
        at = lowest_bit(cover) * num_planes * LANES
        cover &= cover - 1
        alpha = load(alphas, at_alpha)
        at_alpha += LANES
        effective = mask * alpha
        light, weight = advance(load(pixels, at + LIGHT), effective, constants)
        store(pixels, at + LIGHT, light)
        odds = select_gt(light, zero, effective / (one - effective), zero)
        g_colour = zero
        for channel in range(colours.shape[1]):
            g = load(pixels, at + FIRST_CHANNEL + channel * LANES)
            g_colour = fma(g, broadcast(colours[s, channel]), g_colour)
        share = weight * g_colour
        remaining = load(pixels, at + BEHIND) - share
        store(pixels, at + BEHIND, remaining)
        power = select_gt(alpha_max, alpha, share - remaining * odds, zero)
        dx, dy = offsets(pixels, at, shape)
        minus_x = minus_x + minus_magnitude(power * fma(a, dx, b * dy))
        minus_y = minus_y + minus_magnitude(power * fma(b, dx, c * dy))
    sums[instance, 0], sums[instance, 1] = -horizontal_sum(minus_x), -horizontal_sum(minus_y)


@kernel
def sum_pairs(instance_offsets, sums, total):
    """Add the instances of each splat, in tile order, to total (V, 2)."""
    for s in range(total.shape[0]):
        for instance in range(instance_offsets[s], instance_offsets[s + 1]):
            total[s, 0] += sums[instance, 0]
            total[s, 1] += sums[instance, 1]
