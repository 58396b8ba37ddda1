# SPDX-License-Identifier: Apache-2.0
"""L1 and SSIM with their gradient on the GPU: two launches of `photometric.cu`; the contract is `Body.photometric`."""

from __future__ import annotations

import torch
from torch import Tensor

from masksplat.cuda.arena import Layout, raw
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
    d_rgb = torch.empty(rgb.shape, dtype=torch.float32, device=rgb.device)
    if own_first >= own_last:
        nothing = torch.zeros(2, dtype=torch.float64, device=rgb.device)
        return PhotometricLoss(nothing, d_rgb.zero_())
    compare_rows, compare_grid = _segments(width, own_last - own_first)
    gradient_rows, gradient_grid = _segments(width, height)
    num_sums = compare_grid[0] * compare_grid[1]
    terms = torch.empty(2, dtype=torch.float64, device=rgb.device)
    scratch = Layout((8 * height * size, 4 * height * size, 16 * num_sums))
    memory = raw(scratch, rgb.device)
    pairs, thirds, sums = scratch.cut(memory)
    region = (height, size, own_first, own_last)
    launcher(
        "photometric.compare", compare_grid, BLOCK, rgb, target, *region, compare_rows, -lambda_dssim / num_values,
        pairs, thirds, sums,
    )  # fmt: skip
    launcher(
        "photometric.gradient", gradient_grid, BLOCK, rgb, target, pairs, thirds, *region, gradient_rows,
        (1.0 - lambda_dssim) / num_values, sums, num_sums, num_values, d_rgb, terms,
    )  # fmt: skip
    return PhotometricLoss(terms, d_rgb)


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
