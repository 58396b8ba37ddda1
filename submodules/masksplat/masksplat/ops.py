# SPDX-License-Identifier: Apache-2.0
"""The ops of masksplat and the bodies that implement them.

A body is chosen once, by name, with `get_body`; a missing one is refused with the command that provides it.
Every body offers the same functions (`Body`); `reference` is differentiable by autograd as well.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from masksplat.lazy import LazyRows
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
)

BODY_NAMES = ("auto", "cuda", "cpu", "reference")


class Body(Protocol):
    """Forward/backward pairs on one kind of device. Shapes and units: `masksplat.types`."""

    name: str

    def project(
        self,
        gaussians: Gaussians,
        views: Views,
        settings: ProjectionSettings,
        *,
        masks: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Splats:
        """Activate, project (EWA), evaluate SH and pack the visible splats of every view.

        `masks` (N,) in [0, 1], default 1; `ids` (N,) int64, default the row number. The cuda body leaves unused rows
        (`Splats.counts`), so that nobody waits for the device; `masksplat.types.compact` removes them.
        """

    def project_backward(
        self, gaussians: Gaussians, views: Views, settings: ProjectionSettings, splats: Splats, d_rows: Tensor
    ) -> GaussianGradients:
        """Gradients of the parameters and masks, summed over views, from `d_rows` (M, 10).

        `splats` are what `project` made of these Gaussians; bodies may read their rows instead of projecting again.
        """

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
        """`project_backward`, Adam and the densify statistics in one pass, in place; returns the mask gradient (N,).

        `gradient_scale` multiplies the parameters' and masks' gradients, not the statistics. With `gaussians.lazy`,
        rows of shN that are not drawn are left behind.
        """

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
        """Composite the splats of `view` front to back over `background` (3,) in pixel rows `rows` (default all).

        `size` is (width, height) of the whole view. Without `has_backward` a body may keep nothing for
        `rasterize_backward`, which needs memory.
        """

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
        """Add the gradient of a loss with d_rgb (h, w, 3) and d_transmittance (h, w) into `d_rows` (M, 10).

        With `overwrite` the view's rows become this gradient, whatever they held; what those that are not in use
        (`Splats.counts`) hold afterwards is undefined.
        """

    def absolute_gradients(self, splats: Splats, frame: Frame, gradient: ImageGradient) -> Tensor:
        """(V, 2) sums over the frame's pixels of |dL/d mean2d| of each splat of its view (AbsGS, Ye et al. 2024).

        x and y by themselves, over all channels of `gradient`, whatever colours the frame has. A pass of its own: who
        does not ask for it pays nothing.
        """

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
        """L1 and SSIM of `rgb` (h, w, 3) against `target` (h, w, 3) uint8, with the gradient.

        The region starts at pixel row `row_start` of an image of `image_height` rows (default: it is the whole
        image); the loss is summed over the region's rows `own_rows` only and divided by 3 * image_height * w.
        """

    def adam(self, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamStep) -> None:
        """Update `param` and its moments in place, as torch.optim.Adam without weight decay."""

    def lazy_rows(self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: int) -> LazyRows | None:
        """What makes the updates after number `update` of shN and its moments lazy, for `Gaussians.lazy`.

        None where the body updates all rows in every step.
        """

    def blend_scores(
        self, splats: Splats, view: int, size: tuple[int, int], *, rows: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Per packed splat of `view`: maximum and sum over accepted pixels of alpha * T, both (M_view,)."""


def get_body(name: str = "auto", *, num_threads: int | None = None, device: torch.device | str | None = None) -> Body:
    """The body called `name`; "auto" is cuda for a CUDA `device`, else cpu.

    Args:
        num_threads: of the cpu body, default torch's.
        device: where the tensors are; the cuda body's default is the current CUDA device.

    Raises:
        ValueError: for a name that is not in BODY_NAMES.
        CudaUnavailableError: when the cuda body lacks a device or a library; the message says how to get it.
    """
    is_cuda = device is not None and torch.device(device).type == "cuda"
    if name == "cuda" or (name == "auto" and is_cuda):
        from masksplat.cuda.body import CudaBody

        return CudaBody("cuda" if device is None else device)
    if name in ("auto", "cpu"):
        from masksplat.cpu.body import CpuBody

        return CpuBody(num_threads)
    if name == "reference":
        from masksplat.reference.body import ReferenceBody

        return ReferenceBody()
    raise ValueError(f"unknown masksplat body {name!r}; choose one of {', '.join(BODY_NAMES)}")
