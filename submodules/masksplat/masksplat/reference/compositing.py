# SPDX-License-Identifier: Apache-2.0
"""Masked front-to-back compositing of one view's splats, vectorised over tiles, pixels and splats.

For one pixel and its splats i = 1 .. K in depth order (ties by id), with m the mask:

    alpha_i = min(0.99, o_i exp(power_i)), pairs with alpha_i < 1/255 are skipped
    T_1 = 1,  T_{i+1} = T_i (1 - m_i alpha_i),  the pixel ends before the i for which T_{i+1} < 1e-4
    rgb = sum_i m_i alpha_i T_i c_i + T_end background

How it is made fast in torch: only (splat, tile) instances whose alpha >= 1/255 ellipse meets the tile are made (a
quadratic is minimised over each tile in closed form); lists are sorted once for all tiles; tiles with lists of like
length are batched and padded, so that one torch op works on about BATCH_PAIRS (pixel, splat) pairs, few enough to stay
in the cache and many enough to hide the cost of a call; the exponent is separable (a row part, a column part and one
product); sums over splats are matrix products; lists are walked CHUNK splats at a time and a batch stops when all its
pixels have ended. The backward of `rasterize` without a graph recomputes one batch at a time, so that autograd's
saved tensors stay in the cache, too.

Legend: V splats of the view, I instances, G tiles of a batch, L splats of a list or chunk, P = 256 pixels of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from masksplat.types import ALPHA_MAX, ALPHA_MIN, TILE, TRANSMITTANCE_MIN

BATCH_PAIRS = 1 << 18
"""(pixel, splat) pairs that one torch op works on, on a CPU."""

GPU_BATCH_PAIRS = 1 << 25
"""The same on a GPU, where the cost of a call counts and half a gigabyte of pairs does not."""

CHUNK = 128
"""Splats of a list that are composited between two looks at whether every pixel has ended."""

PIXELS = TILE * TILE


@dataclass(frozen=True)
class Region:
    """Pixel rows [first, last) of an image of `width` pixels, cut into tiles from its first row on."""

    width: int
    first: int
    last: int

    @property
    def columns(self) -> int:
        """Tiles in a tile row."""
        return -(-self.width // TILE)

    @property
    def tile_rows(self) -> int:
        """Rows of tiles."""
        return -(-(self.last - self.first) // TILE)


class TileLists(NamedTuple):
    """Splats (I,) of all tiles in depth order, tile after tile, and where each tile's begin (tiles + 1,)."""

    splats: Tensor
    offsets: Tensor


class TileBatch(NamedTuple):
    """G tiles and their padded lists (G, L) of view rows; padding is row V, which never contributes."""

    tiles: Tensor
    splats: Tensor


class TilePixels(NamedTuple):
    """What compositing gives for G tiles: rgb (G, P, 3), transmittance (G, P), pairs composited (G,)."""

    rgb: Tensor
    transmittance: Tensor
    pairs: Tensor


def depth_order(depths: Tensor, ids: Tensor) -> Tensor:
    """Rows front to back, ties of depth in the order of the ids."""
    by_id = torch.argsort(ids, stable=True)
    return by_id[torch.argsort(depths[by_id], stable=True)]


def _instances(boxes: Tensor, region: Region) -> tuple[Tensor, Tensor, Tensor]:
    """Splat, tile column and tile row of every (splat, tile) pair whose pixels the box touches, each (I,)."""
    x0, y0, x1, y1 = boxes.long().unbind(-1)
    y0, y1 = (y0.clamp(min=region.first) - region.first), (y1.clamp(max=region.last) - region.first)
    left, top = x0 // TILE, y0 // TILE
    across = ((x1 - 1) // TILE + 1 - left).clamp(min=0)
    down = torch.where(y1 > y0, (y1 - 1) // TILE + 1 - top, 0)
    counts = across * down
    splat = torch.repeat_interleave(torch.arange(len(boxes), device=boxes.device), counts)
    place = torch.arange(len(splat), device=boxes.device) - (counts.cumsum(0) - counts)[splat]
    width = across[splat]
    return splat, left[splat] + place % width, top[splat] + place // width


def _edge_minimum(along: Tensor, cross: Tensor, offset: Tensor, low: Tensor, high: Tensor, other: Tensor) -> Tensor:
    """Least of along s^2 + 2 cross s offset + other offset^2 for s in [low, high]."""
    s = torch.minimum(torch.maximum(-cross * offset / along, low), high)
    return along * s * s + 2 * cross * s * offset + other * offset * offset


def _reaches_tile(rows: Tensor, left: Tensor, top: Tensor) -> Tensor:
    """(I,) whether the ellipse alpha >= 1/255 of packed rows (I, 10) meets the pixel centres' rectangle of its tile.

    A convex quadratic over a rectangle is least at the centre of the ellipse, if inside, else on an edge.
    """
    x, y, a, b, c, opacity = rows[:, :6].double().unbind(-1)
    low_x, low_y = left * TILE + 0.5 - x, top + 0.5 - y
    high_x, high_y = low_x + (TILE - 1), low_y + (TILE - 1)
    inside = (low_x <= 0) & (high_x >= 0) & (low_y <= 0) & (high_y >= 0)
    least = _edge_minimum(a, b, low_y, low_x, high_x, c)
    least = torch.minimum(least, _edge_minimum(a, b, high_y, low_x, high_x, c))
    least = torch.minimum(least, _edge_minimum(c, b, low_x, low_y, high_y, a))
    least = torch.minimum(least, _edge_minimum(c, b, high_x, low_y, high_y, a))
    return inside | (least <= 2.0 * torch.log(opacity / ALPHA_MIN) + 0.01)


@torch.no_grad()
def tile_lists(rows: Tensor, boxes: Tensor, depths: Tensor, ids: Tensor, region: Region) -> TileLists:
    """The lists of every tile of the region for the V splats of a view."""
    order = depth_order(depths, ids)
    splat, column, row = _instances(boxes[order], region)
    splat = order[splat]
    reaches = _reaches_tile(rows[splat], column, region.first + row * TILE)
    splat, tile = splat[reaches], (row * region.columns + column)[reaches]
    by_tile = torch.argsort(tile, stable=True)
    counts = torch.bincount(tile, minlength=region.tile_rows * region.columns)
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return TileLists(splat[by_tile], offsets)


def tile_batches(lists: TileLists, padding: int) -> Iterator[TileBatch]:
    """Tiles grouped by like length of list, longest first, each batch of about BATCH_PAIRS pairs a chunk."""
    counts = lists.offsets[1:] - lists.offsets[:-1]
    tiles = torch.argsort(counts, descending=True)
    lengths = counts[tiles].tolist()  # host sync: the batches are cut on the host
    start, pairs = 0, GPU_BATCH_PAIRS if tiles.is_cuda else BATCH_PAIRS
    while start < len(lengths) and lengths[start] > 0:
        longest = lengths[start]
        stop = start + max(1, pairs // (PIXELS * min(longest, CHUNK)))
        chosen = tiles[start:stop]
        place = torch.arange(longest, device=tiles.device)
        at = lists.offsets[chosen, None] + place
        padded = lists.splats[at.clamp(max=len(lists.splats) - 1)]
        yield TileBatch(chosen, torch.where(place < counts[chosen, None], padded, padding))
        start = stop


def pixel_offsets(rows: Tensor, left: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets dx, dy (G, 16, L) from means of packed rows (G, L, 10) to columns and rows of tiles at `left`, `top`."""
    step = torch.arange(TILE, dtype=rows.dtype, device=rows.device) + 0.5
    dx = (left[:, None] + step)[:, :, None] - rows[:, None, :, 0]
    return dx, (top[:, None] + step)[:, :, None] - rows[:, None, :, 1]


def uncapped_alphas(rows: Tensor, left: Tensor, top: Tensor) -> Tensor:
    """(G, 16, 16, L) opacity exp(power) of packed rows (G, L, 10) at the pixel centres of tiles at `left`, `top`."""
    a, b, c, opacity = rows[..., 2:6].unbind(-1)
    dx, dy = pixel_offsets(rows, left, top)
    of_column = torch.log(opacity)[:, None, :] - 0.5 * a[:, None, :] * dx * dx
    of_row = -0.5 * c[:, None, :] * dy * dy
    power = torch.addcmul(of_row[:, :, None], (b[:, None, :] * dx)[:, None], dy[:, :, None], value=-1.0)
    return torch.exp(power + of_column[:, None])


def masked_alphas(uncapped: Tensor, masks: Tensor) -> Tensor:
    """(G, P, L) m alpha of `uncapped_alphas` and masks (G, L)."""
    alpha = uncapped.clamp(max=ALPHA_MAX)
    return (torch.where(alpha >= ALPHA_MIN, alpha, 0.0) * masks[:, None, None]).flatten(1, 2)


def chunk_weights(
    rows: Tensor, left: Tensor, top: Tensor, through: Tensor, light: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Blend weights m alpha T of one chunk of a batch.

    Args:
        rows: (G, 1 + L, 10) packed rows whose first one never contributes.
        left, top: (G,) pixel corner of each tile.
        through: (G, P) product of all 1 - m alpha so far, below TRANSMITTANCE_MIN in a pixel that has ended.
        light: (G, P) transmittance so far.

    Returns:
        weights (G, P, L), through and light after the chunk.
    """
    masked = masked_alphas(uncapped_alphas(rows, left, top), rows[..., 9])
    product = torch.cumprod(1.0 - masked, dim=-1) * through[..., None]
    before, after = product[..., :-1], product[..., 1:]
    composited = after >= TRANSMITTANCE_MIN  # a prefix of the list, because the product never grows
    weights = torch.where(composited, masked[..., 1:] * before, 0.0)
    last = composited.sum(dim=-1, keepdim=True)
    light = torch.where(through >= TRANSMITTANCE_MIN, product.gather(-1, last)[..., 0], light)
    return weights, product[..., -1], light


def pad_rows(rows: Tensor) -> Tensor:
    """(V + 1, 10) with a last row that no pixel sees: opacity far below 1/255, mask 0."""
    nothing = rows.new_zeros(1, rows.shape[1])
    nothing[0, 5] = 1e-6
    return torch.cat((rows, nothing))


def listed_rows(rows: Tensor, batch: TileBatch) -> Tensor:
    """(G, L, 10) rows of a batch's lists, of `rows` (V + 1, 10) from `pad_rows`."""
    return rows.index_select(0, batch.splats.flatten()).unflatten(0, batch.splats.shape)


def tile_corners(batch: TileBatch, region: Region, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Left and top pixel (G,) of a batch's tiles."""
    left = (batch.tiles % region.columns * TILE).to(dtype)
    return left, (batch.tiles // region.columns * TILE + region.first).to(dtype)


def iterate_chunks(
    listed: Tensor, nothing: Tensor, batch: TileBatch, region: Region
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """List positions, weights (G, P, L) and light (G, P) behind them, chunk after chunk.

    `listed` (G, L, 10) as from `listed_rows`, `nothing` (10,) the padding row.
    """
    left, top = tile_corners(batch, region, listed.dtype)
    light = through = listed.new_ones(len(listed), PIXELS)
    leading = nothing.expand(len(listed), 1, -1)
    for start in range(0, listed.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        weights, through, light = chunk_weights(torch.cat((leading, listed[:, part]), 1), left, top, through, light)
        yield part, weights, light
        if bool((through < TRANSMITTANCE_MIN).all()):  # host sync: early end
            return


def composite_batch(
    listed: Tensor, nothing: Tensor, batch: TileBatch, region: Region, background: Tensor
) -> TilePixels:
    """Pixels of one batch of tiles, differentiable in `listed` (G, L, 10) and `background` (3,)."""
    rgb = listed.new_zeros(len(listed), PIXELS, 3)
    light = listed.new_ones(len(listed), PIXELS)
    pairs = torch.zeros(len(listed), dtype=torch.int64, device=listed.device)
    is_splat = listed[..., 5].detach() >= ALPHA_MIN
    for part, weights, behind in iterate_chunks(listed, nothing, batch, region):
        rgb = torch.baddbmm(rgb, weights, listed[:, part, 6:9])
        light = behind
        pairs += PIXELS * is_splat[:, part].sum(dim=1)
    return TilePixels(rgb + light[..., None] * background, light, pairs)


def tiles_to_image(values: Tensor, region: Region) -> Tensor:
    """(h, w, C) image of tiles (tiles, P, C)."""
    image = values.reshape(region.tile_rows, region.columns, TILE, TILE, values.shape[-1]).transpose(1, 2)
    image = image.reshape(region.tile_rows * TILE, region.columns * TILE, values.shape[-1])
    return image[: region.last - region.first, : region.width]


def image_to_tiles(image: Tensor, region: Region) -> Tensor:
    """(tiles, P, C) of an image (h, w, C), padded with zeros: the adjoint of `tiles_to_image`."""
    padded = image.new_zeros(region.tile_rows * TILE, region.columns * TILE, image.shape[-1])
    padded[: image.shape[0], : image.shape[1]] = image
    tiles = padded.reshape(region.tile_rows, TILE, region.columns, TILE, image.shape[-1]).transpose(1, 2)
    return tiles.reshape(region.tile_rows * region.columns, PIXELS, image.shape[-1])
