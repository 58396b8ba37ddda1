# SPDX-License-Identifier: Apache-2.0
"""An exact count of the (pixel, splat) pairs of a view, splat by splat, without tiles, vectors or bounds of bands.

It is the yardstick of the rates: kernels evaluate more pairs than contribute. It shares no code with the bodies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba as nb
import numpy as np
import torch
from torch import Tensor

from masksplat.types import ALPHA_MAX, ALPHA_MIN, TRANSMITTANCE_MIN, Splats


class PairCount(NamedTuple):
    """Pairs of one or more views.

    footprint: alpha >= 1/255, whatever lies in front. contributing: of these, m > 0 and the pixel goes on behind the
    splat. unsampled: m = 0 and the pixel is alive (only the mask's gradient sees them). num_splats: all splats.
    """

    footprint: int
    contributing: int
    unsampled: int
    num_splats: int

    def plus(self, other: PairCount) -> PairCount:
        """The sums of two counts."""
        return PairCount(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def count_view(splats: Splats, view: int, size: tuple[int, int]) -> tuple[PairCount, Tensor]:
    """The pairs of one view, and the transmittance (h, w) float64 that the count arrives at."""
    first, last = splats.view_range(view)
    width, height = size
    rows = splats.rows[first:last].detach().double().numpy()
    order = np.lexsort((splats.ids[first:last].numpy(), splats.depths[first:last].numpy()))
    light = np.ones((height, width))
    footprint, contributing, unsampled = _count(rows, splats.boxes[first:last].numpy(), order, light)
    return PairCount(footprint, contributing, unsampled, last - first), torch.from_numpy(np.abs(light))


@nb.njit(cache=True)
def _count(rows, boxes, order, light):  # type: ignore[no-untyped-def]
    """Pass every splat in depth order over its box; `light` is negative where a pixel has ended."""
    footprint, contributing, unsampled = 0, 0, 0
    for s in order:
        for y in range(boxes[s, 1], boxes[s, 3]):
            for x in range(boxes[s, 0], boxes[s, 2]):
                dx, dy = x + 0.5 - rows[s, 0], y + 0.5 - rows[s, 1]
                power = -0.5 * (rows[s, 2] * dx * dx + rows[s, 4] * dy * dy) - rows[s, 3] * dx * dy
                alpha = min(ALPHA_MAX, rows[s, 5] * math.exp(power))
                if alpha < ALPHA_MIN:
                    continue
                footprint += 1
                before = light[y, x]
                if before < 0.0:
                    continue
                after = before * (1.0 - rows[s, 9] * alpha)
                if rows[s, 9] == 0.0:
                    unsampled += 1
                elif after < TRANSMITTANCE_MIN:
                    light[y, x] = -before
                else:
                    contributing += 1
                    light[y, x] = after
    return footprint, contributing, unsampled
