# SPDX-License-Identifier: Apache-2.0
"""Blending weights alpha * T per splat: their maximum (RadSplat) and sum (Mini-Splatting) over accepted pixels."""

from __future__ import annotations

import numpy as np

from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import LANES, broadcast, load, lowest_bit, store, vectors_of
from masksplat.cpu.tile import (
    CHECK_EVERY,
    LIGHT,
    NUM_CONSTANTS,
    advance,
    blank_tile,
    block_alpha,
    cover_of,
    living_blocks,
    offsets,
    splat_shape,
    start_tile,
)
from masksplat.types import TILE

NUM_PLANES = 3


@kernel
def score_tiles(task, num_tasks, constants, rows, boxes, footprints, tile_offsets, splats, instances, region, scores):
    """scores[instance] = (max, sum) of m alpha T over the tile's accepted pixels."""
    blank, weights = blank_tile(NUM_PLANES, rows), np.empty(LANES, rows.dtype)
    pixels = np.empty_like(blank)
    numbers = vectors_of(constants, NUM_CONSTANTS)
    for tile in range(task, tile_offsets.size - 1, num_tasks):
        tile_x = (tile % region[2]) * TILE
        tile_y = region[0] + (tile // region[2]) * TILE
        start_tile(pixels, blank, NUM_PLANES, min(TILE, region[3] - tile_x), min(TILE, region[1] - tile_y))
        start, alive = tile_offsets[tile], 0
        for position in range(start, tile_offsets[tile + 1]):
            if (position - start) % CHECK_EVERY == 0:
                alive = living_blocks(pixels, NUM_PLANES)
            s, out = splats[position], instances[position]
            scores[out, 0], scores[out, 1] = 0, 0
            if rows[s, 9] != 0 and alive != 0:
                cover = cover_of(boxes, footprints, rows, s, tile_x, tile_y) & alive
                score(numbers, rows, s, cover, tile_x, tile_y, pixels, weights, scores, out)


@device
def score(constants, rows, s, cover, tile_x, tile_y, pixels, weights, scores, out):
    """Pass one splat over the blocks of `cover` and add its blending weights to scores[out] = (max, sum)."""
    shape, mask = splat_shape(rows, s, tile_x, tile_y), broadcast(rows[s, 9])
    while cover != 0:
        at = lowest_bit(cover) * NUM_PLANES * LANES
        cover &= cover - 1
        dx, dy = offsets(pixels, at, shape)
        alpha = block_alpha(shape, dx, dy, constants)
        light, weight = advance(load(pixels, at + LIGHT), mask * alpha, constants)
        store(pixels, at + LIGHT, light)
        store_weights(weight, weights, scores, out)


@device
def store_weights(weight, weights, scores, out):
    """Fold the lanes of `weight` into scores[out] = (max, sum)."""
    store(weights, 0, weight)
    for lane in range(LANES):
        scores[out, 0] = max(scores[out, 0], weights[lane])
        scores[out, 1] += weights[lane]


@kernel
def sum_scores(instance_offsets, scores, maximum, total):
    """Reduce instance scores to splats."""
    for s in range(maximum.size):
        for instance in range(instance_offsets[s], instance_offsets[s + 1]):
            maximum[s] = max(maximum[s], scores[instance, 0])
            total[s] += scores[instance, 1]
