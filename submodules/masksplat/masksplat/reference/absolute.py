# SPDX-License-Identifier: Apache-2.0
"""Sums over pixels of |dL/d mean2d| (AbsGS, Ye et al. 2024), from the formulas of docs/masks.md, in plain torch.

With g = dL/dC, a_i = m_i alpha_i and S_i what lies behind splat i,
    dL/da_i = T_i g . c_i - S_i / (1 - a_i),   dL/dpower_i = a_i dL/da_i, 0 where alpha_i is capped,
    dL/d(mean_x, mean_y) = dL/dpower (a dx + b dy, b dx + c dy) of each pixel, with the conic a, b, c.

Legend: V splats of the view, G tiles of a batch, L splats of a list or chunk, P = 256 pixels of a tile, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masksplat.reference.compositing import (
    CHUNK,
    PIXELS,
    Region,
    TileBatch,
    TileLists,
    image_to_tiles,
    listed_rows,
    masked_alphas,
    pad_rows,
    pixel_offsets,
    tile_batches,
    tile_corners,
    uncapped_alphas,
)
from masksplat.types import ALPHA_MAX, TRANSMITTANCE_MIN, ImageGradient


@torch.no_grad()
def absolute_gradients(rows: Tensor, lists: TileLists, region: Region, gradient: ImageGradient) -> Tensor:
    """(V, 2) sums of |dL/d mean2d| for packed rows (V, 10)."""
    padded = pad_rows(rows)
    colours = torch.cat((gradient.colours, gradient.colours.new_zeros(1, gradient.colours.shape[1])))
    d_tiles = image_to_tiles(gradient.d_image, region)
    behind = image_to_tiles(gradient.behind[..., None], region)[..., 0]
    total = rows.new_zeros(len(padded), 2)
    for batch in tile_batches(lists, len(rows)):
        listed = (listed_rows(padded, batch), listed_rows(colours, batch))
        sums = _batch_sums(*listed, batch, region, (d_tiles[batch.tiles], behind[batch.tiles]))
        total.index_add_(0, batch.splats.flatten(), sums.flatten(0, 1))
    return total[:-1]


def _batch_sums(
    listed: Tensor, colours: Tensor, batch: TileBatch, region: Region, pixels: tuple[Tensor, Tensor]
) -> Tensor:
    """(G, L, 2) of listed rows (G, L, 10) with colours (G, L, D); `pixels`: g (G, P, D) and S (G, P)."""
    d_pixels, behind = pixels
    left, top = tile_corners(batch, region, listed.dtype)
    through = listed.new_ones(len(listed), PIXELS)
    parts = []
    for start in range(0, listed.shape[1], CHUNK):
        rows = listed[:, start : start + CHUNK]
        uncapped = uncapped_alphas(rows, left, top)
        masked = masked_alphas(uncapped, rows[..., 9])
        after = torch.cumprod(1.0 - masked, dim=-1) * through[..., None]
        before = torch.cat((through[..., None], after[..., :-1]), dim=-1)
        is_lit = after >= TRANSMITTANCE_MIN  # a prefix of the list, because the product never grows
        g_colour = d_pixels @ colours[:, start : start + CHUNK].mT
        remaining = behind[..., None] - torch.cumsum(torch.where(is_lit, masked * before * g_colour, 0.0), dim=-1)
        d_power = masked * (before * g_colour - remaining / (1.0 - masked))
        d_power = torch.where(is_lit & (uncapped.flatten(1, 2) <= ALPHA_MAX), d_power, 0.0)
        parts.append(_sum_sizes(d_power, rows, left, top))
        through, behind = after[..., -1], remaining[..., -1]
    return torch.cat(parts, dim=1)


def _sum_sizes(d_power: Tensor, rows: Tensor, left: Tensor, top: Tensor) -> Tensor:
    """(G, L, 2) sums over pixels of |dL/d mean2d| from dL/dpower (G, P, L)."""
    a, b, c = (column[:, None, None] for column in rows[..., 2:5].unbind(-1))
    dx, dy = pixel_offsets(rows, left, top)
    dx, dy = dx[:, None], dy[:, :, None]
    sizes = [d_power.abs() * slope.abs().flatten(1, 2) for slope in (a * dx + b * dy, b * dx + c * dy)]
    return torch.stack([size.sum(dim=1) for size in sizes], dim=-1)
