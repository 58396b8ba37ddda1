# SPDX-License-Identifier: Apache-2.0
"""Which pixels a splat can reach: the ellipse where alpha >= 1/255, cut into horizontal bands.

With d = (dx, dy) from the mean, alpha = o * exp(-q / 2) with q = a dx^2 + 2 b dx dy + c dy^2, so alpha >= 1/255 inside
q <= t = 2 ln(255 o). For a given dy the ellipse spans dx = (-b dy -+ sqrt(a t - D dy^2)) / a with D = a c - b^2.
The right edge is concave in dy and peaks at dy_star = -b sqrt(t / (c D)), the left edge is its mirror image, so the
extreme over a band of dy is at dy_star clamped to the band. All of it is float64: D cancels for thin splats.
"""

from __future__ import annotations

import math

import numpy as np

from masksplat.cpu.kernel import device
from masksplat.types import ALPHA_MIN, TILE

MARGIN_T = 0.01
"""Added to t, so that rounding of alpha in the kernels never meets a pixel outside the bounds."""

MARGIN_PIXELS = 0.01

RELIABLE = 1e-6
"""Splats with D below this share of a c are not cut by bands: their box alone bounds them."""

LARGE = 16
"""Splats whose box has more columns and more rows than this are cut by bands; for others that costs more than the few
blocks of pixels it saves."""

NUM_FOOTPRINT = 5


@device
def is_large(boxes, s):
    """Whether splat s is worth a footprint."""
    return min(boxes[s, 2] - boxes[s, 0], boxes[s, 3] - boxes[s, 1]) > LARGE


@device
def write_footprint(footprints, rows, boxes, s):
    """footprints[s] = (a t, D, dy_max, dy_star, usable): what `span_of_band` needs of splat s, which is large."""
    footprints[s, 4] = 0.0
    a, b, c = np.float64(rows[s, 2]), np.float64(rows[s, 3]), np.float64(rows[s, 4])
    t = 2.0 * math.log(np.float64(rows[s, 5]) / ALPHA_MIN) + MARGIN_T
    det = a * c - b * b
    if t > 0.0 and det > RELIABLE * a * c:
        footprints[s, 0], footprints[s, 1] = a * t, det
        footprints[s, 2] = math.sqrt(a * t / det)
        footprints[s, 3] = -b * math.sqrt(t / (c * det))
        footprints[s, 4] = 1.0


@device
def span_of_band(footprints, k, a, b, low, high):
    """Range of dx that splat k reaches for dy in [low, high] (pixels); empty is (1, 0)."""
    at, det, dy_max, dy_star = footprints[k, 0], footprints[k, 1], footprints[k, 2], footprints[k, 3]
    low, high = max(low, -dy_max), min(high, dy_max)
    if low > high:
        return 1.0, 0.0
    right_dy = min(max(dy_star, low), high)
    left_dy = min(max(-dy_star, low), high)
    inverse = 1.0 / a
    right = (math.sqrt(max(0.0, at - det * right_dy * right_dy)) - b * right_dy) * inverse
    left = (-b * left_dy - math.sqrt(max(0.0, at - det * left_dy * left_dy))) * inverse
    return left - MARGIN_PIXELS, right + MARGIN_PIXELS


@device
def tiles_of_row(footprints, rows, boxes, k, tile_row, row_start):
    """Half-open range of tile columns that splat k reaches in `tile_row` of the region starting at `row_start`."""
    first, last = boxes[k, 0], boxes[k, 2] - 1  # inclusive pixels
    if is_large(boxes, k) and footprints[k, 4] > 0.0:
        top = max(row_start + tile_row * TILE, boxes[k, 1])
        bottom = min(row_start + (tile_row + 1) * TILE, boxes[k, 3]) - 1
        low, high = top + 0.5 - np.float64(rows[k, 1]), bottom + 0.5 - np.float64(rows[k, 1])
        left, right = span_of_band(footprints, k, np.float64(rows[k, 2]), np.float64(rows[k, 3]), low, high)
        if left > right:
            return 0, 0
        # Pixel x is inside when left <= x + 0.5 - mean_x <= right.
        first = max(first, math.ceil(left + np.float64(rows[k, 0]) - 0.5))
        last = min(last, math.floor(right + np.float64(rows[k, 0]) - 0.5))
        if first > last:
            return 0, 0
    return first // TILE, last // TILE + 1
