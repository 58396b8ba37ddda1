# SPDX-License-Identifier: Apache-2.0
"""`--backend gsplat`: gsplat projects and, without masks, rasterizes; masks are composited by masksplat's kernels.

gsplat's rasterizer knows no masks and caps alpha at 0.999 where 3DGS caps it at 0.99. A run with masks therefore uses
masksplat's compositor for training and evaluation alike; a run without uses gsplat's for both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from masksplat.gsplat.projection import ProjectionState, backward_through_gsplat, project_with_gsplat
from masksplat.lazy import LazyRows
from masksplat.ops import Body
from masksplat.statistics import add_statistics
from masksplat.types import (
    TILE,
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
)

GSPLAT_VERSION = "1.5.3"
INSTALL_LINE = f"pip install gsplat=={GSPLAT_VERSION} (it compiles its kernels at first use, with the CUDA toolkit)"


def import_gsplat() -> Any:
    """The gsplat package, with its kernels. Raises: ImportError that says how to install it, or what is missing."""
    try:
        package = import_module("gsplat")
        import_module("gsplat.cuda._backend")  # builds or loads the kernels
    except ImportError as error:
        raise ImportError(f"--backend gsplat needs gsplat ({error}): {INSTALL_LINE}") from error
    return package


@dataclass(frozen=True)
class _FrameState:
    """What autograd needs of a frame that gsplat drew: the leaf rows (N, 10), and the two images."""

    rows: Tensor
    rgb: Tensor
    transmittance: Tensor


class GsplatBody:
    """gsplat behind `masksplat.ops.Body`, beside masksplat's own body of the same device, which does the rest.

    Args: own: masksplat's body on the device; masked: composite by `own`, which knows masks.
    Raises: ImportError when gsplat is missing.
    """

    name = "gsplat"

    def __init__(self, own: Body, *, masked: bool) -> None:
        self.gsplat = import_gsplat()
        self.own = own
        self.masked = masked

    def project(
        self,
        gaussians: Gaussians,
        views: Views,
        settings: ProjectionSettings,
        *,
        masks: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Splats:
        """See `Body.project`. Raises: ValueError for masks in a body that was made without."""
        if masks is not None and not self.masked:
            raise ValueError("gsplat's rasterizer knows no masks: make the body with masked=True")
        if ids is None:
            ids = torch.arange(len(gaussians), device=gaussians.means.device)
        return project_with_gsplat(self.gsplat, gaussians, views, settings, masks, ids)

    def project_backward(
        self, gaussians: Gaussians, views: Views, settings: ProjectionSettings, splats: Splats, d_rows: Tensor
    ) -> GaussianGradients:
        """See `Body.project_backward`."""
        return backward_through_gsplat(splats, d_rows)

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
        """See `Body.project_backward_update`; gsplat's gradients, then masksplat's Adam, attribute by attribute."""
        gradients = backward_through_gsplat(splats, d_rows)
        add_statistics(statistics, views, splats, d_rows, status=getattr(self.own, "status", None))
        state: ProjectionState = splats.state
        moments = zip(optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.steps, strict=True)
        for leaf, gradient, (exp_avg, exp_avg_sq, step) in zip(state.leaves, gradients[:6], moments, strict=True):
            self.own.adam(leaf.detach(), gradient.mul_(gradient_scale), exp_avg, exp_avg_sq, step)
        return gradients.masks * gradient_scale

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
        """See `Body.rasterize`."""
        if self.masked:
            return self.own.rasterize(splats, view, size, background, rows=rows, has_backward=has_backward)
        span = rows if rows is not None else (0, size[1])
        leaf = splats.rows[slice(*splats.view_range(view))].detach().requires_grad_()
        offsets, indices, per_row = self._tiles(splats, view, size[0], span)
        with torch.set_grad_enabled(has_backward):
            shift = leaf.new_tensor([0.0, float(span[0])])
            images, alphas = self.gsplat.rasterize_to_pixels(
                (leaf[:, 0:2] - shift)[None], leaf[None, :, 2:5], leaf[None, :, 6:9], leaf[None, :, 5],
                size[0], span[1] - span[0], TILE, offsets, indices, backgrounds=background[None],
            )  # fmt: skip
            transmittance = 1.0 - alphas[0, :, :, 0]
        state = _FrameState(leaf, images[0], transmittance)
        return Frame(images[0].detach(), transmittance.detach(), per_row, view, span, state)

    def _tiles(self, splats: Splats, view: int, width: int, span: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The tile lists of a strip, and the pairs of each tile row, all pixels of its instances."""
        part = slice(*splats.view_range(view))
        means = splats.rows[part, 0:2].clone()
        means[:, 1] -= span[0]
        radii = self._radii(splats, part)
        columns, rows = -(-width // TILE), -(-(span[1] - span[0]) // TILE)
        geometry = (means[None], radii[None], splats.depths[part][None])
        _, keys, indices = self.gsplat.isect_tiles(*geometry, TILE, columns, rows)
        offsets = self.gsplat.isect_offset_encode(keys, 1, columns, rows)
        starts = torch.cat([offsets[0, :, 0], offsets.new_full((1,), len(indices))])
        return offsets, indices, starts.diff().to(torch.int64) * (TILE * TILE)

    def _radii(self, splats: Splats, part: slice) -> Tensor:
        """(n, 2) int32 pixels; of splats that came from other ranks, from their boxes."""
        if isinstance(splats.state, ProjectionState):
            return splats.state.radii[part]
        boxes, means = splats.boxes[part].to(splats.rows.dtype), splats.rows[part, 0:2]
        reach = torch.maximum(means - boxes[:, 0:2], boxes[:, 2:4] - means).ceil()
        is_empty = (boxes[:, 2:4] <= boxes[:, 0:2]).any(dim=1, keepdim=True)
        return reach.masked_fill(is_empty, 0.0).to(torch.int32)

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
        """See `Body.rasterize_backward`."""
        if self.masked:
            self.own.rasterize_backward(
                splats, frame, d_rgb, d_rows, d_transmittance=d_transmittance, overwrite=overwrite
            )
            return
        state: _FrameState = frame.state
        outputs, gradients = [state.rgb], [d_rgb]
        if d_transmittance is not None:
            outputs, gradients = [*outputs, state.transmittance], [*gradients, d_transmittance]
        (d_leaf,) = torch.autograd.grad(outputs, state.rows, gradients, retain_graph=True)
        part = slice(*splats.view_range(frame.view))
        d_rows[part] = d_leaf if overwrite else d_rows[part] + d_leaf

    def absolute_gradients(self, splats: Splats, frame: Frame, gradient: ImageGradient) -> Tensor:
        """See `Body.absolute_gradients`; masksplat's. Raises: ValueError for frames that gsplat drew."""
        if not self.masked:
            raise ValueError("the gsplat body gives absolute gradients of its masked frames only; make it masked=True")
        return self.own.absolute_gradients(splats, frame, gradient)

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
        """See `Body.photometric`; masksplat's."""
        return self.own.photometric(
            rgb, target, lambda_dssim, own_rows=own_rows, image_height=image_height, row_start=row_start
        )

    def adam(self, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamStep) -> None:
        """See `Body.adam`; masksplat's."""
        self.own.adam(param, grad, exp_avg, exp_avg_sq, step)

    def lazy_rows(self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: int) -> LazyRows | None:
        """See `Body.lazy_rows`; every update is dense."""
        return None

    def blend_scores(
        self, splats: Splats, view: int, size: tuple[int, int], *, rows: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Body.blend_scores`; masksplat's."""
        return self.own.blend_scores(replace(splats, state=None), view, size, rows=rows)
