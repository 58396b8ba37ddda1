# SPDX-License-Identifier: Apache-2.0
"""The cuda body of masksplat: one NVIDIA GPU, float32, kernels that NVRTC compiles at first use.

In the immediate mode, the default, `rasterize` and `blend_scores` look at the device after each view and repeat it with
larger buffers if one was too small. In the deferred mode nothing waits: an overflow stays noted in `status`, everything
that would change parameters or moments does nothing from then on, and the owner calls `recover` when it suits and
repeats the steps since.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from masksplat.cuda import lazy_adam, projection
from masksplat.cuda import photometric as loss
from masksplat.cuda.capacity import Capacity
from masksplat.cuda.devices import launcher_of
from masksplat.cuda.launcher import Launcher
from masksplat.cuda.rasterization import Rasterizer
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

LAZY_FROM: int | None = 3_000_000
"""Gaussians from which on shN is updated lazily (None: never). By `bench/cuda_lazy.py` that loses next to nothing, and
gains where a step draws a small part of them."""


class CudaBody:
    """Kernels on one GPU, on torch's current stream; see `masksplat.ops.Body`.

    `project` leaves unused rows behind each view's splats (`Splats.counts`); `masksplat.types.compact` removes them.
    """

    name = "cuda"

    def __init__(
        self, device: torch.device | str = "cuda", *, launcher: Launcher | None = None, capacity: Capacity | None = None
    ) -> None:
        """Work on `device`, or through another launcher; `capacity` says how large the buffers are at first.

        Raises:
            CudaUnavailableError: when there is no such device, or cuda.core or NVRTC is missing.
        """
        self.launcher = launcher_of(device) if launcher is None else launcher
        self.capacity = Capacity(self.launcher.device) if capacity is None else capacity
        self.rasterizer = Rasterizer(self.launcher, self.capacity)
        self.lazy_from = LAZY_FROM

    @property
    def device(self) -> torch.device:
        """Where all tensors must be."""
        return self.launcher.device

    @property
    def status(self) -> Tensor:
        """(8,) int32 on the device: [0] is not 0 once a buffer was too small, [1] the instances needed."""
        return self.capacity.status

    @property
    def defers(self) -> bool:
        """Whether overflows are left to the owner (deferred mode)."""
        return self.capacity.defers

    @defers.setter
    def defers(self, defers: bool) -> None:
        """Choose the mode."""
        self.capacity.defers = defers

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Enter the deferred mode; on leaving, the mode is what it was."""
        before, self.defers = self.defers, True
        try:
            yield
        finally:
            self.defers = before

    def recover(self) -> bool:
        """Grow the buffers that were too small and clear the status; True when the work since must be repeated.

        Waits for the device.

        Raises:
            MemoryError: when a view needs more than can be.
        """
        return self.capacity.recover()

    def project(
        self,
        gaussians: Gaussians,
        views: Views,
        settings: ProjectionSettings,
        *,
        masks: Tensor | None = None,
        ids: Tensor | None = None,
    ) -> Splats:
        """See `Body.project`; the views' tensors may be on the host or on the device.

        Raises:
            ValueError: tensors that are not float32, or too few SH coefficients for the degree.
        """
        return projection.project(self.launcher, gaussians, views, settings, masks=masks, ids=ids, status=self.status)

    def project_backward(
        self, gaussians: Gaussians, views: Views, settings: ProjectionSettings, splats: Splats, d_rows: Tensor
    ) -> GaussianGradients:
        """See `Body.project_backward`."""
        return projection.project_backward(self.launcher, gaussians, views, settings, splats, d_rows)

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
        """See `Body.project_backward_update`. After an overflow nothing changes and the result is undefined.

        Raises:
            ValueError: parameters or moments that cannot be updated in place.
        """
        return projection.project_backward_update(
            self.launcher, gaussians, views, settings, splats, d_rows,
            optimizer=optimizer, statistics=statistics, gradient_scale=gradient_scale, status=self.status,
        )  # fmt: skip

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
        """See `Body.rasterize`; without `has_backward` nothing is kept for `rasterize_backward`."""
        return self.rasterizer.rasterize(splats, view, size, background, rows=rows, has_backward=has_backward)

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
        self.rasterizer.rasterize_backward(
            splats, frame, d_rgb, d_rows, d_transmittance=d_transmittance, overwrite=overwrite
        )

    def absolute_gradients(self, splats: Splats, frame: Frame, gradient: ImageGradient) -> Tensor:
        """See `Body.absolute_gradients`; rows that are not in use get zeros."""
        return self.rasterizer.absolute_gradients(splats, frame, gradient)

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
        """See `Body.photometric`; `target` is on the device, too.

        Raises:
            ValueError: shapes or types that do not fit.
        """
        return loss.photometric(
            self.launcher, rgb, target, lambda_dssim, own_rows=own_rows, image_height=image_height, row_start=row_start
        )

    def adam(self, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: AdamStep) -> None:
        """See `Body.adam`. After an overflow nothing changes.

        Raises:
            ValueError: tensors that cannot be updated in place.
        """
        projection.adam(self.launcher, param, grad, exp_avg, exp_avg_sq, step, status=self.status)

    def lazy_rows(self, param: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: int) -> LazyRows | None:
        """See `Body.lazy_rows`; tables of less than `lazy_from` rows are updated densely.

        Raises:
            ValueError: tensors that are not float32, contiguous and aligned to 16 bytes.
        """
        if self.lazy_from is None or len(param) < self.lazy_from or param.numel() == 0:
            return None
        projection.check_in_place("a lazily updated attribute", param, exp_avg, exp_avg_sq)
        return LazyRows(param, exp_avg, exp_avg_sq, self._catch_up, update)

    def _catch_up(self, lazy: LazyRows) -> None:
        """Bring all rows up to the last update, unless an overflow is noted."""
        lazy_adam.catch_up(self.launcher, lazy, self.status)

    def blend_scores(
        self, splats: Splats, view: int, size: tuple[int, int], *, rows: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Body.blend_scores`; rows that are not in use score 0."""
        return self.rasterizer.blend_scores(splats, view, size, rows=rows)
