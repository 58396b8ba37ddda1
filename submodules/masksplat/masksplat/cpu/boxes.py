# SPDX-License-Identifier: Apache-2.0
"""Pixel boxes of packed rows on the CPU; the formula and its reasons are in `masksplat.boxes`."""

from __future__ import annotations

import math

import numpy as np

from masksplat.cpu.kernel import kernel
from masksplat.types import ALPHA_MIN


@kernel
def box_rows(rows, limits, margins, roundings, boxes):
    """Write the box of every row to boxes (n, 4) int32.

    limits: (n, 2) or (1, 2) width and height; margins: (of t, of the reach in pixels); roundings: error of a c - b^2 as
    a share of a c.
    """
    for s in range(rows.shape[0]):
        a, b, c = np.float64(rows[s, 2]), np.float64(rows[s, 3]), np.float64(rows[s, 4])
        determinant, error = a * c - b * b, a * c * roundings
        scale = np.inf
        if determinant > error:
            t = 2.0 * math.log(np.float64(rows[s, 5]) / ALPHA_MIN) + margins[0]
            scale = t * (determinant + error) / (determinant * determinant)
        reach_x, reach_y = math.sqrt(scale * c) + margins[1], math.sqrt(scale * a) + margins[1]
        x, y = np.float64(rows[s, 0]) - 0.5, np.float64(rows[s, 1]) - 0.5
        size = min(s, limits.shape[0] - 1)
        width, height = np.float64(limits[size, 0]), np.float64(limits[size, 1])
        boxes[s, 0] = min(max(math.ceil(x - reach_x), 0.0), width)
        boxes[s, 1] = min(max(math.ceil(y - reach_y), 0.0), height)
        boxes[s, 2] = min(max(math.floor(x + reach_x) + 1.0, 0.0), width)
        boxes[s, 3] = min(max(math.floor(y + reach_y) + 1.0, 0.0), height)
