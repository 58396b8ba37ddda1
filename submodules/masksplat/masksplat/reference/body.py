# SPDX-License-Identifier: Apache-2.0
"""`ReferenceBody`: the ops of masksplat in plain torch, with every backward taken by autograd.

`project` and `rasterize` are differentiable themselves when their inputs require gradients. Their `_backward`
twins need no graph: they recompute the forward, the rasterizer one batch of tiles at a time.

Legend: N Gaussians, B views, M packed splats, V splats of one view, h, w pixels of a region.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masksplat.lazy import LazyRows
from masksplat.reference import adam as adam_module
from masksplat.reference import photometric as photometric_module
from masksplat.reference.absolute import absolute_gradients
from masksplat.reference.compositing import (
    PIXELS,
    Region,
    TileBatch,
    TileLists,
    composite_batch,
    image_to_tiles,
    iterate_chunks,
    listed_rows,
    pad_rows,
    tile_batches,
    tile_lists,
    tiles_to_image,
)
from masksplat.reference.projection import pinhole, project, splat_rows, take
from masksplat.statistics import add_statistics
from masksplat.types import (
    AdamStep,
    Frame,
    GaussianGradients,
    Gaussians,
    ImageGradient,
    Optimizer,
    PhotometricLoss,
    ProjectionSettings,
    Splats,
    Statistics,
    Views,
    empty_like_gradients,
)


def _region(size: tuple[int, int], rows: tuple[int, int] | None) -> Region:
    width, height = size
    first, last = (0, height) if rows is None else rows
    if not 0 <= first <= last <= height:
        raise ValueError(f"pixel rows {rows} do not lie in an image of {height} rows.")
    return Region(width, first, last)


def _lists_of_view(splats: Splats, view: int, region: Region) -> TileLists:
    first, last = splats.view_range(view)
    part = slice(first, last)
    return tile_lists(splats.rows[part].detach(), splats.boxes[part], splats.depths[part], splats.ids[part], region)


class ReferenceBody:
    """Plain torch on any device; see `masksplat.ops.Body` for the contract of each function."""

    name = "reference"

    def project(
        self,
        gaussians: Gaussians,
        views: Views,
        settings: ProjectionSettings,
        *,
        masks: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Splats:
        """Packed splats of every view; `rows` is differentiable."""
        return project(gaussians, views, settings, masks=masks, ids=ids)

    def project_backward(
        self, gaussians: Gaussians, views: Views, settings: ProjectionSettings, splats: Splats, d_rows: Tensor
    ) -> GaussianGradients:
        """Gradients of the parameters and masks from `d_rows` (M, 10), summed over views."""
        total = empty_like_gradients(gaussians)
        for view in range(len(views)):
            part = slice(*splats.view_range(view))
            index = splats.gaussians[part].long()
            selected = take(gaussians, index)
            leaves = [getattr(selected, name).detach().requires_grad_() for name in GaussianGradients._fields[:-1]]
            masks = splats.rows[part, 9].detach().requires_grad_()
            with torch.enable_grad():
                rows = splat_rows(Gaussians(*leaves), masks, pinhole(views, view), settings)
            wanted = torch.autograd.grad(rows, [*leaves, masks], d_rows[part], materialize_grads=True)
            for sums, gradient in zip(total, wanted, strict=True):
                sums.index_add_(0, index, gradient)
        return total

    def project_backward_update(
        self,
        gaussians: Gaussians,
        views: Views,
        settings: ProjectionSettings,
        splats: Splats,
        d_rows: Tensor,
        *,
        optimizer: Optimizer,
        statistics: Statistics,
        gradient_scale: float = 1.0,
    ) -> Tensor:
        """`project_backward`, Adam and the densify statistics, in place; returns the scaled mask gradient (N,)."""
        *gradients, d_masks = self.project_backward(gaussians, views, settings, splats, d_rows)
        add_statistics(statistics, views, splats, d_rows)
        table = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.sh0, gaussians.shN)
        for param, gradient, *moments, step in zip(
            table, gradients, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.steps, strict=True
        ):
            self.adam(param, gradient * gradient_scale, moments[0], moments[1], step)
        return d_masks * gradient_scale

    def rasterize(
        self,
        splats: Splats,
        view: int,
        size: tuple[int, int],
        background: Tensor,
        *,
        rows: tuple[int, int] | None = None,
        has_backward: bool = True,
    ) -> Frame:
        """Pixels of one view's rows; rgb and transmittance are differentiable in `splats.rows` and `background`.

        What autograd keeps is decided by the inputs, not by `has_backward`.
        """
        region = _region(size, rows)
        first, last = splats.view_range(view)
        padded = pad_rows(splats.rows[first:last])
        lists = _lists_of_view(splats, view, region)
        num_tiles = region.tile_rows * region.columns
        pairs = torch.zeros(num_tiles, dtype=torch.int64, device=padded.device)
        tiles, values = [], []
        for batch in tile_batches(lists, last - first):
            pixels = composite_batch(listed_rows(padded, batch), padded[-1], batch, region, background)
            tiles.append(batch.tiles)
            values.append(torch.cat((pixels.rgb, pixels.transmittance[..., None]), dim=-1))
            pairs[batch.tiles] = pixels.pairs
        empty = torch.cat((background, background.new_ones(1))).expand(num_tiles, PIXELS, 4)
        if tiles:
            empty = empty.index_copy(0, torch.cat(tiles), torch.cat(values))
        image = tiles_to_image(empty, region)
        pairs_per_row = pairs.reshape(region.tile_rows, region.columns).sum(dim=1)
        return Frame(
            image[..., :3], image[..., 3], pairs_per_row, view, (region.first, region.last), (lists, background)
        )

    def rasterize_backward(
        self,
        splats: Splats,
        frame: Frame,
        d_rgb: Tensor,
        d_rows: Tensor,
        *,
        d_transmittance: Tensor | None = None,
        overwrite: bool = False,
    ) -> None:
        """Add the gradient of the splats' packed rows into `d_rows` (M, 10), or write it there."""
        lists, background = frame.state
        region = Region(d_rgb.shape[1], *frame.rows)
        first, last = splats.view_range(frame.view)
        padded = pad_rows(splats.rows[first:last].detach())
        d_light = torch.zeros_like(d_rgb[..., 0]) if d_transmittance is None else d_transmittance
        d_tiles = image_to_tiles(torch.cat((d_rgb, d_light[..., None]), dim=-1), region)
        total = torch.zeros_like(padded)
        for batch in tile_batches(lists, last - first):
            gradient = _batch_gradient(padded, batch, region, background.detach(), d_tiles[batch.tiles])
            total.index_add_(0, batch.splats.flatten(), gradient.flatten(0, 1))
        d_rows[first:last] = total[:-1] if overwrite else d_rows[first:last] + total[:-1]

    def absolute_gradients(self, splats: Splats, frame: Frame, gradient: ImageGradient) -> Tensor:
        """See `Body.absolute_gradients`."""
        lists, _ = frame.state
        region = Region(gradient.d_image.shape[1], *frame.rows)
        return absolute_gradients(splats.rows[slice(*splats.view_range(frame.view))].detach(), lists, region, gradient)

    def photometric(
        self,
        rgb: Tensor,
        target: Tensor,
        lambda_dssim: float,
        *,
        own_rows: tuple[int, int] | None = None,
        image_height: int | None = None,
        row_start: int = 0,
    ) -> PhotometricLoss:
        """L1 and SSIM of a region with the gradient."""
        return photometric_module.photometric(
            rgb, target, lambda_dssim, own_rows=own_rows, image_height=image_height, row_start=row_start
        )

    def adam(self, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamStep) -> None:
        """Update `param` and its moments in place."""
        adam_module.adam(param, grad, exp_avg, exp_avg_sq, step)

    @torch.no_grad()
    def lazy_rows(self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: int) -> LazyRows | None:
        """See `Body.lazy_rows`; every update is dense."""
        return None

    def blend_scores(
        self, splats: Splats, view: int, size: tuple[int, int], *, rows: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maximum and sum over pixels of the blend weight m alpha T of each splat of `view`, both (V,)."""
        region = _region(size, rows)
        first, last = splats.view_range(view)
        padded = pad_rows(splats.rows[first:last].detach())
        largest, total = padded.new_zeros(len(padded)), padded.new_zeros(len(padded))
        for batch in tile_batches(_lists_of_view(splats, view, region), last - first):
            is_pixel = image_to_tiles(padded.new_ones(region.last - region.first, region.width, 1), region)
            for part, weights, _ in iterate_chunks(listed_rows(padded, batch), padded[-1], batch, region):
                chosen, weights = batch.splats[:, part], weights * is_pixel[batch.tiles]
                largest.scatter_reduce_(0, chosen.flatten(), weights.amax(dim=1).flatten(), "amax")
                total.index_add_(0, chosen.flatten(), weights.sum(dim=1).flatten())
        return largest[:-1], total[:-1]


def _batch_gradient(rows: Tensor, batch: TileBatch, region: Region, background: Tensor, d_pixels: Tensor) -> Tensor:
    """(G, L, 10) gradient of one batch's pixels in its listed rows; `d_pixels` (G, P, 4) of rgb and transmittance."""
    leaf = listed_rows(rows, batch).requires_grad_()
    with torch.enable_grad():
        pixels = composite_batch(leaf, rows[-1], batch, region, background)
    (gradient,) = torch.autograd.grad(
        (pixels.rgb, pixels.transmittance), leaf, (d_pixels[..., :3].contiguous(), d_pixels[..., 3].contiguous())
    )
    return gradient
