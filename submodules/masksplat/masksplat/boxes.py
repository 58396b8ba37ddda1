# SPDX-License-Identifier: Apache-2.0
"""Pixel boxes of packed rows, for whoever has the rows but not the boxes that the projection made with them.

In float64, whatever body made the rows: compiled on the CPU, plain torch on other devices.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from masksplat.cpu.boxes import box_rows
from masksplat.types import ALPHA_MIN

MARGIN_T = 0.01
"""Added to t, as in the projection of every body."""

MARGIN_PIXELS = 0.02
"""Twice the projection's margin, so that a projection in float32 never has a pixel more."""

ROUNDINGS = 16.0
"""How many units of the last place of a c the determinant a c - b^2 of a rounded conic may be off, generously."""


def boxes_of_rows(rows: Tensor, limits: Tensor) -> Tensor:
    """(n, 4) int32 x0, y0, x1, y1, half open: pixels where a row can reach alpha 1/255, clipped to its image.

    alpha >= 1/255 inside q(dx, dy) <= t = 2 ln(255 opacity), an ellipse with half extents sqrt(t c / D) and
    sqrt(t a / D), D = a c - b^2. Where a c >> D (long thin splats) D has lost digits to the rounding of a, b and c, and
    so has q in the kernels: both are covered by a share ROUNDINGS eps a c / D, and a D below its own error means the
    whole image. So the box holds every pixel of the projection's box, which was made from the covariance.

    Args: rows: (n, 10), float32 or float64, opacity >= 1/255; limits: (n, 2) or (1, 2) width and height in pixels.
    """
    if rows.device.type == "cpu":
        boxes = np.empty((len(rows), 4), np.int32)
        margins = np.array([MARGIN_T, MARGIN_PIXELS])
        box_rows(rows.detach().contiguous().numpy(), limits.contiguous().numpy(), margins, _error_share(rows), boxes)
        return torch.from_numpy(boxes)
    return torch_boxes_of_rows(rows, limits)


def _error_share(rows: Tensor) -> float:
    return ROUNDINGS * torch.finfo(rows.dtype).eps


def torch_boxes_of_rows(rows: Tensor, limits: Tensor) -> Tensor:
    """`boxes_of_rows` on any device: about 25 small operations."""
    exact = rows[:, :6].double()
    a, b, c = exact[:, 2], exact[:, 3], exact[:, 4]
    product = a * c
    determinant = torch.addcmul(product, b, b, value=-1.0)
    error = product * _error_share(rows)
    t = torch.log(exact[:, 5] / ALPHA_MIN).mul_(2.0).add_(MARGIN_T)
    scale = t * (determinant + error) / (determinant * determinant)
    scale = torch.where(determinant > error, scale, torch.inf)
    reach = torch.sqrt(scale[:, None] * exact[:, 2:5:2]).flip(1).add_(MARGIN_PIXELS)
    middle, limits = exact[:, :2] - 0.5, limits.double()
    # Pixel x is inside when |x + 0.5 - mean_x| <= reach. Clamped before the cast: huge splats overflow int32.
    low = torch.minimum(torch.ceil(middle - reach).clamp_(min=0.0), limits)
    high = torch.minimum(torch.floor(middle + reach).add_(1.0).clamp_(min=0.0), limits)
    return torch.cat([low, high], dim=1).to(torch.int32)
