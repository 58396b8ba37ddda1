# SPDX-License-Identifier: Apache-2.0
"""Blending weights alpha * T per splat: their maximum (RadSplat) and sum (Mini-Splatting) over accepted pixels."""

from __future__ import annotations

import numpy as np

from masksplat.cpu.kernel import device, kernel
from masksplat.cpu.simd import LANES, any_positive, broadcast, load, select_gt, store
from masksplat.cpu.tile import (
    BLOCK_COLUMNS,
    BLOCK_HEIGHT,
    BLOCK_WIDTH,
    TILE_PIXELS,
    advance,
    any_alive,
    block_alpha,
    block_columns,
    block_rows,
    constants,
    lane_offsets,
    splat_shape,
    start_transmittance,
)
from masksplat.types import TILE


@kernel
def score_tiles(task, num_tasks, rows, boxes, footprints, tile_offsets, splats, instances, region, scores):
    """scores[instance] = (max, sum) of m alpha T over the tile's accepted pixels."""
    light, weights = np.empty(TILE_PIXELS, rows.dtype), np.empty(LANES, rows.dtype)
    lanes = np.empty(16, rows.dtype)
    lane_offsets(lanes)
    for tile in range(task, tile_offsets.size - 1, num_tasks):
        tile_x = (tile % region[2]) * TILE
        tile_y = region[0] + (tile // region[2]) * TILE
        start_transmittance(light, min(TILE, region[3] - tile_x), min(TILE, region[1] - tile_y))
        for position in range(tile_offsets[tile], tile_offsets[tile + 1]):
            s = splats[position]
            out = instances[position]
            scores[out, 0], scores[out, 1] = 0, 0
            if rows[s, 9] != 0 and any_alive(light):
                score(rows, boxes, footprints, s, tile_x, tile_y, lanes, light, weights, scores, out)


@device
def score(rows, boxes, footprints, s, tile_x, tile_y, lanes, light, weights, scores, out):
    """Pass one splat over the tile and add its blending weights to scores[out] = (max, sum)."""
    real = light.dtype.type
    limits = constants(light)
    zero = limits[0]
    form, lane_x, lane_y = splat_shape(rows, s, lanes, tile_x, tile_y)
    mask = broadcast(rows[s, 9])
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
            if any_positive(select_gt(before, zero, alpha, zero)):
                store_weights(advance(light, at, before, mask * alpha, zero), weights, scores, out)


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
