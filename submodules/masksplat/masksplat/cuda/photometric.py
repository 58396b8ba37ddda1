# SPDX-License-Identifier: Apache-2.0
"""L1 and SSIM with their gradient on the GPU: two launches of `photometric.cu`; the contract is `Body.photometric`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from masksplat.cuda.launcher import Launcher
from masksplat.types import PhotometricLoss

BLOCK = 96
"""Threads of a block; each has two pixels of one channel."""

STRIP = 64
"""Pixels of an image row that a block has."""

MOST_BLOCKS = 528
"""Blocks that run at once on an H200, four a multiprocessor: rows are cut so that they all start together."""

SHORTEST_SEGMENT = 16
"""Rows of a block: ten more are read for their sake, so fewer are not worth a block."""


def photometric(
    launcher: Launcher,
    rgb: Tensor,
    target: Tensor,
    lambda_dssim: float,
    *,
    own_rows: tuple[int, int] | None = None,
    image_height: int | None = None,
    row_start: int = 0,
) -> PhotometricLoss:
    """Loss terms (0-d float64) and gradient of a region; arguments as `Body.photometric`, on the launcher's device.

    Raises:
        ValueError: shapes or types that do not fit.
    """
    height, width, _ = _checked_shape(rgb, target)
    own_first, own_last = own_rows if own_rows is not None else (0, height)
    size, num_values = 3 * width, 3 * width * (image_height if image_height is not None else height)
    d_rgb = torch.empty_like(rgb)
    if own_first >= own_last:
        nothing = torch.zeros(2, dtype=torch.float64, device=rgb.device)
        return PhotometricLoss(nothing[0], nothing[1], d_rgb.zero_())
    pairs, thirds = torch.empty((3, height, size), device=rgb.device).split((2, 1))
    compare_rows, compare_grid = _segments(width, own_last - own_first)
    gradient_rows, gradient_grid = _segments(width, height)
    num_sums = compare_grid[0] * compare_grid[1]
    sums = torch.empty(2 * num_sums + 2, dtype=torch.float64, device=rgb.device)
    result = sums[2 * num_sums :]
    region = (np.int32(height), np.int32(size), np.int32(own_first), np.int32(own_last))
    ssim_weight, l1_weight = np.float32(-lambda_dssim / num_values), np.float32((1.0 - lambda_dssim) / num_values)
    launcher(
        "photometric.compare", compare_grid, BLOCK, rgb, target, *region, np.int32(compare_rows), ssim_weight,
        pairs, thirds, sums,
    )  # fmt: skip
    launcher(
        "photometric.gradient", gradient_grid, BLOCK, rgb, target, pairs, thirds, *region, np.int32(gradient_rows),
        l1_weight, sums, np.int32(num_sums), np.int64(num_values), d_rgb, result,
    )  # fmt: skip
    return PhotometricLoss(result[0], result[1], d_rgb)


def _checked_shape(rgb: Tensor, target: Tensor) -> torch.Size:
    if rgb.dtype != torch.float32 or target.dtype != torch.uint8 or rgb.shape != target.shape or rgb.ndim != 3:
        raise ValueError(
            f"rgb must be (h, w, 3) float32 and target of the same shape uint8; found {tuple(rgb.shape)} {rgb.dtype} "
            f"and {tuple(target.shape)} {target.dtype}."
        )
    return rgb.shape


def _segments(width: int, num_rows: int) -> tuple[int, tuple[int, int]]:
    """Rows of a block and the grid: as many blocks as run at once, if that does not make them too short."""
    strips = -(-width // STRIP)
    wanted = max(1, MOST_BLOCKS // strips)
    rows = max(SHORTEST_SEGMENT, -(-num_rows // wanted))
    return rows, (strips, -(-num_rows // rows))
